"""Tokenizers and chat templates as people have them: what stands before a text, and which tokens are a response."""

import json

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from allmem_jax.checkpoints import tokenizer as tokenizer_lib
from train.data import documents, encode, prompts

pytestmark = pytest.mark.core

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")


def byte_tokenizer(template=None, eos="<|im_end|>", single=None):
    """A byte-level tokenizer without merges; `single` is how its post-processor writes a text."""
    letters = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    if single:
        backend.post_processor = processors.TemplateProcessing(single, special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("single", "prefix"),
    [(None, []), ("<s> $A", [0]), ("$A </s>", []), ("<s> $A </s>", [0]), ("</s> $A </s>", [1])],
)
def test_the_prefix_is_what_stands_before_a_text(single, prefix):
    assert tokenizer_lib.prefix_tokens(byte_tokenizer(single=single)) == prefix


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What was thought is left out of turns before the last question, and stands, if empty, in those after it.
THINKS = (
    "{% set ns = namespace(last=0) %}{% for m in messages if m.role == 'user' %}{% set ns.last = loop.index %}"
    "{% endfor %}{% set ns.users = 0 %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'user' %}{% set ns.users = ns.users + 1 %}{% endif %}"
    "{% if m.role == 'assistant' %}{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip() if "
    "'</think>' in m.content else '' %}"
    "{% if ns.users == ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip() }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + asks }}{% endif %}"
)
TOOLS = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role }}"
    "{{ m.content or '' }}{% for call in m.tool_calls or [] %}{{ call.function.name }}"
    "{{ call.function.arguments | tojson }}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ '<|im_start|>assistant\n' + m.content + "
    "'<|im_end|>\n' }}{% endgeneration %}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LOSES = "{% for m in messages %}{{ m.content if loop.last else m.content | reverse }}{% endfor %}"


def say(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]


def learned(tokenizer, messages, tools=None):
    """The text that a loss on responses is about, whose tokens are those of the whole rendering."""
    document = encode.chat_document("here", messages, tokenizer, tools)
    options = {"tools": tools} if tools else {}
    turns = [{name: value for name, value in message.items() if name != "train"} for message in messages]
    text = tokenizer.apply_chat_template(turns, tokenize=False, **options)
    assert tokenizer.decode(document.tokens.tolist()) == text
    assert document.tokens.tolist() == tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.decode(document.tokens[document.response].tolist())


THOUGHT = "<think>\ngreet\n</think>\n\nhello"


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (CHATML, say("hi", "hello", "bye", "so long"), "hello<|im_end|>so long<|im_end|>"),
        (CHATML, say("hi", "hello", "bye"), "hello<|im_end|>"),
        (CHATML, say("hi", "", "hello", "hello"), "<|im_end|>hello<|im_end|>"),
        (THINKS, say("hi", "hello"), "<think>\n\n</think>\n\nhello<|im_end|>"),
        (THINKS, say("hi", THOUGHT), "<think>\ngreet\n</think>\n\nhello<|im_end|>"),
        (THINKS, say("hi", "hello", "bye", THOUGHT), "hello<|im_end|><think>\ngreet\n</think>\n\nhello<|im_end|>"),
        (
            THINKS,
            say("hi", THOUGHT, "bye", "a", "b", "c"),
            "hello<|im_end|>a<|im_end|><think>\n\n</think>\n\nc<|im_end|>",
        ),
        (
            THINKS.replace("asks", "'<think>\n'"),
            say("hi", THOUGHT, "b", "<c>"),
            "hello<|im_end|>\n</think>\n\n<c><|im_end|>",
        ),
        (MARKED, say("hi", "hello", "bye", "so long"), "hello<|im_end|>so long<|im_end|>"),
        (MARKED.replace(" + \"'<|im_end|>\n' }}{% endgen", ""), say("hi", "hello"), "hello<|im_end|>"),
    ],
)
def test_the_loss_is_on_answers_as_they_stand_in_the_whole(template, messages, said):
    assert learned(byte_tokenizer(template.replace(" + asks", "")), messages) == said


def test_turns_may_carry_no_loss():
    messages = say("hi", "hello", "bye", "so long")
    messages[1]["train"] = False
    for template in (CHATML, MARKED):
        assert learned(byte_tokenizer(template), messages) == "so long<|im_end|>"
    messages[3]["train"] = False
    with pytest.raises(ValueError, match="here has no message of the assistant to learn from"):
        learned(byte_tokenizer(CHATML), messages)


def test_calls_of_tools_go_through_the_template():
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    answered = [{"role": "tool", "content": "3"}, {"role": "assistant", "content": "so 3"}]
    messages = [*say("hi"), {"role": "assistant", "content": None, "tool_calls": [call]}, *answered]
    tokenizer, tools = byte_tokenizer(TOOLS), [{"type": "function", "function": {"name": "f"}}]
    document = encode.chat_document("here", messages, tokenizer, tools)
    text = tokenizer.decode(document.tokens.tolist())
    assert text.startswith('{"type": "function", "function": {"name": "f"}}<|im_start|>userhi')
    said = tokenizer.decode(document.tokens[document.response].tolist())
    assert said == 'f{"x": 1}<|im_end|>so 3<|im_end|>'
    with pytest.raises(ValueError, match="here has tool_calls, of which the tokenizer's chat template knows nothing"):
        encode.chat_document("here", messages, byte_tokenizer(CHATML))
    with pytest.raises(ValueError, match="here has tools, of which"):
        encode.chat_document("here", say("hi", "hello"), byte_tokenizer(CHATML + "{# xml_tools #}"), tools)
    thinking = [*say("hi"), {"role": "assistant", "content": "a", "reasoning_content": "b"}]
    with pytest.raises(ValueError, match="here has reasoning_content, of which"):
        encode.chat_document("here", thinking, byte_tokenizer(CHATML))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "chat template does not take this conversation"),
        ("{% for %}", "chat template does not take this conversation"),
        ("{{ raise_exception('only one turn') }}", "does not take this conversation: only one turn"),
        ("{{ messages[0].content + 1 }}", "does not take this conversation"),
        (LOSES, "turn 2 so differently once others follow that its answer cannot be found"),
    ],
)
def test_templates_that_refuse_are_one_error(tmp_path, template, message):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": say("hi", "hello", "bye", "so long")}))
    with pytest.raises(ValueError, match=rf"a\.jsonl:1.*{message}"):
        documents.load_documents([tmp_path], byte_tokenizer(template), tmp_path / "cache")


def merging_tokenizer(first, second):
    """A tokenizer that makes one token of two letters wherever they meet, and keeps spaces out of tokens' offsets."""
    state = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    state["model"]["vocab"][first + second] = len(state["model"]["vocab"])
    state["model"]["merges"] = [[first, second]]
    state["pre_tokenizer"]["use_regex"] = False
    backend = Tokenizer.from_str(json.dumps(state))
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    return tokenizer, tokenizer.convert_tokens_to_ids(first + second)


def test_tokens_do_not_cross_into_an_answer(tmp_path):
    tokenizer, merged = merging_tokenizer("Ċ", "a")
    document = encode.chat_document("here", say("\na", "ab", "hi", "a\na"), tokenizer)
    assert tokenizer.decode(document.tokens[document.response].tolist()) == "ab<|im_end|>a\na<|im_end|>"
    assert document.response[document.tokens == merged].tolist() == [False, True]  # where no edge is between them
    tokenizer, merged = merging_tokenizer("Ġ", "4")
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "2 42= ", "completion": "4 4"}))
    (document,) = documents.load_documents([tmp_path / "a.jsonl"], tokenizer, tmp_path / "cache")
    assert tokenizer.decode(document.tokens[document.response].tolist()) == "4 4<|im_end|>"
    assert document.response[document.tokens == merged].tolist() == [False, True]


def test_instructions_need_no_template(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"instruction": "add", "input": "2 2", "output": "4"}))
    found = {}
    for template in (None, CHATML):
        tokenizer = byte_tokenizer(template, single="<s> $A </s>", eos="</s>")
        (document,) = documents.load_documents([tmp_path], tokenizer, tmp_path / "cache")
        said = tokenizer.decode(document.tokens[document.response].tolist())
        found[template] = tokenizer.decode(document.tokens.tolist()), said, document.prefix
    assert found[None] == ("add\n2 2\n4</s>", "4</s>", (0,))
    text = "<|im_start|>user\nadd\n2 2<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    assert found[CHATML] == (text, "4<|im_end|>", ())


def test_a_prompt_and_its_completion_are_one_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "<s>2+2=", "completion": "4</s>"}))
    tokenizer = byte_tokenizer(single="<s> $A </s>", eos="</s>")
    (document,) = documents.load_documents([tmp_path], tokenizer, tmp_path / "cache")
    assert tokenizer.decode(document.tokens.tolist()) == "2+2=4</s>" and document.prefix == (0,)
    assert tokenizer.decode(document.tokens[document.response].tolist()) == "4</s>"


@pytest.mark.parametrize("template", [CHATML, THINKS.replace(" + asks", " + '<think>\n'"), MARKED])
def test_prompts_are_the_beginning_of_training_on_their_answers(tmp_path, template):
    tokenizer, turns = byte_tokenizer(template), say("hi", THOUGHT, "bye")
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}))
    (prompt,) = prompts.read(str(tmp_path / "a.jsonl"), tokenizer, 1000)
    document = encode.chat_document("here", [*turns, *say("", "so long")[1:]], tokenizer)
    assert document.tokens[: len(prompt.tokens)].tolist() == prompt.tokens
    assert document.response[len(prompt.tokens)] and not document.response[len(prompt.tokens) - 1]


def test_another_end_of_turn_has_other_tokens():
    hashes = [documents.tokenizer_hash(byte_tokenizer(CHATML, eos)) for eos in ("</s>", "<|im_end|>", "</s>")]
    assert hashes[0] == hashes[2] != hashes[1]
