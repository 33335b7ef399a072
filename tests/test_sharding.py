"""Rules over parameter paths, without devices; and one placement on four CPU devices in another process."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from allmem_jax.model import sharding
from tests import compiling

pytestmark = pytest.mark.core
MESH = AbstractMesh((2, 2, 4, 1), sharding.AXES)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("embed/embedding", (64, 16), P("tensor", "fsdp")),
        ("embed/embedding", (63, 16), P(None, "fsdp")),  # 63 rows do not divide by 4
        ("layers/attention/q_proj/kernel", (3, 16, 32), P(None, "fsdp", "tensor")),
        ("layers/attention/o_proj/kernel", (3, 32, 16), P(None, "tensor", "fsdp")),
        ("layers/mlp/down_proj/kernel", (3, 32, 16), P(None, "tensor", "fsdp")),
        ("layers/memory/out_proj/kernel", (3, 32, 16), P(None, "tensor", "fsdp")),
        ("layers/memory/lr_proj/kernel", (3, 16, 12), P(None, "fsdp", None)),
        ("layers/memory/fast_up", (3, 4, 8, 4), P(None, "tensor", None, None)),
        ("layers/memory/alpha", (3, 16), P()),
        ("lm_head/kernel", (16, 64), P("fsdp", "tensor")),
        ("1/0/mu/layers/memory/v_proj/kernel", (3, 16, 32), P(None, "fsdp", "tensor")),
    ],
)
def test_first_rule_wins(path, shape, spec):
    assert sharding.spec_for(path, shape, MESH) == spec


def test_tree_from_shapes_alone():
    tree = jax.eval_shape(lambda: {"layers": {"mlp": {"up_proj": {"kernel": np.zeros((2, 8, 8))}}}, "count": 0})
    shardings = sharding.tree_shardings(tree, MESH)
    assert shardings["layers"]["mlp"]["up_proj"]["kernel"].spec == P(None, "fsdp", "tensor")
    assert shardings["count"].spec == P()
    assert sharding.batch_sharding(MESH).spec == P(("data", "fsdp"), "context")


def test_one_device_is_a_mesh():
    mesh = sharding.make_mesh()
    value = np.arange(6.0, dtype=np.float32).reshape(1, 2, 3)
    placed = sharding.place({"up_proj": {"kernel": value}}, mesh)
    np.testing.assert_array_equal(placed["up_proj"]["kernel"], value)


def test_wrong_device_count_is_named():
    with pytest.raises(ValueError, match="data=1, fsdp=64, tensor=1, context=1 needs 64 devices and there are"):
        sharding.make_mesh(fsdp=64)


def run_on_four_devices(program):
    flags = {
        "XLA_FLAGS": compiling.on_devices(4),
        "JAX_PLATFORMS": "cpu",
    }
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, **flags}, timeout=300)


def test_kernels_compute_their_own_rows_and_heads():
    """Against one device: outputs and gradients; and the compiled programs gather nothing."""
    run_on_four_devices(SHARDED_CALLS)


SHARDED_CALLS = """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import pallas_kernels
from allmem_jax.model import functional, sharding

rng = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
q, k, v = (normal(4, 24, 4, 8) for _ in range(3))
lr, momentum = jnp.abs(normal(4, 24, 4, 3)) / 10, jax.nn.sigmoid(normal(4, 24, 4))
init = pallas_kernels.FastWeights(normal(4, 16, 8), normal(4, 16, 8), normal(4, 8, 16))
start = pallas_kernels.init_memory_state(init, 4)

def attend(q, k, v, window):
    return functional.attend(q, k[:, :, :2], v[:, :, :2], window=window, sinks=2, segment_ids=None, scale=0.5)

def remember(q, k, v, lr, momentum, init, state):
    return functional.remember(q, k, v, lr, momentum, init, state, chunk=8, valid=None, reset=None)

def decode(q, k, v, keys, values, position, lengths, window):
    q, k, v = q[:, :1], k[:, :1, :2], v[:, :1, :2]
    sizes = {"sink_slots": 2, "window": window, "sinks": 2, "scale": 0.5}
    out = functional.attend_cached(q, k, v, (keys, values), position, lengths, **sizes)
    return out, *(functional.write_cache(x[None], y[None], position, lengths, 2) for x, y in ((keys, k), (values, v)))

def check(function, arguments, where):
    def loss(*arguments):
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(function(*arguments)) if x.dtype == jnp.float32)

    both = jax.value_and_grad(loss, tuple(range(3)))
    want = jax.jit(both)(*arguments)
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(arguments, jax.tree.map(lambda spec: NamedSharding(mesh, spec), where))
        compiled = jax.jit(both).lower(*placed).compile()
        got = compiled(*placed)
    assert "all-gather" not in compiled.as_text()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)

tokens, row_heads = P("fsdp", None, "tensor"), P("fsdp", "tensor")
check(attend, (q, k, v, jnp.int32(5)), (tokens, tokens, tokens, P()))
cache, row = [normal(4, 9, 2, 8) for _ in range(2)], P("fsdp")
counts = jnp.asarray([0, 3, 9, 40], jnp.int32), jnp.asarray([1, 0, 1, 1], jnp.int32)
check(decode, (q, k, v, *cache, *counts, jnp.int32(5)), (*[tokens] * 5, row, row, P()))
weights = pallas_kernels.FastWeights(*[P("tensor")] * 3)
state = pallas_kernels.MemoryState(*[pallas_kernels.FastWeights(*[row_heads] * 3)] * 3, row_heads, P("fsdp"))
check(remember, (q, k, v, lr, momentum, init, start), (*[tokens] * 5, weights, state))
"""


def test_placed_on_four_devices():
    run_on_four_devices("""
import jax, numpy as np
from allmem_jax.model import sharding
mesh = sharding.make_mesh(fsdp=2, tensor=2)
x = sharding.place({"up_proj": {"kernel": np.arange(64.0).reshape(1, 8, 8)}}, mesh)["up_proj"]["kernel"]
assert len(x.addressable_shards) == 4 and x.addressable_shards[0].data.shape == (1, 4, 4)
assert float(jax.jit(lambda x: x.sum())(x)) == 63 * 32
""")
