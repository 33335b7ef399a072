"""What the teacher gave is kept and found again, by the right runs only."""

import dataclasses
import os

import jax
import numpy as np
import pytest

from allmem_jax.model import sharding
from train import finetune
from train.loop import compiled, metrics, models, steps, teacher, tiny
from train.recipe import FinetuneConfig


class Counted:
    """A teacher that gives the same for the same tokens, and counts."""

    calls = 0

    def __call__(self, frozen, batch):
        self.calls += 1
        return jax.numpy.ones((*batch.tokens.shape, tiny.CONFIG.d_model)) * batch.tokens[..., None]


def batch(value, segment=None):
    tokens = jax.numpy.full((2, 8), value, jax.numpy.int32)
    return steps.Batch(tokens, tokens, tokens > 0, None if segment is None else tokens * 0 + segment)


def keep(folder, counted, limit=1e6, config=tiny.CONFIG, origin="hash"):
    return teacher.Kept(counted, folder, limit, config, origin, sharding.make_mesh())


def test_found_by_what_it_depends_on_alone(tmp_path):
    counted = Counted()
    want = keep(tmp_path, counted)({}, batch(1))
    for config in (tiny.CONFIG, tiny.CONFIG.replace(mixer="delta", window=3, chunk=4, read_out="full", write=False)):
        found = keep(tmp_path, counted, config=config)({}, batch(1))
        np.testing.assert_array_equal(found, want)
        assert found.dtype == want.dtype and counted.calls == 1
    others = [
        dict(origin="another"),
        dict(config=tiny.CONFIG.replace(rope_theta=5.0)),
        dict(config=tiny.CONFIG.replace(dtype="bfloat16")),
    ]
    for other in others:
        keep(tmp_path, counted, **other)({}, batch(1))
    for other in (batch(2), batch(1, segment=1), batch(1, segment=2)):
        keep(tmp_path, counted)({}, other)
    assert counted.calls == 1 + len(others) + 3


def test_what_is_damaged_is_made_again(tmp_path):
    counted = Counted()
    want = keep(tmp_path, counted)({}, batch(1))
    (path,) = tmp_path.iterdir()
    for damage in (path.read_bytes()[:50], b""):
        path.write_bytes(damage)
        np.testing.assert_array_equal(keep(tmp_path, counted)({}, batch(1)), want)
    assert counted.calls == 3
    keep(tmp_path, counted)({}, batch(1))
    assert counted.calls == 3


def test_the_folder_stays_within_its_limit(tmp_path):
    counted = Counted()
    first = keep(tmp_path, counted)
    first({}, batch(1))
    (path,) = tmp_path.iterdir()
    limit = 2.5 * path.stat().st_size
    os.utime(path, (1, 1))  # of a run long ago
    now = keep(tmp_path, counted, limit)
    for value in (2, 3, 4):
        now({}, batch(value))
    assert len(list(tmp_path.iterdir())) == 2 and not path.exists()
    before = counted.calls
    again = keep(tmp_path, counted, limit)
    again({}, batch(2)), again({}, batch(3))
    assert counted.calls == before  # the first rows were kept, not the last


def test_what_another_run_removes_meanwhile_is_no_error(tmp_path, monkeypatch):
    keep(tmp_path, Counted())({}, batch(1))
    (path,) = tmp_path.iterdir()
    listed = [path, tmp_path / "removed.safetensors"]
    monkeypatch.setattr(type(tmp_path), "glob", lambda self, pattern: iter(listed))
    keep(tmp_path, Counted())({}, batch(2))
    assert len(list(os.scandir(tmp_path))) == 2


def test_a_control_does_not_pay_for_the_teacher(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(" ".join(np.random.default_rng(0).choice("a bc def ghi".split(" "), 600)))
    recipe = FinetuneConfig(
        model="tiny",
        texts=(str(tmp_path / "text.txt"),),
        out=str(tmp_path / "plain"),
        cache=str(tmp_path / "cache"),
        steps=3,
        batch=2,
        seq_length=48,
        window=(12, 12),
        sinks=(2, 2),
        chunk=(8,),
        d_mem=8,
    )

    def losses(**change):
        out = finetune.run(dataclasses.replace(recipe, **change))
        return [line["loss"] for line in metrics.read_metrics(os.path.join(out, "metrics.jsonl"))]

    plain = losses()
    assert losses(teacher_cache=1e-3, out=str(tmp_path / "first")) == plain
    assert len(list((tmp_path / "cache" / "teacher").iterdir())) == 3
    made = compiled.make
    monkeypatch.setattr(compiled, "make", lambda *args: (_refuse, made(*args)[1]))
    assert losses(teacher_cache=1e-3, out=str(tmp_path / "second")) == plain
    assert len(losses(teacher_cache=1e-3, write=False, out=str(tmp_path / "control"))) == 3
    with pytest.raises(AssertionError, match="asked"):
        losses(teacher_cache=1e-3, seed=1, out=str(tmp_path / "other"))


def _refuse(*args):
    raise AssertionError("the teacher was asked")


def test_random_weights_are_refused(tmp_path):
    recipe = FinetuneConfig(model="tiny", texts=("none",), out=str(tmp_path), teacher_cache=1.0)
    random = models.Pretrained(tiny.CONFIG, None, None, None)
    with pytest.raises(ValueError, match="teacher_cache=1.0 needs a model with weights"):
        finetune.run(recipe, random, rows=[])
