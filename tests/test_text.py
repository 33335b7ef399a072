"""Streamed text, stop strings, chat templates, and conversations that read exactly what their messages amount to."""

import dataclasses
import itertools
import warnings

import jax
import jax.numpy as jnp
import pytest
import tiny_folder
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

import allmem_jax
from allmem_jax.decoding import chat, generation
from allmem_jax.model import config as config_lib
from allmem_jax.model import lm

END = "<|im_end|>"
# Drops the thoughts of all turns but the last, and closes an empty thought before an answer without one.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if '</think>' in m.content and not loop.last %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.content }}]{% endfor %}"
)


def sentencepiece(prefix: bool) -> transformers.PreTrainedTokenizerFast:
    """Letters, a few pairs and all bytes, where "\u2581" stands for a space, with or without one before a text."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        *"abcdehiost",
        "he",
        "\u2581the",
    ]
    vocab = {piece: index for index, piece in enumerate([*pieces, "\u2581t", "\u2581s", "[INST]", "[/INST]"])}
    merges = [("h", "e"), ("\u2581", "t"), ("\u2581t", "he"), ("\u2581", "s")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    scheme = "first" if prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(" ", left=1)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    special = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[INST]", "[/INST]"]})
    tokenizer.chat_template = (
        "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
    )
    return tokenizer


TOKENIZERS = {"bytes": tiny_folder.tiny_tokenizer(), "sp": sentencepiece(True), "sp, no prefix": sentencepiece(False)}


def decode(tokenizer, ids) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_streamed_text_is_the_decoded_text(name, data):
    """Any tokens at all: broken characters, special tokens, runs of bytes; after a prompt and without."""
    tokenizer = TOKENIZERS[name]
    some = st.one_of(st.integers(0, len(tokenizer) - 1), st.sampled_from(tokenizer.encode("the sh\u9be8 \U0001f40b")))
    ids = data.draw(st.lists(some, max_size=24))
    before = tokenizer.encode(data.draw(st.sampled_from(["", "the", "the sea \u9be8 is", "a "])))
    assert "".join(chat.decode_stream(tokenizer, ids)) == decode(tokenizer, ids)
    together = decode(tokenizer, [*before, *ids])
    if together.startswith(known := decode(tokenizer, before)):  # else what follows changed the prompt's own bytes
        assert "".join(chat.decode_stream(tokenizer, ids, before)) == together[len(known) :]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_characters_come_when_they_are_complete(name):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode("the \u9be8\U0001f40b the", add_special_tokens=False)
    shown = [piece for piece in chat.decode_stream(tokenizer, ids)]
    assert len(shown) > 2 and "".join(shown) == "the \u9be8\U0001f40b the" and "\ufffd" not in "".join(shown)


def test_a_continuation_keeps_its_leading_space():
    tokenizer = sentencepiece(True)
    prompt = tokenizer.encode("the")
    assert "".join(chat.decode_stream(tokenizer, [tokenizer.convert_tokens_to_ids("\u2581the")], prompt)) == " the"


def test_spaces_before_punctuation_are_not_cleaned_up():
    tokenizer = tiny_folder.tiny_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    sample = "the word 's ' , x != y ; do n't . Really ?"
    assert "".join(chat.decode_stream(tokenizer, tokenizer.encode(sample))) == sample


def cut(whole: str, stops: list[str]) -> str:
    """The text before the stop that is complete first; of two that end together, the longer."""
    for end in range(len(whole) + 1):
        if ending := [stop for stop in stops if whole[:end].endswith(stop)]:
            return whole[: end - max(map(len, ending))]
    return whole


@settings(max_examples=300, deadline=None)
@given(st.text("ab\n", max_size=12), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), st.randoms())
def test_text_ends_exactly_at_a_stop_wherever_it_is_cut(whole, stops, random):
    places = sorted(random.sample(range(len(whole) + 1), k=random.randint(0, len(whole))))
    pieces = [whole[i:j] for i, j in itertools.pairwise([0, *places, len(whole)])]
    expected, shown = cut(whole, stops), ""
    for piece in chat.until(pieces, stops):
        shown += piece
        assert piece and expected.startswith(shown)
    assert shown == expected


def test_nothing_is_asked_for_after_a_stop_and_little_is_held_back():
    asked = []
    pieces = (asked.append(piece) or piece for piece in ["Yes.\nUse", "r", "s\nUser", ": no", " more"])
    assert list(chat.until(pieces, ["\nUser:"])) == ["Yes.", "\nUsers"]
    assert asked[-1] == ": no"
    with pytest.raises(ValueError, match="empty"):
        list(chat.until(["a"], [""]))


def test_stop_tokens_are_those_of_the_tokenizer_and_of_the_config():
    tokenizer = tiny_folder.tiny_tokenizer()
    ends = set(chat.stop_tokens(tokenizer))
    assert tokenizer.eos_token_id in ends
    config = config_lib.preset("smollm2-135m", eos_tokens=(7, 9))
    assert chat.stop_tokens(tokenizer, config) == sorted(ends | {7, 9})


@pytest.mark.parametrize(
    "template,messages,thinking,message",
    [
        (NO_SYSTEM, ("system", "user"), None, "roles must alternate.*leave it out"),
        (NO_SYSTEM, ("user", "user"), None, "roles must alternate.*without a template"),
        ("{% for m in messages %}{{ m.content }", ("user",), None, "TemplateSyntaxError"),
        ("{{ messages[0].content + 1 }}", ("user",), None, "TypeError"),
        (tiny_folder.TEMPLATE, ("user",), True, "no enable_thinking"),
        (None, ("user",), None, "no chat template"),
    ],
)
def test_a_template_that_fails_says_so_in_one_line(template, messages, thinking, message):
    tokenizer = tiny_folder.tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message) as error:
        chat.render(tokenizer, [{"role": role, "content": "x"} for role in messages], thinking=thinking)
    assert "\n" not in str(error.value)


def test_thinking_is_the_templates_switch():
    tokenizer = tiny_folder.tiny_tokenizer()
    tokenizer.chat_template = THINKING
    ends = [chat.render(tokenizer, [{"role": "user", "content": "x"}], thinking=on)[-15:] for on in (None, True, False)]
    assert ends[0] == ends[1] != ends[2] == "<think></think>"


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """Answers depend on every token that was read."""
    path = tiny_folder.write(tmp_path_factory.mktemp("models") / "random")
    return allmem_jax.load_pretrained(path, mixer="swa", window=512, sinks=2)


@pytest.fixture(scope="module")
def scripted_model():
    """Goes on with " sea", "A", ... "F" and the end of a turn, by the last token alone; trained on 64 tokens."""
    tokenizer = tiny_folder.tiny_tokenizer()
    size = len(tokenizer)
    config = config_lib.ModelConfig(
        vocab_size=size,
        d_model=size + size % 2,
        n_layers=1,
        n_heads=1,
        n_kv_heads=1,
        head_dim=8,
        d_ff=8,
        tie_embeddings=False,
        mixer="swa",
        window=512,
        sinks=0,
        max_length=64,
    )
    shapes = jax.eval_shape(lambda: lm.init_params(config))
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (jnp.ones if "norm" in str(path) else jnp.zeros)(leaf.shape, leaf.dtype), shapes
    )
    params["embed"]["embedding"] = jnp.eye(*params["embed"]["embedding"].shape)
    chain = [tokenizer.encode(word)[0] for word in ("\n", *"ABCDEF", END)]
    head = jnp.zeros(params["lm_head"]["kernel"].shape).at[:size, chain[1]].set(0.5)
    params["lm_head"]["kernel"] = head.at[jnp.array(chain[:-1]), jnp.array(chain[1:])].set(1.0)
    return config, params, tokenizer


def alone(talk: chat.Conversation, length: int) -> str:
    """What the model answers to all messages but the last, read at once."""
    rendered = chat.render(talk.tokenizer, talk.messages[:-1], thinking=talk.thinking)
    prompt = talk.tokenizer.encode(rendered, add_special_tokens=False)
    stops = chat.stop_tokens(talk.tokenizer, talk.config)
    (ids,) = generation.generate(talk.params, talk.config, [prompt], max_tokens=length, stop_tokens=stops)
    return "".join(chat.until([decode(talk.tokenizer, ids)], talk.stop))


def read_tokens(monkeypatch) -> list[int]:
    """Grows by the number of tokens of every prompt that is read."""
    read, prefill = [], generation.prefill
    monkeypatch.setattr(generation, "prefill", lambda *a, **k: read.append(len(a[2][0])) or prefill(*a, **k))
    return read


@pytest.mark.parametrize("template,thinking", [(tiny_folder.TEMPLATE, None), (THINKING, None), (THINKING, False)])
def test_a_reply_is_the_answer_to_the_rendered_messages(random_model, template, thinking):
    config, params, tokenizer = random_model
    tokenizer.chat_template = template
    talk = chat.Conversation(params, config, tokenizer, max_tokens=8, thinking=thinking, stop=["\ufffd\ufffd\ufffd"])
    for question in ("the whale?", "and the sea?", "the ship?"):
        answer = "".join(talk.reply(question))
        assert talk.messages[-1] == {"role": "assistant", "content": answer}
        assert answer == alone(talk, 8)


def test_a_sentencepiece_chat_is_the_answer_to_the_rendered_messages(random_model):
    config, params, _ = random_model
    tokenizer = sentencepiece(True)
    config = config.replace(eos_tokens=())
    params = params | {"embed": {"embedding": params["embed"]["embedding"][: len(tokenizer)]}}
    config = config.replace(vocab_size=len(tokenizer))
    talk = chat.Conversation(params, config, tokenizer, max_tokens=8)
    for question in ("the host", "he said"):
        assert "".join(talk.reply(question)) == alone(talk, 8)


@pytest.mark.parametrize("how", ["closed", "dropped", "held", "failed"])
def test_an_abandoned_answer_is_what_was_shown_of_it(random_model, how, monkeypatch):
    config, params, tokenizer = random_model
    tokenizer.chat_template = tiny_folder.TEMPLATE
    talk = chat.Conversation(params, config, tokenizer, max_tokens=8)
    pieces = talk.reply("tell me a long story")
    shown = next(pieces) + next(pieces)
    if how == "failed":
        monkeypatch.setattr(generation, "decode_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            shown += "".join(pieces)
        monkeypatch.undo()
    elif how == "closed":
        pieces.close()
    elif how == "dropped":
        del pieces
    answer = "".join(talk.reply("and now?"))
    assert talk.messages[1] == {"role": "assistant", "content": shown}
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    assert answer == alone(talk, 8)
    prompt = tokenizer.encode(chat.render(tokenizer, talk.messages[:-1]))
    assert len(prompt) < int(talk._state.position[0]) <= len(prompt) + 8


def test_a_turn_of_which_nothing_was_shown_has_not_been(random_model, monkeypatch):
    config, params, tokenizer = random_model
    tokenizer.chat_template = tiny_folder.TEMPLATE
    talk = chat.Conversation(params, config, tokenizer, max_tokens=8)
    talk.reply("never asked for")
    with monkeypatch.context() as patch:
        patch.setattr(generation, "prefill", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            next(talk.reply("interrupted while it is read"))
    assert talk.messages == []
    assert "".join(talk.reply("and now?")) == alone(talk, 8)


def test_a_turn_costs_its_own_tokens(scripted_model, monkeypatch):
    config, params, tokenizer = scripted_model
    talk = chat.Conversation(params, config, tokenizer, max_tokens=20)
    read = read_tokens(monkeypatch)
    assert "".join(talk.reply("the ship")) == "ABCDEF"
    assert "".join(talk.reply("the sea")) == "ABCDEF"
    turn = tokenizer.encode("\n<|im_start|>user\nthe sea<|im_end|>\n<|im_start|>assistant\n")
    assert read[1:] == [len(turn)]


def test_what_a_template_drops_costs_the_last_answer_again(scripted_model, monkeypatch):
    """The empty thought before each answer is not there any more in the next turn."""
    config, params, tokenizer = scripted_model
    monkeypatch.setattr(tokenizer, "chat_template", THINKING)
    talk = chat.Conversation(params, config, tokenizer, max_tokens=20, thinking=False)
    read = read_tokens(monkeypatch)
    for question in ("the ship", "the sea", "the whale"):
        "".join(talk.reply(question))
    first, second, third = (sum(read[i : i + 2]) for i in (0, 2, 4))
    assert len(read) == 6 and second <= first + 8 and third <= first + 8


def test_stop_strings_end_answers_and_completions(scripted_model):
    config, params, tokenizer = scripted_model
    talk = chat.Conversation(params, config, tokenizer, max_tokens=20, stop=["DE", "x"])
    assert [*talk.reply("the ship")] == ["A", "B", "C"]
    assert talk.messages[-1]["content"] == "ABC"
    assert "".join(talk.reply("the sea")) == "ABC"
    made = chat.complete(params, config, tokenizer, "\n", max_tokens=20, stop=["BC"])
    assert list(made) == ["A"]
    assert "".join(chat.complete(params, config, tokenizer, "\n", max_tokens=20)) == "ABCDEF"


def test_the_configs_ends_end_a_text(scripted_model):
    config, params, tokenizer = scripted_model
    config = config.replace(eos_tokens=tuple(tokenizer.encode("D")))
    assert "".join(chat.complete(params, config, tokenizer, "\n", max_tokens=20)) == "ABC"
    (ids,) = generation.generate(params, config, [tokenizer.encode("\n")], max_tokens=20)
    assert tokenizer.decode(ids) == "ABC"


def test_a_text_beyond_the_training_length_is_warned_of_once(scripted_model):
    config, params, tokenizer = scripted_model
    with pytest.warns(UserWarning, match="ends at token 70 and the model was trained on 64") as found:
        "".join(chat.complete(params, config, tokenizer, "x" * 70, max_tokens=3))
    assert len(found) == 1
    talk = chat.Conversation(params, config, tokenizer, max_tokens=20)
    with pytest.warns(UserWarning, match="trained on 64") as found:
        for question in ("the ship", "the sea" * 10, "the whale"):
            "".join(talk.reply(question))
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        "".join(chat.complete(params, config, tokenizer, "\n", max_tokens=20))


def test_bad_requests_are_named_before_anything_is_read(scripted_model):
    config, params, tokenizer = scripted_model
    for wrong, message in (({"max_tokens": 0}, "max_tokens=0"), ({"sampling": generation.Sampling(-1)}, "temper")):
        with pytest.raises(ValueError, match=message):
            chat.Conversation(params, config, tokenizer, **wrong)
    with pytest.raises(ValueError, match="the prompt is empty"):
        chat.complete(params, config, tokenizer, "", max_tokens=3)
    with pytest.raises(ValueError, match="max_tokens=0"):
        chat.complete(params, config, tokenizer, "x", max_tokens=0)
    full = dataclasses.replace(config, mixer="full")
    with pytest.raises(ValueError, match="cache of 30.*--context"):
        chat.Conversation(params, full, tokenizer, max_tokens=20, context=30).reply("the ship " * 9).__next__()
