"""Text to batches: what is in a row, what the loss is on, and that the stream resumes exactly."""

import json

import numpy as np
import pytest

from train import data


class Words:
    """One token a character, and a chat template like ChatML."""

    def encode(self, text, add_special_tokens=True):
        return [ord(c) for c in text]

    def apply_chat_template(self, messages, *, add_generation_prompt, tokenize):
        text = "".join(f"<{m['role']}>{m['content']}|\n" for m in messages)
        return text + ("<assistant>" if add_generation_prompt else "")


def document(count, seed=0):
    tokens = np.random.default_rng(seed).integers(1, 99, count).astype(np.int32)
    return data.Document(f"d{seed}", tokens, np.ones(count, bool))


def test_rows_are_cut_from_single_documents():
    documents = [document(25, 0), document(9, 1), document(17, 2)]
    rows = data.Rows(documents, 8)
    assert len(rows) == 3 + 1 + 2
    for row, (index, start) in zip(
        (rows[i] for i in range(6)), [(0, 0), (0, 8), (0, 16), (1, 0), (2, 0), (2, 8)], strict=True
    ):
        np.testing.assert_array_equal(row["tokens"], documents[index].tokens[start : start + 8])
        np.testing.assert_array_equal(row["targets"], documents[index].tokens[start + 1 : start + 9])
        assert row["mask"].all() and (row["segment_ids"] == 1).all()


def test_packed_rows_align_and_lose_nothing():
    documents = [document(n, n) for n in (5, 30, 2, 17, 9, 12)]
    rows = data.Rows(documents, 16, align=4)
    pairs = []
    for row in (rows[i] for i in range(len(rows))):
        starts = np.flatnonzero(np.diff(row["segment_ids"], prepend=0) > 0)
        assert not np.any(starts % 4)
        assert row["segment_ids"].max() == len(starts)
        np.testing.assert_array_equal(row["mask"], row["segment_ids"] > 0)
        pairs += list(zip(row["tokens"][row["mask"]], row["targets"][row["mask"]], strict=True))
    assert pairs == [pair for d in documents for pair in zip(d.tokens[:-1], d.tokens[1:], strict=True)]


def test_every_piece_starts_with_the_prefix():
    plain = document(21)
    rows = data.Rows([data.Document("x", plain.tokens, plain.response, prefix=(100,))], 8)
    got = [rows[i] for i in range(len(rows))]
    assert len(got) == 2
    for row, start in zip(got, (0, 7), strict=True):
        np.testing.assert_array_equal(row["tokens"], [100, *plain.tokens[start : start + 7]])
        np.testing.assert_array_equal(row["targets"], plain.tokens[start : start + 8])


def test_stream_resumes_exactly_and_reshuffles():
    rows = data.Rows([document(8 * 7 + 1)], 8)
    stream = data.Stream(rows, 2, seed=3)
    seen = [next(stream)["tokens"] for _ in range(4)]
    state = json.loads(json.dumps(stream.state()))
    rest = [next(stream)["tokens"] for _ in range(6)]
    again = data.Stream(rows, 2, seed=3)
    again.restore(state)
    np.testing.assert_array_equal(rest, [next(again)["tokens"] for _ in range(6)])
    order = np.concatenate(seen + rest)[:14, 0].tolist()
    assert sorted(order[:7]) == sorted(order[7:]) and order[:7] != order[7:]


def test_batches_of_one_row():
    assert next(data.Stream(data.Rows([document(17)], 8), 1, seed=0))["tokens"].shape == (1, 8)


def test_processes_share_the_rows():
    rows = data.Rows([document(8 * 8 + 1)], 8)
    halves = [next(data.Stream(rows, 4, seed=0, process=p, processes=2))["tokens"] for p in (0, 1)]
    assert len({tuple(row) for row in np.concatenate(halves)}) == 8


def test_chat_loss_is_on_what_the_assistant_says():
    messages = [
        {"role": r, "content": c} for r, c in [("user", "hi"), ("assistant", "yo"), ("user", "a"), ("assistant", "b")]
    ]
    chat = data.chat_document("x", messages, Words())
    text = "".join(map(chr, chat.tokens))
    assert text == Words().apply_chat_template(messages, add_generation_prompt=False, tokenize=False)
    assert "".join(c for c, r in zip(text, chat.response, strict=True) if r) == "yo|\nb|\n"
    row = data.Rows([chat], 64, align=8, response_only=True)[0]
    assert "".join(map(chr, row["targets"][row["mask"]])) == "yo|\nb|\n"


def test_files_and_cache(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/b.txt").write_text("second é")
    (tmp_path / "texts/a.jsonl").write_text(
        '{"text": "first"}\n\n{"messages": [{"role": "assistant", "content": "x"}]}\n'
    )
    documents = data.load_documents([tmp_path / "texts"], Words(), tmp_path / "cache")
    assert ["".join(map(chr, d.tokens)) for d in documents] == ["first", "<assistant>x|\n", "second é"]
    assert len(list((tmp_path / "cache").iterdir())) == 1

    class Broken(Words):
        def encode(self, text, add_special_tokens=True):
            assert not text, "should come from the cache"
            return []

    Broken.__name__ = "Words"
    again = data.load_documents([tmp_path / "texts/b.txt"], Broken(), tmp_path / "cache")
    np.testing.assert_array_equal(again[0].tokens, documents[2].tokens)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"  \n", "a.txt is empty"),
        ("a.txt", b"ab\xff", "a.txt is not UTF-8 text: byte 2"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "a.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"text": ""}', "a.jsonl:1 has neither"),
        ("a.jsonl", b"[1]", "a.jsonl:1 has neither"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}', "a.jsonl:1 has no message of the assistant"),
        ("a.jsonl", b'{"messages": [{"role": "assistant"}]}', 'needs a "role" and a "content"'),
        ("a.bin", b"x", "no .txt or .jsonl file in"),
    ],
)
def test_bad_files_are_one_clear_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.load_documents([tmp_path], Words(), tmp_path / "cache")


def test_other_errors():
    with pytest.raises(ValueError, match=r"no document has seq_length \+ 1 = 9 tokens \(the longest has 8\)"):
        data.Rows([document(8)], 8)
    with pytest.raises(ValueError, match="seq_length=10 is not a multiple of the chunk 4"):
        data.Rows([document(80)], 10, align=4)
    with pytest.raises(ValueError, match="no text at"):
        data.load_documents(["/nowhere"], Words(), None)
    with pytest.raises(ValueError, match="1 rows cannot be shared among 2"):
        data.Stream(data.Rows([document(9)], 8), 1, seed=0, processes=2)
