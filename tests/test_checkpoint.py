"""Saving and restoring: values, atomicity, and one clear error for a checkpoint of another run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.loop import checkpoint


def arrays(seed=0, width=3):
    memory = {"kernel": jax.random.normal(jax.random.key(seed), (2, width)), "scale": jnp.ones(4, jnp.bfloat16)}
    return {"memory": memory, "optimizer": optax.adamw(1e-3).init(memory), "skipped": jnp.asarray(seed, jnp.int32)}


def same(got, want):
    jax.tree.map(lambda a, b: (np.testing.assert_array_equal(a, b), a.dtype == b.dtype or pytest.fail()), got, want)


def test_round_trip_keeps_the_newest(tmp_path):
    with checkpoint.Checkpoints(tmp_path / "run", {"rate": 0.1}, keep=2) as run:
        assert run.restore(arrays()) is None
        for step in (1, 2, 3):
            run.save(step, arrays(step), {"next": step})
        run.wait()
        assert run.steps == [2, 3]
        run.save(3, arrays(9), {})  # there already: stays
    with checkpoint.Checkpoints(tmp_path / "run", {"rate": 0.1}) as run:
        step, restored, record = run.restore(arrays())
        assert (step, record) == (3, {"next": 3})
        same(restored, arrays(3))
        assert run.restore(arrays(), step=2)[2] == {"next": 2}


@pytest.mark.parametrize(
    ("identity", "width", "message"),
    [
        ({"rate": 0.2, "backbone": "abc"}, 3, "rate is 0.1 there and 0.2 here"),
        ({"rate": 0.1, "backbone": "xyz"}, 3, "backbone is abc there and xyz here"),
        (
            {"rate": 0.1, "backbone": "abc"},
            5,
            r"memory/kernel is float32\[2, 3\] there and float32\[2, 5\] here",
        ),
    ],
)
def test_another_run_is_one_error(tmp_path, identity, width, message):
    with checkpoint.Checkpoints(tmp_path, {"rate": 0.1, "backbone": "abc"}) as run:
        run.save(1, arrays(), {})
    with checkpoint.Checkpoints(tmp_path, identity) as run:
        with pytest.raises(checkpoint.CheckpointMismatch, match=message):
            run.restore(arrays(width=width))
        assert run.steps == [1]


def test_half_written_steps_are_removed(tmp_path):
    with checkpoint.Checkpoints(tmp_path, {}) as run:
        run.save(1, arrays(), {})
    left = tmp_path / "2.orbax-checkpoint-tmp-0"
    left.mkdir()
    (left / "half").write_text("x")
    with checkpoint.Checkpoints(tmp_path, {}) as run:
        assert run.steps == [1]
        run.save(2, arrays(2), {})
        run.wait()
        assert not left.exists()
        same(run.restore(arrays())[1], arrays(2))


def test_content_hash_depends_on_values_names_and_types():
    tree = {"a": np.arange(4.0, dtype=np.float32), "b": {"c": np.ones((2, 2), np.int32)}}
    first = checkpoint.content_hash(tree)
    assert first == checkpoint.content_hash(jax.tree.map(jnp.asarray, tree))
    others = [
        {**tree, "a": tree["a"] + 1},
        {**tree, "a": tree["a"].reshape(2, 2)},
        {**tree, "a": tree["a"].view(np.int32)},
        {"z": tree["a"], "b": tree["b"]},
    ]
    assert len({first, *map(checkpoint.content_hash, others)}) == 5


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="keep=0"):
        checkpoint.Checkpoints(tmp_path, {}, keep=0)
