"""Files to tokens: four kinds of files, what is wrong with them, and the cache."""

import dataclasses
import errno
import json
import os
import resource

import numpy as np
import pyarrow
import pytest
from array_record.python import array_record_module
from pyarrow import parquet

from train import prepare, recipe
from train.data import encode, stream

pytestmark = pytest.mark.core


class Words:
    """One token a character, and a chat template like ChatML."""

    chat_template = "ChatML"

    def encode(self, text, add_special_tokens=True):
        return [ord(c) for c in text]

    def apply_chat_template(self, messages, *, add_generation_prompt, tokenize):
        if messages[0]["role"] == "system":
            raise ValueError("no system here")
        text = "".join(f"<{m['role']}>{m['content']}|\n" for m in messages)
        return text + ("<assistant>" if add_generation_prompt else "")


class Unable(Words):
    """Fails where the cache should have been used."""

    def encode(self, text, add_special_tokens=True):
        assert len(text) < 2, "should come from the cache"
        return super().encode(text)


Unable.__name__ = "Words"  # as the cache knows it


def messages(*turns):
    return [{"role": role, "content": content} for role, content in turns]


TEXTS = ["first text, of one kind", "second é text\nof another", "third and last"]
CHAT = messages(("user", "hi"), ("assistant", "yo"), ("user", "a"), ("assistant", "b"))


def write_array_record(path, lines):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for line in lines:
        writer.write(line)
    writer.close()


def write(folder, kind, texts, chats=()):
    """Texts, then chats, as files of a kind."""
    records = [{"text": text} for text in texts] + [{"messages": chat} for chat in chats]
    lines = [json.dumps(record).encode() for record in records]
    folder.mkdir()
    if kind == "txt":
        for number, text in enumerate(texts):
            (folder / f"{number}.txt").write_text(text)
    elif kind == "jsonl":
        (folder / "a.jsonl").write_bytes(b"\n\n".join(lines))
    elif kind == "parquet":
        columns = {name: [record.get(name) for record in records] for name in ("text", "messages")}
        parquet.write_table(pyarrow.table(columns), folder / "a.parquet", row_group_size=2)
    else:
        write_array_record(folder / "a.arrayrecord", lines)
    return folder


def load(path, tmp_path, tokenizer=None):
    return stream.load_documents([path], tokenizer or Words(), tmp_path / "cache")


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.response, other.response)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "arrayrecord"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    found = stream.Rows(load(write(tmp_path / "texts", kind, TEXTS), tmp_path), 8, align=4)
    made = [stream.Document("x", np.asarray([ord(c) for c in t], np.int32), np.ones(len(t), bool)) for t in TEXTS]
    expected = stream.Rows(made, 8, align=4)
    assert len(found) == len(expected)
    for index in range(len(found)):
        for name, value in expected[index].items():
            np.testing.assert_array_equal(found[index][name], value)
            assert found[index][name].dtype == value.dtype
    assert found.largest_token() == ord("é")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrayrecord"])
def test_chats_beside_texts(tmp_path, kind):
    found = load(write(tmp_path / "texts", kind, TEXTS[:1], [CHAT, CHAT[:2]]), tmp_path)
    chats = [encode.chat_document("x", chat, Words()) for chat in (CHAT, CHAT[:2])]
    same(list(found)[1:], chats)
    assert found[0].response.all() and "".join(map(chr, found[0].tokens)) == TEXTS[0]
    assert found[1].name.endswith({"jsonl": "a.jsonl:3"}.get(kind, f"a.{kind}:2"))


def test_chat_loss_is_on_what_the_assistant_says():
    chat = encode.chat_document("x", CHAT, Words())
    text = "".join(map(chr, chat.tokens))
    assert text == Words().apply_chat_template(CHAT, add_generation_prompt=False, tokenize=False)
    assert "".join(c for c, r in zip(text, chat.response, strict=True) if r) == "yo|\nb|\n"
    row = stream.Rows([chat], 64, align=8, response_only=True)[0]
    assert "".join(map(chr, row["targets"][row["mask"]])) == "yo|\nb|\n"


def test_texts_start_with_the_prefix_and_chats_do_not(tmp_path):
    class Starts(Words):
        def encode(self, text, add_special_tokens=True):
            return [7] * add_special_tokens + super().encode(text)

    found = load(write(tmp_path / "texts", "jsonl", TEXTS[:1], [CHAT]), tmp_path, Starts())
    assert [d.prefix for d in found] == [(7,), ()] and 7 not in found[0].tokens
    first = stream.Rows(found, 128, align=8)[0]
    starts = np.flatnonzero(np.diff(first["segment_ids"], prepend=0) > 0)
    assert first["tokens"][starts].tolist() == [7, ord("<")]


class Ends(Words):
    """Closes what it encodes, as `add_eos_token` has it."""

    eos_token_id = 3

    def encode(self, text, add_special_tokens=True):
        return [2, *super().encode(text), 3] if add_special_tokens else super().encode(text)


def test_texts_end_with_the_end_of_text(tmp_path):
    texts = write(tmp_path / "texts", "jsonl", ["some text", "closed\x03", "\x02begun"], [CHAT])
    plain, closed, begun, chat = load(texts, tmp_path, Ends())
    assert [d.tokens[-2:].tolist() for d in (plain, closed, begun)] == [[ord("t"), 3], [ord("d"), 3], [ord("n"), 3]]
    assert [d.prefix for d in (plain, closed, begun, chat)] == [(2,)] * 3 + [()]
    assert begun.tokens[0] == ord("b") and plain.response.all() and 3 not in chat.tokens
    rows = stream.Rows([plain], 4, align=4)
    targets = [rows[i]["targets"].tolist() for i in range(len(rows))]
    assert targets == [[*b"some"], [*b"e te"], [*b"ext", 3]]  # of three pieces the last one ends
    broken = stream.load_documents([texts], Ends(), tmp_path / "cache", end_of_text=False)
    assert [3 in d.tokens for d in broken] == [False, True, False, False]
    assert broken.content_hash() != load(texts, tmp_path, Ends()).content_hash()


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
def test_a_recipe_says_whether_texts_end(tmp_path, end, mixed):
    from train.loop import batches, models, tiny  # here, as processes of `prepare` import this file

    texts = (str(write(tmp_path / "texts", "jsonl", TEXTS)),)
    fields = {"mixture": (stream.Part(texts),)} if mixed else {"texts": texts, "pack": True}
    config = recipe.FinetuneConfig(cache=str(tmp_path / "cache"), seq_length=32, chunk=(8,), end_of_text=end, **fields)
    rows = batches.read_rows(config, models.Pretrained(tiny.CONFIG, None, None, Ends()), config.texts)
    assert sum(int((rows[i]["targets"] == Ends.eos_token_id).sum()) for i in range(len(rows))) == 3 * end


def test_a_file_that_is_named_itself_may_have_any_suffix(tmp_path):
    (tmp_path / "README.md").write_text("# Title")
    assert "".join(map(chr, load(tmp_path / "README.md", tmp_path)[0].tokens)) == "# Title"


def test_a_record_may_hold_any_line_separator_but_the_line_feed(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"text": "a\u2028b\x85c"}\r\n'.encode())
    assert "".join(map(chr, load(tmp_path, tmp_path)[0].tokens)) == "a\u2028b\x85c"


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 5\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"  \n", "a.txt is empty"),
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b"ab\xff", "a.txt is not UTF-8 text: byte 2"),
        ("a.txt", LFS, "a.txt is a Git LFS pointer"),
        ("a.jsonl", LFS, "a.jsonl is a Git LFS pointer"),
        ("a.parquet", LFS, "a.parquet is a Git LFS pointer"),
        ("a.arrayrecord", LFS, "a.arrayrecord is a Git LFS pointer"),
        ("a.jsonl", b"\n \n", "a.jsonl is empty: it has no record"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "a.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', "a.jsonl:2 is not UTF-8 text: byte 10"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1 is not JSON that a text can be in"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl:1 has half a surrogate pair"),
        ("a.jsonl", b'{"text": ""}', "a.jsonl:1 has neither"),
        ("a.jsonl", b'{"text": 3}', "a.jsonl:1 has neither .* remove {'text': 3}"),
        ("a.jsonl", b"[1]", "a.jsonl:1 has neither"),
        ("a.jsonl", b'{"messages": []}', "a.jsonl:1 has no message of the assistant"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}', "a.jsonl:1 has no message of the assistant"),
        ("a.jsonl", b'{"messages": [{"role": "assistant"}]}', 'a.jsonl:1: a message needs a "role" and a "content"'),
        (
            "a.jsonl",
            json.dumps({"messages": messages(("system", "x"), ("assistant", "x"))}).encode(),
            "a.jsonl:1: the tokenizer's chat template does not take this conversation: no system here",
        ),
        ("a.parquet", b"PAR1 and no more", "a.parquet:1 cannot be read as .parquet"),
        ("a.arrayrecord", b"something else", "a.arrayrecord is no whole .arrayrecord file"),
        ("a.bin", b"x", "no .txt, .jsonl, .json, .parquet or .arrayrecord file in"),
    ],
)
def test_bad_files_are_one_clear_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, tmp_path)
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("kind", ["parquet", "arrayrecord"])
def test_truncated_files(tmp_path, kind):
    file = write(tmp_path / "texts", kind, TEXTS) / f"a.{kind}"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"a\.{kind}"):
        load(file, tmp_path)


def test_damaged_records(tmp_path):
    file = tmp_path / "a.arrayrecord"
    write_array_record(file, [b'{"text": "%d"}' % number for number in range(9)])
    content = bytearray(file.read_bytes())
    at = content.index(b'{"text": "4"}')
    content[at] ^= 255
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"a.arrayrecord:\d+ is damaged"):
        load(file, tmp_path)
    write_array_record(file, [b'{"text": "x"}', b"{"])
    with pytest.raises(ValueError, match="a.arrayrecord:2 is not JSON"):
        load(file, tmp_path)
    write_array_record(file, [])
    with pytest.raises(ValueError, match="a.arrayrecord is empty: it has no record"):
        load(file, tmp_path)


def test_parquet_columns_and_rows(tmp_path):
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"words": ["x"], "id": [1]}), file)
    with pytest.raises(ValueError, match="a.parquet has no column of messages, .*, text, .*; it has words, id"):
        load(file, tmp_path)
    parquet.write_table(pyarrow.table({"text": ["x", None]}), file)
    with pytest.raises(ValueError, match="a.parquet:2 has neither"):
        load(file, tmp_path)
    parquet.write_table(pyarrow.table({"text": pyarrow.array([b"x", b"ab\xff"]).view(pyarrow.string())}), file)
    with pytest.raises(ValueError, match="a.parquet:2 is not UTF-8 text: byte 2"):
        load(file, tmp_path)
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), file)
    with pytest.raises(ValueError, match="a.parquet is empty: it has no record"):
        load(file, tmp_path)


def test_paths_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="no text at"):
        stream.load_documents(["/nowhere"], Words(), None)
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.7 \xe2\xe3")
    with pytest.raises(ValueError, match="a.pdf is not UTF-8 text: byte 9"):
        load(tmp_path / "a.pdf", tmp_path)

    class Silent(Words):
        def encode(self, text, add_special_tokens=True):
            return []

    with pytest.raises(ValueError, match="a.jsonl:1 is empty: the tokenizer makes no token of it"):
        load(write(tmp_path / "texts", "jsonl", TEXTS), tmp_path, Silent())


def test_tokens_are_made_once(tmp_path):
    texts = write(tmp_path / "texts", "jsonl", TEXTS, [CHAT])
    first = load(texts, tmp_path)
    assert len(list((tmp_path / "cache").iterdir())) == 3
    again = load((texts / "a.jsonl").rename(tmp_path / "moved.jsonl"), tmp_path, Unable())
    same(first, again)
    assert first.content_hash() == again.content_hash()
    assert isinstance(again._shards[0].words.base, np.memmap)


def test_another_tokenizer_or_template_has_other_tokens(tmp_path):
    class Other(Words):
        chat_template = "another"

    class Third(Words):
        def get_vocab(self):
            return {"a": 1}

    Other.__name__ = Third.__name__ = "Words"
    texts = write(tmp_path / "texts", "jsonl", TEXTS)
    assert len({load(texts, tmp_path, kind()).content_hash() for kind in (Words, Other, Third)}) == 3


@pytest.mark.parametrize("part", ["tokens.npy", "documents.npy", "json"])
@pytest.mark.parametrize("damage", ["truncated", "emptied", "missing"])
def test_a_cache_that_is_not_whole_is_made_again(tmp_path, part, damage):
    texts = write(tmp_path / "texts", "jsonl", TEXTS, [CHAT])
    first = [encode.Document(d.name, d.tokens.copy(), d.response.copy()) for d in load(texts, tmp_path)]
    (file,) = (tmp_path / "cache").glob(f"*.{part}")
    size = file.stat().st_size
    os.unlink(file) if damage == "missing" else os.truncate(file, size - 4 if damage == "truncated" else 0)
    same(first, load(texts, tmp_path))
    assert file.stat().st_size == size and len(list((tmp_path / "cache").iterdir())) == 3
    same(first, load(texts, tmp_path, Unable()))


def test_a_full_disk_is_one_error_and_older_files_stay(tmp_path, monkeypatch):
    load(write(tmp_path / "old", "txt", TEXTS), tmp_path)
    before = sorted((tmp_path / "cache").iterdir())
    new = write(tmp_path / "new", "jsonl", [text * 1000 for text in TEXTS])

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("numpy.save", "os.replace"):
        with (
            monkeypatch.context() as patch,
            pytest.raises(ValueError, match=r"a.jsonl in cache=.*No space left on device"),
        ):
            patch.setattr(name, full)
            load(new, tmp_path)
        assert sorted((tmp_path / "cache").iterdir()) == before
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (10_000, limits[1])
        )  # files end here: tokens are cut off while written
        with pytest.raises(
            ValueError, match=r"cannot keep the tokens of .*a.jsonl in cache=.*set cache to another folder"
        ):
            load(new, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted((tmp_path / "cache").iterdir()) == before
    load(tmp_path / "old", tmp_path, Unable())
    assert len(load(new, tmp_path)) == 3


def test_prepare_tokenises_in_other_processes(tmp_path):
    texts = [write(tmp_path / kind, kind, TEXTS) for kind in ("jsonl", "parquet", "txt")]
    paths, cache = [str(path) for path in texts], tmp_path / "cache"
    assert prepare.prepare(paths, Ends(), cache, 2, end_of_text=False) == 5
    assert prepare.prepare(paths, Ends(), cache, 2, end_of_text=False) == 0
    made = sorted(cache.iterdir())
    found = stream.load_documents(paths, Ends(), cache, end_of_text=False)
    assert len(found) == 9 and found.largest_token() == ord("é") and sorted(cache.iterdir()) == made
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(ValueError, match="bad.jsonl:1 is not JSON"):
        prepare.prepare([str(tmp_path / "bad.jsonl")], Words(), cache, 2)


def test_prepare_command(tmp_path, capsys, error_of):
    texts = write(tmp_path / "texts", "jsonl", TEXTS)
    (tmp_path / "recipe.py").write_text(
        f"from train.recipe import FinetuneConfig\nconfig = FinetuneConfig(model='tiny', texts=({str(texts)!r},))"
    )
    for made in (1, 0):
        prepare.main([str(tmp_path / "recipe.py"), "--cache", str(tmp_path / "cache")])
        assert f"3 documents, 62 tokens in {tmp_path / 'cache'}; {made} files" in capsys.readouterr().out
    assert error_of(prepare.main, []).startswith("error: the recipe names no model, or no texts")
    part = stream.Part(("b",))
    config = recipe.FinetuneConfig(mixture=(part,), eval_texts=("c",))
    assert config.packed and prepare.texts(config) == ["b", "c"]
    config = dataclasses.replace(config, texts=("a",))  # these take the mixture's place
    assert not config.packed and prepare.texts(config) == ["a", "c"]
