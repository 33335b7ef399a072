"""The recall tasks: what the rows hold, and that the answer lies where only a memory can reach."""

import dataclasses

import jax
import numpy as np
import pytest

from train import needle, recall


class WordTokenizer:
    """One token per word or mark, a leading blank included."""

    def __init__(self):
        self.ids: dict[str, int] = {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        del add_special_tokens
        return [self.ids.setdefault(word, len(self.ids)) for word in text.replace(".", " .").split()]


def test_pairs_are_asked_once_each_beyond_the_windows():
    config = recall.RecallConfig(batch=5)
    tokens, asked = (np.asarray(x) for x in recall.sequences(config, jax.random.key(0)))
    begin = recall.lead_in(config)
    assert begin >= config.model.sinks
    length = begin + 4 * config.pairs + config.gap
    assert tokens.shape == asked.shape == (5, length)
    assert (asked.sum(axis=1) == config.pairs).all()
    for row, positions in zip(tokens, asked, strict=True):
        told = dict(row[begin : begin + 2 * config.pairs].reshape(-1, 2).tolist())
        questions = np.flatnonzero(positions)
        assert len(told) == config.pairs
        assert sorted(row[questions]) == sorted(told)
        assert [told[row[at]] for at in questions] == row[questions + 1].tolist()
        noise = np.append(row[:begin], row[begin + 2 * config.pairs :][: config.gap])
        assert (noise >= config.keys + config.values).all()
    reach = config.model.n_layers * (config.model.window - 1)
    assert config.gap > reach


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="keys=3"):
        recall.RecallConfig(keys=3)
    with pytest.raises(ValueError, match="reach of n_layers"):
        recall.RecallConfig(gap=14)


def test_training_counts_steps():
    tiny = recall.TinyModel(d_model=16, d_mem=8)
    row = recall.train(dataclasses.replace(recall.RecallConfig(steps=3, batch=4), model=tiny), "swa")
    assert (row["steps"], len(row["curve"])) == (3, 3)
    assert 0 <= row["accuracy"] <= 1


def test_needles_lie_before_the_window():
    tokenizer = WordTokenizer()
    book = np.arange(10_000, 10_500, dtype=np.int32)
    rows = needle.Rows([book], tokenizer, 96, window=48, count=8, seed=3)
    secrets = set()
    for index in range(8):
        row = rows[index]
        assert row["tokens"].shape == row["targets"].shape == (96,)
        assert row["mask"].tolist() == [False] * 95 + [True]
        np.testing.assert_array_equal(row["tokens"], rows[index]["tokens"])
        np.testing.assert_array_equal(row["tokens"][1:], row["targets"][:-1])
        answer = row["targets"][-1]
        (place,) = np.flatnonzero(row["tokens"] == answer)
        assert place < 96 - 48
        names = {index: word for word, index in tokenizer.ids.items()}
        told = [names.get(token) for token in row["tokens"][place - 6 : place + 4].tolist()]
        assert [*told[:4], *told[5:6]] == ["The", "secret", "word", "of", "is"]
        assert told[7:] == [".", "Remember", "it"]
        asked = [names.get(token) for token in row["tokens"][-6:].tolist()]
        assert [*asked[:4], asked[5]] == ["The", "secret", "word", "of", "is"]
        secrets.add(names[int(answer)])
    assert secrets <= set(needle.WORDS)
    assert len(secrets) > 1


def test_needles_that_cannot_fit_are_refused():
    book = np.arange(10_000, 10_500, dtype=np.int32)
    with pytest.raises(ValueError, match="seq_length=56 leaves no room"):
        needle.Rows([book], WordTokenizer(), 56, window=48, count=1, seed=0)[0]
    with pytest.raises(ValueError, match="no book is longer than seq_length=600"):
        needle.Rows([book], WordTokenizer(), 600, window=48, count=1, seed=0)


def test_needle_data_is_part_of_a_runs_identity():
    book = np.arange(10_000, 10_500, dtype=np.int32)
    make = lambda **changes: needle.Rows(  # noqa: E731
        [book], WordTokenizer(), **({"length": 96, "window": 48, "count": 8, "seed": 3} | changes)
    )
    assert make().content_hash() == make().content_hash() != make(seed=4).content_hash()
