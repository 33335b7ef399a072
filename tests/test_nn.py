"""`allmem_jax.nn` in models that know nothing of this project, in Linen, NNX and on a mesh; and its layers' laws."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from allmem_jax.model import config as config_lib
from allmem_jax.model import lm
from allmem_jax.nn import Memory, Mixer, WindowedAttention
from tests import compiling

pytestmark = pytest.mark.core

BATCH, LENGTH, WIDTH = 2, 24, 16
ATTENTION = dict(n_heads=4, n_kv_heads=2, head_dim=8, window=8, sinks=2)
MEMORY = dict(n_mem=2, d_mem=8, chunk=4)
LAYERS = [
    WindowedAttention(**ATTENTION),
    Memory(**MEMORY, read_out="full"),
    Mixer(**ATTENTION, **MEMORY, delay=True, qk_norm=True),
]
PARTS = ("attention", "memory")
each_layer = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)


def tokens(seed=0, batch=BATCH):
    return jax.random.normal(jax.random.key(seed), (batch, LENGTH, WIDTH))


@functools.partial(jax.jit, static_argnums=0)
def apply(layer, params, x, state=None, lengths=None, segment_ids=None):
    return layer.apply(params, x, state, lengths=lengths, segment_ids=segment_ids)


def init(layer):
    return jax.jit(layer.init)(jax.random.key(0), tokens())


def relative(got, want):
    return np.linalg.norm(np.asarray(got) - np.asarray(want)) / np.linalg.norm(np.asarray(want))


class Block(nn.Module):
    """Somebody's own block."""

    mixer: nn.Module

    @nn.compact
    def __call__(self, x):
        x = x + self.mixer(nn.LayerNorm()(x))
        return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x))))


@pytest.mark.slow
def test_it_trains_in_a_linen_model():
    """Two models at once, by vmap over their seeds; every parameter has a gradient."""
    model, optimizer, x = Block(LAYERS[2]), optax.adam(1e-3), tokens(1)

    @jax.jit
    @jax.vmap
    def loss(params):
        return jax.value_and_grad(lambda params: jnp.mean(jnp.square(model.apply(params, x) - jnp.flip(x, 1))))(params)

    params = jax.jit(jax.vmap(model.init, (0, None)))(jax.random.split(jax.random.key(0), 2), x)
    before, gradients = loss(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert jnp.isfinite(leaf).all() and jnp.any(leaf != 0, axis=tuple(range(1, leaf.ndim))).all(), path
    updates, _ = optimizer.update(gradients, optimizer.init(params))
    after, _ = loss(optax.apply_updates(params, updates))
    assert (after < before).all() and before[0] != before[1]


class Host(nnx.Module):
    """Somebody's own block in NNX."""

    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.mixer = nnx.bridge.ToNNX(LAYERS[2], rngs=rngs).lazy_init(tokens())
        self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.out(x + self.mixer(self.norm(x)))


@pytest.mark.slow
def test_it_trains_in_an_nnx_model_and_decodes_there():
    x = tokens(1)
    host = Host(nnx.Rngs(0))
    optimizer = nnx.Optimizer(host, optax.adam(1e-3), wrt=nnx.Param)

    @nnx.jit
    def step(host, optimizer):
        loss, gradient = nnx.value_and_grad(lambda host: jnp.mean(jnp.square(host(x) - jnp.flip(x, 1))))(host)
        optimizer.update(host, gradient)
        return loss, gradient

    first, gradient = step(host, optimizer)
    second, _ = step(host, optimizer)
    assert second < first
    assert all(jnp.isfinite(leaf).all() and (leaf != 0).any() for leaf in jax.tree.leaves(gradient))
    params = {"params": nnx.to_pure_dict(nnx.state({part: getattr(host.mixer, part) for part in PARTS}))}
    out, state = nnx.jit(lambda mixer, x, state: mixer(x, state))(host.mixer, x[:, :1], LAYERS[2].init_state(BATCH))
    assert relative(out, apply(LAYERS[2], params, x)[:, :1]) < 1e-5
    assert state.position.tolist() == [1] * BATCH


@each_layer
def test_rows_in_pieces_are_whole_rows(layer):
    """A piece of 11 tokens, of which a row has but 7; then token by token, each row at its own place."""
    params, x = init(layer), tokens(2)
    want = apply(layer, params, x)
    lengths = jnp.array([11, 7])
    out, state = apply(layer, params, x[:, :11], layer.init_state(BATCH), lengths)
    for row, length in enumerate(lengths):
        assert relative(out[row, :length], want[row, :length]) < 1e-5
    at = lengths[:, None] + jnp.arange(LENGTH - 11)
    ahead, wanted = (jnp.take_along_axis(y, at[..., None], 1) for y in (x, want))
    read = []
    for place in range(LENGTH - 11):
        out, state = apply(layer, params, ahead[:, place : place + 1], state)
        read.append(out)
    assert relative(jnp.concatenate(read, 1), wanted) < 1e-5
    assert state.position.tolist() == [24, 20]


def test_a_packed_document_is_read_as_if_it_were_alone():
    layer, x = LAYERS[2], tokens(3)
    params = init(layer)
    segments = jnp.where(jnp.arange(LENGTH) < 8, 1, 2) * jnp.ones((BATCH, 1), jnp.int32)
    packed = apply(layer, params, x, segment_ids=segments)
    alone = apply(layer, params, jnp.roll(x, -8, axis=1))
    assert relative(packed[:, 8:], alone[:, :-8]) < 1e-5


@pytest.mark.parametrize("theta", [None, 100.0])
def test_windowed_attention_is_what_it_says(theta):
    layer, x = WindowedAttention(**ATTENTION, rope_theta=theta), np.asarray(tokens(4))
    params = init(layer)
    kernels = {name: np.asarray(leaf["kernel"]) for name, leaf in params["params"]["attention"].items()}
    q, k, v = (np.reshape(x @ kernels[f"{name}_proj"], (BATCH, LENGTH, -1, 8)) for name in "qkv")
    if theta is not None:
        turn = np.exp(1j * np.arange(LENGTH)[:, None] * theta ** (-np.arange(4) / 4))[:, None]
        q, k = (((y[..., :4] + 1j * y[..., 4:]) * turn) for y in (q, k))
        q, k = (np.concatenate([y.real, y.imag], -1) for y in (q, k))
    k, v = np.repeat(k, 2, axis=2), np.repeat(v, 2, axis=2)
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)
    scores = np.where((j <= i) & ((i - j < 8) | (j < 2)), np.einsum("bihd,bjhd->bhij", q, k) / 8**0.5, -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    want = np.einsum("bhij,bjhd->bihd", weights, v).reshape(BATCH, LENGTH, -1) @ kernels["o_proj"]
    assert relative(apply(layer, params, x), want) < 1e-5


@pytest.mark.parametrize("silent", [dict(write=False), dict(alpha_init=0.0)], ids=["write", "alpha_init"])
def test_a_silent_memory_leaves_windowed_attention(silent):
    params, x = init(Mixer(**ATTENTION, **MEMORY)), tokens(5)
    heard = apply(Mixer(**ATTENTION, **MEMORY), params, x)
    mixer = Mixer(**ATTENTION, **MEMORY, **silent)
    attention = {"params": {"attention": params["params"]["attention"]}}
    want = apply(LAYERS[0], attention, x)
    own = params if "write" in silent else init(mixer)
    np.testing.assert_array_equal(apply(mixer, own, x), want)
    assert relative(heard, want) > 1e-3


def test_its_parameters_are_those_of_a_language_models_layer():
    sizes = dict(vocab_size=8, d_model=WIDTH, n_layers=1, d_ff=8, read_out="difference")
    config = config_lib.ModelConfig(**ATTENTION, **MEMORY, **sizes)
    layer = jax.eval_shape(lambda: lm.init_params(config))["layers"]
    mixer = jax.eval_shape(lambda: init(Mixer(**ATTENTION, **MEMORY)))["params"]
    for part in PARTS:
        stacked = jax.tree.map(lambda leaf: (1, *leaf.shape), mixer[part])
        assert stacked == jax.tree.map(lambda leaf: leaf.shape, layer[part])


def test_bfloat16_is_of_what_is_computed_alone():
    layer = LAYERS[2].copy(dtype=jnp.bfloat16)
    params = jax.eval_shape(lambda: init(layer))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    out, state = jax.eval_shape(lambda params: layer.apply(params, tokens(), layer.init_state(BATCH)), params)
    assert out.dtype == state.layer.keys.dtype == jnp.bfloat16
    assert state.layer.memory.weights.up.dtype == jnp.float32


def test_what_does_not_fit_is_named():
    mixer, x = LAYERS[2], tokens()
    state, segments = mixer.init_state(BATCH), jnp.ones((BATCH, LENGTH), jnp.int32)

    def refuses(message, layer, *given, **named):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda: layer.init_with_output(jax.random.key(0), *given, **named))

    refuses(r"x must be floating \[B, L, features\]; got int32 \[2, 24\]", mixer, segments)
    refuses("segment_ids cannot be given together with state", mixer, x, state, segment_ids=segments)
    refuses(r"state's layer.conv is \(2, 3, 48\), where this WindowedAttention and 2 rows", LAYERS[0], x, state)
    refuses(r"state's layer.conv is \(2, 3, 48\), where this Mixer and 1 rows need \(1, 3, 48\)", mixer, x[:1], state)
    refuses("n_heads=4 does not divide by n_kv_heads=3", LAYERS[0].copy(n_kv_heads=3), x)
    refuses("dtype='float16' is not one of", mixer.copy(dtype="float16"), x)
    for layer, kernel in ((LAYERS[0], "swa_attention"), (LAYERS[1], "ttt_memory")):
        refuses(f"{kernel}: implementation='fast' is unknown", layer.copy(implementation="fast"), x)
    with pytest.warns(UserWarning, match="window=8 is shorter than chunk=16"):
        Mixer(**ATTENTION, **MEMORY | {"chunk": 16}).init_state(1)


@pytest.mark.slow
def test_eight_devices_give_what_one_gives():
    """Rows and heads over the mesh that its axes name, and rows over one of other names, by shard_map."""
    compiling.run_on_eight_devices("""
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from allmem_jax.nn import Mixer

layer = Mixer(n_heads=4, head_dim=8, window=8, sinks=2, chunk=4, n_mem=4, d_mem=8, read_out="full")
x = jax.random.normal(jax.random.key(0), (8, 24, 16))
params = jax.jit(layer.init)(jax.random.key(1), x)

@jax.jit
def gradient(params, x):
    def loss(params):
        out = layer.apply(params, x)
        return jnp.mean(jnp.square(out)), out
    (_, out), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return out, gradient

def check(got, want):
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want), (got, want)

out, want = gradient(params, x)
mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
with jax.set_mesh(mesh):
    again, got = gradient(params, jax.device_put(x, NamedSharding(mesh, P("data"))))
check(again, out)
jax.tree.map(check, got, want)

mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
split = jax.shard_map(layer.apply, mesh=mesh, in_specs=(P(), P("rows")), out_specs=P("rows"), check_vma=False)
check(jax.jit(split)(params, x), out)
""")
