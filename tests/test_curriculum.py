"""Training in stages: each goes on from the memory of the one before, and the end is one file."""

import dataclasses
from pydoc_data import topics

import numpy as np
import pytest

from allmem_jax.checkpoints import memory_file
from train import curriculum, finetune
from train.loop import models, tiny
from train.recipe import FinetuneConfig

STAGES = (
    dict(steps=3, seq_length=96, window=(8, 8)),
    dict(steps=2, seq_length=160, window=(8, 16), lessons=0.5, delay=True),
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curriculum")
    texts = folder / "texts"
    texts.mkdir()
    for name, words in topics.topics.items():
        (texts / f"{name}.txt").write_text(words, encoding="ascii", errors="ignore")
    return FinetuneConfig(
        model="tiny",
        texts=(str(texts),),
        cache=str(folder / "cache"),
        out=str(folder / "out"),
        start="attention",
        read_out="difference",
        alpha_init=0.1,
        batch=2,
        chunk=(8,),
        sinks=(2, 2),
        warmup=1,
        tensorboard=False,
    )


def test_a_stage_goes_on_from_the_memory_before_it(config, tmp_path):
    path = curriculum.run(config, STAGES, card="what it can do")
    first, second = (models.trained_memory(f"{config.out}/stage-{number}") for number in (1, 2))
    alone = dataclasses.replace(config, **STAGES[1], out=str(tmp_path), export=False)
    start = models.load(alone)
    finetune.run(alone, start._replace(memory=first))
    same = models.trained_memory(tmp_path)["layers"]["memory"]
    np.testing.assert_array_equal(second["layers"]["memory"]["alpha"], same["alpha"])
    untrained = np.abs(same["alpha"] - start.memory["layers"]["memory"]["alpha"]).max()
    assert untrained > np.abs(same["alpha"] - first["layers"]["memory"]["alpha"]).max() > 0
    found, memory = memory_file.load(path, tiny.CONFIG)
    assert (found.window, found.chunk, found.read_out, found.delay) == (16, 8, "difference", True)
    np.testing.assert_array_equal(memory["layers"]["memory"]["alpha"], second["layers"]["memory"]["alpha"])


def test_a_stage_can_write_less_than_the_one_before(config, tmp_path):
    config = dataclasses.replace(config, out=str(tmp_path), learning_rate=1e-12)
    curriculum.run(config, (STAGES[0], STAGES[0] | dict(write_strength=0.25)))
    first, second = (models.trained_memory(tmp_path / f"stage-{number}")["layers"]["memory"] for number in (1, 2))
    np.testing.assert_allclose(second["v_conv"]["kernel"], first["v_conv"]["kernel"] / 4, rtol=1e-5)
    np.testing.assert_allclose(second["v_proj"]["kernel"], first["v_proj"]["kernel"], rtol=1e-5)


def test_a_stage_can_be_averaged_with_an_earlier_one(config, tmp_path):
    stages = STAGES[0], STAGES[0] | dict(average=(1, 0.25)), STAGES[0] | dict(learning_rate=1e-12)
    curriculum.run(dataclasses.replace(config, out=str(tmp_path)), stages)
    trained = (models.trained_memory(tmp_path / f"stage-{number}") for number in (1, 2, 3))
    first, second, third = (memory["layers"]["memory"]["v_proj"]["kernel"] for memory in trained)
    assert np.abs(first - second).max() > 1e-5
    np.testing.assert_allclose(third, 0.25 * first + 0.75 * second, rtol=1e-5, atol=1e-7)


def test_it_goes_on_where_it_was_stopped(config):
    config = dataclasses.replace(config, out=config.out + "-again")
    curriculum.run(config, STAGES[:1])
    curriculum.run(config, STAGES)
    lines = [len(open(f"{config.out}/stage-{number}/metrics.jsonl").readlines()) for number in (1, 2)]
    assert lines == [3, 2]
    with pytest.raises(ValueError, match="learning_rate"):
        curriculum.run(config, (STAGES[0] | dict(learning_rate=0.5), STAGES[1]))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((), "no stages"),
        ((dict(step=3),), "stage 1: no recipe has step"),
        ((dict(steps=3), dict(steps=0)), "stage 2: steps=0"),
        ((dict(steps=3, average=(1, 0.5)),), r"stage 1: average=\(1, 0.5\) must be an earlier stage's number"),
        ((dict(steps=3), dict(steps=3, average=(1, 1.5))), r"stage 2: average=\(1, 1.5\) must be"),
    ],
)
def test_bad_stages_are_named_before_anything_is_trained(config, stages, message):
    with pytest.raises(ValueError, match=message):
        curriculum.run(dataclasses.replace(config, out=config.out + "-bad"), stages)


def test_the_command(config, tmp_path, monkeypatch, capsys):
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("mixture", "out")}
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        f"from train.recipe import FinetuneConfig\nconfig = FinetuneConfig(**{fields!r})\nstages = {STAGES[:1]!r}\n"
    )
    card = tmp_path / "card.md"
    card.write_text("a card")
    curriculum.main([str(recipe), "--out", str(tmp_path / "out"), "--card", str(card)])
    assert capsys.readouterr().out.strip().endswith("memory.safetensors")
    with pytest.raises(SystemExit):
        curriculum.main([str(tmp_path / "none.py")])
    assert "no recipe at" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        curriculum.main(["--steps", "3"])
    assert "no recipe is named" in capsys.readouterr().err
