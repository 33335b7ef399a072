"""A training step on eight devices, in every shape of mesh, against the same step on one."""

import pytest

from tests import compiling

pytestmark = pytest.mark.slow

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from allmem_jax.model import config as config_lib, lm, sharding
from train.loop import steps

CONFIG = config_lib.ModelConfig(
    vocab_size=96, d_model=32, n_layers=2, n_heads=8, n_kv_heads=4, head_dim=8, d_ff=64, window=16, sinks=2, chunk=8,
    d_mem=8, delay=True,
)
rng = np.random.default_rng(0)
tokens = rng.integers(0, 96, (8, 65)).astype(np.int32)
segments = np.repeat([1, 2, 3, 0], [16, 24, 16, 8])[None].repeat(8, 0).astype(np.int32)
batch = steps.Batch(tokens[:, :-1], tokens[:, 1:], (rng.random((8, 64)) < 0.8) & (segments > 0), segments)
params = lm.init_params(CONFIG)
params["layers"]["memory"]["alpha"] = jnp.full((2, 32), 0.3)
backbone, memory = lm.split_params(params)
losses = {
    "distill": steps.Loss(positions=0.5, inside_weight=0.5, ce_weight=0.1, block=16),
    "pretrain": steps.Loss(positions=1.0, block=16),
}

def gradient(objective, pieces):
    def both(trained, frozen, batch, window, sinks):
        hidden = steps.teacher_hidden(frozen, CONFIG, batch, pieces) if objective == "distill" else None
        return steps.gradient(
            trained, frozen, CONFIG, losses[objective], batch, hidden, window, sinks, jax.random.key(3), pieces
        )
    return jax.jit(both)

def check(got, want, least=0.0):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * max(np.linalg.norm(b), least), (a, b)

def compare(objective, cases):
    parts = (memory, backbone) if objective == "distill" else (params, {})
    sizes = np.int32(12), np.int32(2)
    want = gradient(objective, 1)(*parts, jax.tree.map(jnp.asarray, batch), *sizes)
    assert float(want[0]) > 0.1
    for shape, pieces in cases:
        mesh = sharding.make_mesh(*shape)
        with jax.set_mesh(mesh):
            placed = jax.device_put(batch, sharding.batch_sharding(mesh))
            got = gradient(objective, pieces)(*sharding.place(parts, mesh), placed, *sizes)
        check(got[:2], want[:2])
        check(got[2], want[2], least=1.0)  # a KL inside the window is a difference of nearly equal numbers

"""
ALONE = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (1, 1, 1, 8)]
MIXED = [(2, 2, 2, 1), (1, 2, 2, 2), (2, 1, 1, 4)]


@pytest.mark.parametrize("shapes", [ALONE, MIXED], ids=["alone", "mixed"])
def test_distillation_on_every_mesh_is_that_of_one_device(shapes):
    """Loss, gradients and metrics; heads that an axis does not divide; a batch in one piece."""
    compiling.run_on_eight_devices(PROGRAM + f"compare('distill', {[(shape, 1) for shape in shapes]})")


def test_pretraining_and_pieces_of_a_batch_too():
    compiling.run_on_eight_devices(
        PROGRAM + "compare('pretrain', [((1, 2, 2, 2), 2)])\ncompare('distill', [((1, 1, 1, 1), 2)])"
    )


def test_tokens_are_exchanged_for_heads():
    """Over `context` no device sees all tokens of a row at full width: only its own tokens, or its own heads."""
    compiling.run_on_eight_devices(
        PROGRAM
        + """
import math, re
from train.loop import plan
from train.recipe import FinetuneConfig
recipe = FinetuneConfig(model="tiny", out="unused", batch=2, seq_length=128, window=(32, 32), sinks=(2, 2), chunk=(16,),
                        d_mem=8, n_mem=4, mesh=(2, 1, 1, 4), loss_block=8)
config = plan.planned_config(recipe).replace(n_heads=8, n_kv_heads=4)
text = plan.compile_step(recipe, config, sharding.make_mesh(*recipe.mesh)).text
exchanged = re.findall(r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute)\\\\(", text)
assert sum(kind == "all-to-all" for _, kind in exchanged) >= 12
for shapes, kind in exchanged:
    for dims in re.findall(r"f32\\\\[([\\\\d,]+)\\\\]", shapes):
        assert kind == "all-to-all" or math.prod(map(int, dims.split(","))) < 128 * config.d_model, (kind, shapes)
""".replace("\\\\", "\\")
    )
