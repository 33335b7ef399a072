"""Tokenizers of folders: decoding is exact, what is encoded can be continued, and sentencepiece's ids are its own."""

import json
import random

import pytest
import sentencepiece
import tiny_folder
import transformers
from tokenizers import processors

from allmem_jax.checkpoints import ends
from allmem_jax.checkpoints import tokenizer as tokenizer_lib

TEXTS = ["the word 'secret' and x != y ; print ( 'max' )", "he said ' so ' . Really ?", "don 't , 'm 're 've n't"]


def template(single: str, special: list[tuple[str, int]]):
    return processors.TemplateProcessing(single=single, pair=f"{single} $B:1", special_tokens=special)


@pytest.fixture
def source(tmp_path):
    """A tokenizer with a first and a last token, to be given a way of putting them around a text and saved."""
    tokenizer = tiny_folder.tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    return tokenizer


def test_decoding_is_exact(source, tmp_path):
    source.save_pretrained(tmp_path / "in")
    path = tmp_path / "in/tokenizer_config.json"
    path.write_text(
        json.dumps(
            json.loads(path.read_text())
            | {
                "clean_up_tokenization_spaces": True,
                "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
            }
        )
    )
    ids = source.encode(TEXTS[1], add_special_tokens=False)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "in").decode(ids) != TEXTS[1]  # the flag does bite
    found = tokenizer_lib.load_tokenizer(tmp_path / "in")
    tokenizer_lib.save_tokenizer(found, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for each in (found, tokenizer_lib.load_tokenizer(tmp_path / "out"), theirs):
        for text in TEXTS:
            assert each.decode(each.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("way", ["template", "sequence", "none"])
def test_no_end_closes_what_is_to_be_continued(source, tmp_path, way):
    bos, eos = source.bos_token_id, source.eos_token_id
    both = template("<s> $A <|im_end|>", [("<s>", bos), ("<|im_end|>", eos)])
    if way == "sequence":
        both = processors.Sequence([processors.ByteLevel(trim_offsets=False), both])
    source.backend_tokenizer.post_processor = None if way == "none" else both
    source.save_pretrained(tmp_path / "in")
    first = [] if way == "none" else [bos]
    bare = source.encode("the sea", add_special_tokens=False)
    found = tokenizer_lib.load_tokenizer(tmp_path / "in")
    assert found.encode("the sea") == first + bare and found.encode("") == first
    assert found("the", "sea").input_ids[-1] != eos
    for text in ("the sea", "" if way == "none" else "<s>the sea"):
        assert tokenizer_lib.encode_prompt(found, text) == first + (bare if text else [])
    assert tokenizer_lib.encode_prompt(found, "the sea", begins=False) == bare  # it goes on from another
    untouched = transformers.AutoTokenizer.from_pretrained(tmp_path / "in")
    assert tokenizer_lib.encode_prompt(untouched, "the sea") == first + bare
    tokenizer_lib.save_tokenizer(found, tmp_path / "out")  # the export is what the source was
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.encode("the sea") == untouched.encode("the sea") == first + bare + ([] if way == "none" else [eos])
    assert found.encode("the sea") == first + bare
    assert tokenizer_lib.load_tokenizer(tmp_path / "out").encode("the sea") == first + bare


SENTENCEPIECE = {
    "default": dict(model_type="bpe"),  # which normalises, and drops spaces
    "llama": dict(model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False),
    "gemma": dict(
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        user_defined_symbols=["<turn>", "\n\n"],
    ),
    "unigram": dict(model_type="unigram"),
}


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_a_sentencepiece_model_alone_has_its_own_ids(kind, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    lines = iter(["the whale and the sea were white, and the ship sailed on.", "How are you, my friend?"] * 40)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_prefix=str(folder / "tokenizer"),
        vocab_size=330,
        byte_fallback=True,
        character_coverage=1.0,
        minloglevel=2,
        hard_vocab_limit=False,
        **SENTENCEPIECE[kind],
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_eos_token": kind == "llama"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    gold = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    found = tokenizer_lib.load_tokenizer(folder)
    tokenizer_lib.save_tokenizer(found, tmp_path / "out")
    (tmp_path / "out/config.json").write_text(json.dumps({"model_type": "llama"}))
    again = tokenizer_lib.load_tokenizer(tmp_path / "out")
    rng = random.Random(0)
    texts = ["".join(rng.choice("the whale\n\t  é🐋!w.▁①ﬁ") for _ in range(rng.randrange(20))) for _ in range(100)]
    for text in ["the whale sailed", "  two spaces  and\n\nlines", "café 🐋 x!=y", "<turn>the", "", " ", *texts]:
        ids = gold.encode(text)
        for each in (found, again):
            assert each.encode(text) == [gold.bos_id(), *ids], text
            assert each.decode(ids) == gold.decode(ids)
    assert (found.bos_token, found.eos_token, found.unk_token) == ("<s>", "</s>", "<unk>")


ODD = [None, True, 7, -1, 1.5, "", "x", [], ["<s>"], {}, {"a": 1}, {"content": 3}, {"7": {"content": []}}]
KEYS = [
    "tokenizer_class",
    "eos_token",
    "bos_token",
    "unk_token",
    "pad_token",
    "chat_template",
    "added_tokens_decoder",
    "extra_special_tokens",
    "additional_special_tokens",
    "model_max_length",
    "clean_up_tokenization_spaces",
    "add_bos_token",
    "padding_side",
    "legacy",
    "auto_map",
]


@pytest.mark.parametrize("key", KEYS)
def test_an_odd_tokenizer_config_loads_or_is_one_line(source, tmp_path, key):
    source.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    good = json.loads(path.read_text())
    for value in ODD:
        path.write_text(json.dumps(good | {key: value}))
        try:
            tokenizer = tokenizer_lib.load_tokenizer(tmp_path)
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            assert all(type(token) is int for token in ends.of_tokenizer(tokenizer))


def test_damaged_tokenizers_are_one_line(tmp_path):
    for name, content in [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.model", b"\x00\xff" * 40),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"{}"),
        ("tokenizer_config.json", b"\xff"),
    ]:
        folder = tmp_path / f"{name}{len(content)}"
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot load the tokenizer: .*; copy the original's") as error:
            tokenizer_lib.load_tokenizer(folder)
        assert "\n" not in str(error.value) and str(folder) in str(error.value)
