"""Documents to batches: what is in a row, what the loss is on, shares of a mixture, and that the stream resumes."""

import collections
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data import packing
from train.data import stream as stream_lib
from train.loop import tiny

pytestmark = pytest.mark.core


def document(count, seed=0):
    tokens = np.random.default_rng(seed).integers(1, 99, count).astype(np.int32)
    return stream_lib.Document(f"d{seed}", tokens, np.ones(count, bool))


def test_rows_are_cut_from_single_documents():
    documents = [document(25, 0), document(9, 1), document(17, 2)]
    rows = stream_lib.Rows(documents, 8)
    assert len(rows) == 3 + 1 + 2
    for row, (index, start) in zip(
        (rows[i] for i in range(6)), [(0, 0), (0, 8), (0, 16), (1, 0), (2, 0), (2, 8)], strict=True
    ):
        np.testing.assert_array_equal(row["tokens"], documents[index].tokens[start : start + 8])
        np.testing.assert_array_equal(row["targets"], documents[index].tokens[start + 1 : start + 9])
        assert row["mask"].all() and (row["segment_ids"] == 1).all()


def test_packed_rows_align_and_lose_nothing():
    documents = [document(n, n) for n in (5, 30, 2, 17, 9, 12)]
    rows = stream_lib.Rows(documents, 16, align=4)
    pairs = []
    for row in (rows[i] for i in range(len(rows))):
        starts = np.flatnonzero(np.diff(row["segment_ids"], prepend=0) > 0)
        assert not np.any(starts % 4)
        assert row["segment_ids"].max() == len(starts)
        np.testing.assert_array_equal(row["mask"], row["segment_ids"] > 0)
        pairs += list(zip(row["tokens"][row["mask"]], row["targets"][row["mask"]], strict=True))
    given_pairs = [pair for d in documents for pair in zip(d.tokens[:-1], d.tokens[1:], strict=True)]
    assert collections.Counter(pairs) == collections.Counter(given_pairs)
    assert rows.padding == pytest.approx(1 - len(pairs) / (16 * len(rows)))


def test_every_piece_starts_with_the_prefix():
    plain = document(21)
    rows = stream_lib.Rows([stream_lib.Document("x", plain.tokens, plain.response, prefix=(100,))], 8)
    got = [rows[i] for i in range(len(rows))]
    assert len(got) == 2
    for row, start in zip(got, (0, 7), strict=True):
        np.testing.assert_array_equal(row["tokens"], [100, *plain.tokens[start : start + 7]])
        np.testing.assert_array_equal(row["targets"], plain.tokens[start : start + 8])


def test_stream_resumes_exactly_and_reshuffles():
    rows = stream_lib.Rows([document(8 * 7 + 1)], 8)
    stream = stream_lib.Stream(rows, 2, seed=3)
    seen = [next(stream)["tokens"] for _ in range(4)]
    state = json.loads(json.dumps(stream.state()))
    rest = [next(stream)["tokens"] for _ in range(6)]
    again = stream_lib.Stream(rows, 2, seed=3)
    again.restore(state)
    np.testing.assert_array_equal(rest, [next(again)["tokens"] for _ in range(6)])
    order = np.concatenate(seen + rest)[:14, 0].tolist()
    assert sorted(order[:7]) == sorted(order[7:]) and order[:7] != order[7:]


def test_batches_of_one_row():
    assert next(stream_lib.Stream(stream_lib.Rows([document(17)], 8), 1, seed=0))["tokens"].shape == (1, 8)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_together_load_the_batch_of_one(processes):
    rows = stream_lib.Rows([document(8 * 7 + 1)], 8)
    one, share = stream_lib.Stream(rows, 4, seed=5), 4 // processes
    parts = [stream_lib.Stream(rows, 4, seed=5, local=slice(p * share, (p + 1) * share)) for p in range(processes)]
    for _ in range(3):
        whole, pieces = next(one), [next(part) for part in parts]
        for name, value in whole.items():
            np.testing.assert_array_equal(value, np.concatenate([piece[name] for piece in pieces]))
    states = [part.state() for part in parts]
    assert states == [one.state()] * processes == [{"step": 3}] * processes
    resumed = stream_lib.Stream(rows, 4, seed=5)
    resumed.restore(states[-1])
    np.testing.assert_array_equal(next(resumed)["tokens"], next(one)["tokens"])


def test_local_rows_by_number():
    rows = stream_lib.Rows([document(8 * 7 + 1)], 8)
    some = next(stream_lib.Stream(rows, 6, seed=5, local=[0, 1, 5]))["tokens"]
    np.testing.assert_array_equal(some, next(stream_lib.Stream(rows, 6, seed=5))["tokens"][[0, 1, 5]])


def test_content_hash_tells_data_and_settings_apart():
    first, second = document(80, 0), document(80, 1)
    quiet = stream_lib.Document("quiet", first.tokens, np.arange(80) % 2 == 0)
    starting = stream_lib.Document("starting", first.tokens, first.response, (100,))
    rows = [
        stream_lib.Rows([first, second], 8),
        stream_lib.Rows([second, first], 8),
        stream_lib.Rows([first], 8),
        stream_lib.Rows([quiet], 8),
        stream_lib.Rows([starting], 8),
        stream_lib.Rows([first], 16),
        stream_lib.Rows([first], 8, align=4),
        stream_lib.Rows([first], 8, align=4, piece=4),
        stream_lib.Rows([first], 8, response_only=True),
    ]
    assert len({each.content_hash() for each in rows}) == len(rows)
    assert stream_lib.Rows([first, second], 8).content_hash() == rows[0].content_hash()


def test_pieces_are_no_longer_than_asked():
    rows = stream_lib.Rows([document(70), document(3, 1)], 24, align=4, piece=8)
    assert len(rows) == 4 and rows.padding == pytest.approx(1 - 71 / 96)
    for row in (rows[i] for i in range(4)):
        _, counts = np.unique(row["segment_ids"][row["segment_ids"] > 0], return_counts=True)
        assert counts.max() <= 8


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=12),
    st.integers(0, 2),
    st.integers(3, 20),
    st.integers(0, 2**12 - 1),
)
def test_cutting_is_what_a_loop_does(lengths, prefix, longest, prefixed):
    extra = prefix * (prefixed >> np.arange(len(lengths)) & 1)
    expected = [
        (index, start, min(longest, extra[index] + n - 1 - start))
        for index, n in enumerate(lengths)
        for start in range(0, n - 1, longest - extra[index])
    ]
    assert list(zip(*packing.cut(np.asarray(lengths), extra, longest), strict=True)) == expected


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 10), max_size=60), st.integers(10, 14))
def test_packing_fits_and_wastes_little(sizes, room):
    rows = packing.pack(np.asarray(sizes, np.int64), room)
    filled = np.bincount(rows, sizes)
    assert (filled <= room).all() and (filled > 0).all()
    assert np.sum(2 * filled <= room) <= 1  # two rows that are at most half full would have been one


def mixture(folder, parts, length=16, align=4):
    return stream_lib.Mixture(parts, length, tiny.ByteTokenizer(), folder / "cache", align=align)


@pytest.fixture
def parts(tmp_path):
    """Long rows of "a", short pieces of "b", chats whose responses are "c"."""
    rng = np.random.default_rng(0)
    for name, letters in (("long", "ABCDEFGH"), ("short", "abcdefgh")):
        (tmp_path / f"{name}.txt").write_text("".join(rng.choice(list(letters), 16 * 12 + 1)))
    chat = {"messages": [{"role": "user", "content": "1234"}, {"role": "assistant", "content": "567"}]}
    (tmp_path / "chat.jsonl").write_text(f"{json.dumps(chat)}\n" * 5)
    files = {name: (str(tmp_path / name),) for name in ("long.txt", "short.txt", "chat.jsonl")}
    return (
        stream_lib.Part(files["long.txt"], weight=3),
        stream_lib.Part(files["short.txt"], weight=2, piece=4),
        stream_lib.Part(files["chat.jsonl"], weight=1, response_only=True),
    )


def test_mixture_has_its_shares_and_every_part_all_its_rows_each_epoch(tmp_path, parts):
    mixed = mixture(tmp_path, parts)
    stream = stream_lib.Stream(mixed, 8, seed=1)
    batches = [next(stream) for _ in range(75)]
    tokens = np.concatenate([batch["tokens"] for batch in batches])
    segments = np.concatenate([batch["segment_ids"] for batch in batches])
    kinds = np.select([np.isin(tokens[:, 0], list(b"ABCDEFGH")), segments.max(1) == 4], [0, 1], 2)
    np.testing.assert_allclose(np.bincount(kinds) / len(kinds), [1 / 2, 1 / 3, 1 / 6], atol=2 / len(kinds))
    for kind, rows in enumerate(mixed.parts):
        own = [tuple(row) for row in tokens[kinds == kind]]
        epochs = [own[at : at + len(rows)] for at in range(0, len(own) - len(rows) + 1, len(rows))]
        everything = collections.Counter(tuple(rows[i]["tokens"]) for i in range(len(rows)))
        assert len(epochs) > 2 and all(collections.Counter(epoch) == everything for epoch in epochs)
        assert kind == 2 or epochs[0] != epochs[1]


def test_mixture_masks_and_cuts_each_part_its_own_way(tmp_path, parts):
    mixed = mixture(tmp_path, parts)
    long, short, chat = (rows[0] for rows in mixed.parts)
    assert long["mask"].all() and (long["segment_ids"] == 1).all()
    np.testing.assert_array_equal(short["segment_ids"], np.repeat([1, 2, 3, 4], 4))
    assert bytes(chat["targets"][chat["mask"]].tolist()).startswith(b"567\n"[: chat["mask"].sum()])
    assert len(mixed) == sum(map(len, mixed.parts)) and mixed.largest_token() == ord("u")
    np.testing.assert_array_equal(mixed[len(mixed.parts[0])]["tokens"], short["tokens"])
    assert 0 <= mixed.padding < 0.2


def test_mixture_resumes_with_another_number_of_processes(tmp_path, parts):
    mixed = mixture(tmp_path, parts)
    two = [stream_lib.Stream(mixed, 6, seed=2, local=half) for half in (slice(0, 3), slice(3, 6))]
    for _ in range(4):
        [next(each) for each in two]
    one = stream_lib.Stream(mixture(tmp_path, parts), 6, seed=2)
    one.restore(json.loads(json.dumps(two[0].state())))
    for _ in range(4):
        halves = [next(each)["tokens"] for each in two]
        np.testing.assert_array_equal(next(one)["tokens"], np.concatenate(halves))
    other = stream_lib.Stream(mixed, 24, seed=3)
    assert not np.array_equal(next(other)["tokens"], next(stream_lib.Stream(mixed, 24, seed=2))["tokens"])


def test_mixture_hash_depends_on_weights_and_parts(tmp_path, parts):
    heavier = (stream_lib.Part(parts[0].texts, weight=4), *parts[1:])
    mixtures = [mixture(tmp_path, each) for each in (parts, parts[::-1], parts[:2], heavier)]
    assert len({each.content_hash() for each in mixtures}) == 4
    assert mixture(tmp_path, parts).content_hash() == mixtures[0].content_hash()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": 0.0}, r"long.txt'.*weight=0.0 must be positive"),
        ({"weight": float("nan")}, "weight=nan must be positive"),
        ({"texts": ()}, r"\(\): it has no texts"),
        ({"piece": 32}, "long.txt'.*piece=32 must be from 1 to seq_length=16"),
        ({"texts": ("/nowhere",)}, "no text at /nowhere"),
    ],
)
def test_a_bad_part_is_named(tmp_path, parts, fields, message):
    bad = {"texts": parts[0].texts, **fields}
    with pytest.raises(ValueError, match=f"the part of the mixture with texts=.*{message}"):
        mixture(tmp_path, [*parts[1:], stream_lib.Part(**bad)])


def test_a_part_without_rows_is_named(tmp_path, parts):
    with pytest.raises(ValueError, match=r"long.txt'.*no document has seq_length \+ 1 = 4001 tokens"):
        mixture(tmp_path, parts[:1], length=4000, align=None)
    with pytest.raises(ValueError, match="at least one part"):
        mixture(tmp_path, [])


def test_tokens_beyond_the_vocabulary_are_an_error():
    rows = stream_lib.Rows([stream_lib.Document("x", np.asarray([3, 250, 4]), np.ones(3, bool), prefix=(7,))], 2)
    stream_lib.check_tokenizer(251, rows.largest_token())
    with pytest.raises(ValueError, match=r"the texts have token 250, and the model's vocab_size=250"):
        stream_lib.check_tokenizer(250, rows.largest_token())


def test_other_errors():
    with pytest.raises(ValueError, match=r"no document has seq_length \+ 1 = 9 tokens \(the longest has 8\)"):
        stream_lib.Rows([document(8)], 8)
    with pytest.raises(ValueError, match="seq_length=10 is not a multiple of the chunk 4"):
        stream_lib.Rows([document(80)], 10, align=4)
    with pytest.raises(
        ValueError, match="piece=4 must be from 1 to seq_length=8, and shorter than that only with pack"
    ):
        stream_lib.Rows([document(80)], 8, piece=4)
    with pytest.raises(ValueError, match="a piece of 1 tokens has no room beside the 1 tokens"):
        stream_lib.Rows([stream_lib.Document("x", np.arange(9), np.ones(9, bool), (1,))], 8, align=4, piece=1)
    with pytest.raises(ValueError, match="with prefixes"):
        stream_lib.Rows([stream_lib.Document("x", np.arange(9), np.ones(9, bool), (start,)) for start in (1, 2)], 8)
    rows = stream_lib.Rows([document(9)], 8)
    for local in ([1], slice(0, 2), slice(1, 1), [-1], []):
        with pytest.raises(ValueError, match="must be some rows of a batch of 1"):
            stream_lib.Stream(rows, 1, seed=0, local=local)
    with pytest.raises(ValueError, match="1 rows in batches of 0"):
        stream_lib.Stream(rows, 0, seed=0)
    with pytest.raises(IndexError, match="row 1 of 1"):
        rows[1]
