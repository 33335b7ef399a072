"""Lessons: rows whose answers stand in their own text, and a loss that takes the text's word for them."""

import dataclasses
import re
from pydoc_data import topics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from allmem_jax.evaluation import questions
from train import finetune
from train.data import documents, encode, lessons, stream
from train.loop import metrics, steps, tiny
from train.recipe import FinetuneConfig

LENGTH = 1200  # bytes


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Real English prose: the documentation that comes with Python."""
    folder = tmp_path_factory.mktemp("lessons")
    for name, words in topics.topics.items():
        (folder / f"{name}.txt").write_text(words, encoding="ascii", errors="ignore")
    return folder


@pytest.fixture(scope="module")
def read(texts, tmp_path_factory):
    return stream.load_documents((str(texts),), tiny.ByteTokenizer(), str(tmp_path_factory.mktemp("cache")))


def make(read, share=1.0, seed=0, **options):
    return lessons.Lessons(read, tiny.ByteTokenizer(), LENGTH, share=share, seed=seed, **options)


def spans(row):
    """(start, stop) among the targets of each answer of a row."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row["answers"].astype(int), [0]])))
    return edges.reshape(-1, 2).tolist()


def whole(row):
    return bytes([*row["tokens"].tolist(), int(row["targets"][-1])]).decode()


@pytest.mark.parametrize("kind", lessons.KINDS)
def test_every_answer_stands_in_the_text_before_the_first_question(read, kind):
    rows = make(read, kinds=(kind,))
    counts = []
    for index in range(12):
        row = rows[index]
        text = whole(row)
        found = spans(row)
        if kind == "clues" and not found:  # prose without a name
            assert not row["answers"].any()
            continue
        marks = ("\nQuestion:", "\n\nWhat is", "\n\nWhich", "\n\nHow")  # which prose may have too
        first = max(text.rfind(mark, 0, found[0][0]) for mark in marks)
        for start, stop in found:
            answer = text[start + 1 : stop + 1]  # targets stand one further on
            parts = [answer] if kind == "quotes" else re.findall(r"\w+", answer.replace(" and ", " "))
            assert parts and all(part in text[:first] for part in parts), (index, answer)
        counts.append(len(found))
    assert min(counts) >= 1 and max(counts) >= 2 and len(counts) >= 4


def test_a_name_is_asked_for_by_words_beside_it(read):
    rows = make(read, kinds=("clues",))
    texts = [(whole(rows[index]), spans(rows[index])) for index in range(12)]
    checked = 0
    for text, found in texts:
        for start, stop in found:
            name, asked = text[start + 2 : stop], text[: start + 1]
            clues = re.findall(r'"([a-z]+)"', asked[asked.rindex("What is named with") :])
            prose = text[: text.index("What is named with")].split()
            places = [place for place in range(len(prose)) if " ".join(prose[place:]).startswith(name)]
            near = [prose[max(0, place - lessons.BEFORE) : place + lessons.AFTER] for place in places]
            assert any(set(clues) <= set(words) for words in near), (name, clues)
            checked += len(clues) == lessons.NEAR
    assert checked > 5


def test_rows_are_whole_and_depend_on_seed_and_index_alone(read):
    rows, again, other = make(read), make(read), make(read, seed=1)
    for index in (5, 0, 7):
        row = rows[index]
        for name, value in again[index].items():
            np.testing.assert_array_equal(value, row[name])
        np.testing.assert_array_equal(row["tokens"][1:], row["targets"][:-1])
        assert {len(value) for value in row.values()} == {LENGTH} and row["mask"].all()
    assert (rows[0]["tokens"] != other[0]["tokens"]).any() and rows.content_hash() != other.content_hash()


def test_the_share_of_prose_has_no_answers(read):
    rows = make(read, share=0.5)
    taught = [bool(rows[index]["answers"].any()) for index in range(60)]
    assert 15 < sum(taught) < 45


def test_what_models_are_judged_by_is_not_learned(read):
    rows = make(read)
    learned = set(rows._words) | set(rows._names)
    assert not {word.casefold() for word in learned} & {
        word.casefold() for word in (*questions.WORDS, *questions.NAMES)
    }


def test_rows_too_short_for_a_lesson_are_refused(read):
    rows = lessons.Lessons(read, tiny.ByteTokenizer(), 60, share=1.0, seed=0)
    with pytest.raises(ValueError, match="seq_length=60 is too short for lessons: one of '.*' takes"):
        for index in range(20):
            rows[index]


def test_texts_without_words_are_refused():
    document = encode.Document("numbers", np.full(5000, ord("7"), np.int32), np.ones(5000, bool))
    with pytest.raises(ValueError, match="the texts have 0 words and 0 names"):
        make(documents.in_memory([document]))
    with pytest.raises(ValueError, match="no text is longer than seq_length"):
        make(
            documents.in_memory(
                [dataclasses.replace(document, tokens=document.tokens[:9], response=document.response[:9])]
            )
        )


@pytest.mark.parametrize("positions", [1.0, 0.25])
def test_answers_are_always_drawn_and_weighed_by_themselves(positions):
    rng = np.random.default_rng(0)
    shape, window, sinks = (3, 64), jnp.int32(20), jnp.int32(2)
    mask, answers = rng.random(shape) < 0.8, rng.random(shape) < 0.1
    zeros = jnp.zeros(shape, jnp.int32)
    batch = steps.Batch(zeros, zeros, jnp.asarray(mask), answers=jnp.asarray(answers))
    loss = steps.Loss(positions=positions, inside_weight=0.5, answer_weight=3.0)
    drawn = steps.draw_positions(jax.random.key(0), loss, batch, window, sinks)
    for row in range(len(mask)):
        here = np.asarray(drawn.at[row])[np.asarray(drawn.answer[row])]
        assert sorted(here.tolist()) == np.flatnonzero(answers[row] & mask[row]).tolist()
    weight = np.asarray(drawn.weight)
    np.testing.assert_allclose(weight[np.asarray(drawn.answer)].sum(), 3.0, rtol=1e-6)
    np.testing.assert_allclose(weight[~np.asarray(drawn.answer)].sum(), 1.0, rtol=1e-6)
    counts = steps.count_positions(drawn)
    assert counts["answers"] == (answers & mask).sum() and counts["all"] == counts["inside"] + counts["beyond"]


def test_a_run_learns_from_lessons_and_goes_on(texts, tmp_path):
    recipe = FinetuneConfig(
        model="tiny",
        texts=(str(texts),),
        out=str(tmp_path / "run"),
        cache=str(tmp_path / "cache"),
        lessons=0.8,
        answer_weight=2.0,
        steps=4,
        batch=2,
        seq_length=400,
        window=(32, 64),
        sinks=(2, 2),
        chunk=(16,),
        d_mem=8,
        read_out="difference",
        alpha_init=0.1,
        warmup=1,
        checkpoint_every=2,
        export=False,
        tensorboard=False,
    )
    finetune.run(recipe)
    lines = metrics.read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == 4
    for line in lines:
        total = line["kl_beyond"] if np.isnan(line["kl_inside"]) else line["loss"] - 2 * line["ce_answers"]
        assert np.isfinite(total) and line["teacher_ce_answers"] > 0 and line["skipped"] == 0
        assert (
            min(line["kl_beyond"], line["kl_inside"]) - 1e-3
            <= total
            <= max(line["kl_beyond"], line["kl_inside"]) + 1e-3
        )
    with pytest.raises(ValueError, match="kinds=.'songs',. must be one or more of facts, pairs"):
        dataclasses.replace(recipe, kinds=("songs",)).check()
    with pytest.raises(ValueError, match="lessons=0.8 must be from 0 to 1, and needs texts without pack"):
        dataclasses.replace(recipe, pack=True).check()
