"""The start from attention: what it is made of, that it is an induction head, and that its rates are fitted.

And that the baselines' is one as well.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from allmem_jax.checkpoints import start
from allmem_jax.model import config as config_lib
from allmem_jax.model import decoder, functional, layers, lm
from allmem_jax.model import memory as memory_lib
from pallas_kernels import norms

pytestmark = pytest.mark.core
SAME = config_lib.ModelConfig(
    vocab_size=61,
    d_model=48,
    n_layers=2,
    n_heads=6,
    n_kv_heads=3,
    head_dim=16,
    d_ff=40,
    window=32,
    sinks=2,
    chunk=16,
    d_mem=16,
    read_out="difference",
)
SHAPES = {
    "same": SAME,
    "qwen3": SAME.replace(head_dim=32, qk_norm=True),  # memory heads are narrower
    "qwen2": SAME.replace(n_kv_heads=2, n_mem=4, qkv_bias=True),  # and more
    "gemma": SAME.replace(n_heads=4, n_kv_heads=1, n_mem=4, head_dim=32, qk_norm=True, norm_offset=1.0),
    "many": SAME.replace(n_kv_heads=6, n_mem=3),  # fewer
    "wide": SAME.replace(head_dim=8, n_mem=8),  # wider, and more than there are query heads
}
BASELINES = ("delta", "mamba2")
TOKENS = np.random.default_rng(0).integers(0, SAME.vocab_size, 2 * start.WARM_UP + 40)


def random_like(shapes):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, leaf.shape[-1] ** -0.5, leaf.shape).astype("f"), shapes)


def shapes(config):
    """(backbone, memory) of the config's model."""
    return lm.split_params(jax.eval_shape(lambda: lm.init_params(config)))


def relative(a, b):
    return np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(b)


def one_layer(config, inputs):
    """Layer 0's fresh memory, its attention, and the started memory."""
    both = (tree["layers"] for tree in map(random_like, shapes(config)))
    attention, fresh = (
        jax.tree.map(lambda leaf: leaf[0], tree) for tree in (next(both)["attention"], next(both)["memory"])
    )
    return fresh, attention, start.induction_head(config, fresh, attention, inputs)


@pytest.mark.parametrize(
    ("name", "mixer"), [(name, "allmem") for name in SHAPES] + [(name, mixer) for mixer in BASELINES for name in SHAPES]
)
def test_every_shape_of_attention_gives_a_memory(name, mixer):
    config = SHAPES[name].replace(mixer=mixer)
    backbone, like = shapes(config)
    memory = start.from_attention(config, random_like(backbone), TOKENS)
    assert jax.tree.map(jnp.shape, memory) == jax.tree.map(jnp.shape, like)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(memory))
    assert not np.any(memory["layers"]["memory"]["alpha"])  # so that the model is still that of windowed attention


@pytest.mark.parametrize("mixer", ["allmem", *BASELINES])
def test_a_chunk_longer_than_the_text_is_no_matter(mixer):
    """Within a chunk nothing is read: rates are fitted, and alpha is, at a size that the text has many of."""
    config = SAME.replace(mixer=mixer, alpha_init=0.2, chunk=start.CHUNK)
    backbone = random_like(shapes(config)[0])
    want, found = (
        start.from_attention(config.replace(chunk=chunk), backbone, TOKENS) for chunk in (start.CHUNK, 4 * len(TOKENS))
    )
    jax.tree.map(np.testing.assert_array_equal, found, want)
    assert np.isfinite(found["layers"]["memory"]["alpha"]).all() and np.all(found["layers"]["memory"]["alpha"] > 0)


def test_an_attention_that_gives_nothing_is_no_reason_for_nan():
    config = SAME.replace(alpha_init=0.2)
    backbone = random_like(shapes(config)[0])
    backbone["layers"]["attention"]["o_proj"]["kernel"] *= 0
    memory = start.from_attention(config, backbone, TOKENS)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(memory))


def test_values_and_outputs_are_those_of_the_attention():
    """Exactly where the sizes agree: what all query heads of a key head make of its values."""
    _, attention, memory = one_layer(SAME, np.random.default_rng(1).normal(size=(64, SAME.d_model)).astype("f"))
    assert np.array_equal(memory["v_proj"]["kernel"], attention["v_proj"]["kernel"])
    out = attention["o_proj"]["kernel"].reshape(3, 2, 16, -1).sum(1).reshape(48, -1)
    assert relative(memory["out_proj"]["kernel"], out) < 1e-6


@pytest.mark.parametrize("name", ["qwen3", "gemma"])
def test_narrower_values_keep_what_matters_most(name):
    """No other projection of so few channels comes nearer to what the attention makes of the layer's inputs."""
    config, rng = SHAPES[name], np.random.default_rng(1)
    inputs = (rng.normal(size=(256, 48)) * np.geomspace(1, 0.01, 48)).astype("f")
    _, attention, memory = one_layer(config, inputs)
    group = config.n_heads // config.memory_heads
    values = np.repeat(attention["v_proj"]["kernel"].reshape(48, config.n_kv_heads, 32), 4 if name == "gemma" else 1, 1)
    outputs = attention["o_proj"]["kernel"].reshape(config.memory_heads, group, 32, 48).sum(1)
    for head in range(config.memory_heads):
        own = slice(16 * head, 16 * head + 16)
        wanted = inputs @ values[:, head] @ outputs[head]
        got = inputs @ memory["v_proj"]["kernel"][:, own] @ memory["out_proj"]["kernel"][own]
        best = np.sqrt(np.sum(np.linalg.svd(wanted, compute_uv=False)[16:] ** 2))
        assert np.linalg.norm(got - wanted) < 1.02 * best + 1e-4 * np.linalg.norm(wanted)


def test_it_reads_what_followed():
    """Of words in random order, each that is read again returns the value of the one that came after it."""
    config = SAME.replace(d_model=96, n_heads=2, n_kv_heads=1, head_dim=64, d_mem=64, chunk=8)
    rng = np.random.default_rng(2)
    words = (rng.normal(size=(8, 96)) + 2 * rng.normal(size=96)).astype("f")  # with a common direction
    _, _, memory = one_layer(config, words)
    again = rng.permutation(7)
    inputs = jnp.asarray(np.concatenate([words, words[again]]))[None]

    def part(name):
        x = functional.linear(inputs, memory[f"{name}_proj"]["kernel"])
        return functional.causal_conv(x, memory[f"{name}_conv"]["kernel"], None)[:, :, None]

    q, k, v = norms.l2_normalise(part("q")), norms.l2_normalise(part("k")), part("v")
    init = pallas_kernels.FastWeights(memory["fast_gate"], memory["fast_up"], memory["fast_down"])
    rates = jnp.full((1, 15, 1, 3), 0.05), jnp.full((1, 15, 1), 0.5)
    out, _ = pallas_kernels.ttt_memory(q, k, v, *rates, init, chunk_size=8, read_out="difference")
    read, stored = np.asarray(out)[0, 8:, 0], np.asarray(v)[0, :8, 0]
    closest = np.argmax(read @ (stored / np.linalg.norm(stored, axis=1, keepdims=True)).T, axis=1)
    assert np.mean(closest == again + 1) > 0.8  # 1/8 by chance


@pytest.mark.parametrize("mixer", BASELINES)
def test_a_baseline_reads_what_followed(mixer):
    """As above, through the whole module behind its norm and gates; a memory that is not started does not."""
    config = SAME.replace(d_model=128, n_heads=2, n_kv_heads=1, head_dim=64, d_mem=64, mixer=mixer)
    rng = np.random.default_rng(2)
    words = (rng.normal(size=(8, 128)) + 2 * rng.normal(size=128)).astype("f")  # with a common direction
    fresh, _, memory = one_layer(config, words)
    memory = start.open_gates(config, memory, jnp.asarray(words))
    again = rng.permutation(7)
    inputs = jnp.asarray(np.concatenate([words, words[again]]))[None]
    shared = layers.Shared(rope=(inputs, inputs), local_rope=(inputs, inputs), window=None, sinks=0)

    def found(memory):
        stored = np.asarray(words @ memory[f"{start.NAMES[mixer][2]}_proj"]["kernel"])
        width = stored.shape[1]
        memory = memory | {"alpha": jnp.ones(128), "out_proj": {"kernel": jnp.eye(width, 128)}}  # what is read itself
        memory["out_norm"] = {"scale": jnp.ones_like(memory["out_norm"]["scale"])}
        out, _ = decoder.MEMORIES[mixer](config).apply({"params": memory}, inputs, None, shared)
        read = np.asarray(out)[0, 8:, :width]
        read, stored = (x - x.mean(axis=0) for x in (read, stored))  # what all have in common tells nothing
        closest = np.argmax(read @ (stored / np.linalg.norm(stored, axis=1, keepdims=True)).T, axis=1)
        return np.mean(closest == again + 1)  # 1/8 by chance

    assert found(memory) > 0.8 and found(fresh) < 0.5


@pytest.mark.parametrize("mixer", BASELINES)
def test_a_baseline_writes_all_alike_and_forgets_little(mixer):
    config = SAME.replace(mixer=mixer, alpha_init=0.2)
    backbone = random_like(shapes(config)[0])
    backbone["embed"]["embedding"] += 1  # inputs share a direction, as those of trained models do
    params = lm.merge_params(backbone, start.from_attention(config, backbone, TOKENS))
    _, found = lm.AllMemLM(config).apply({"params": params}, TOKENS[None], mutable=["intermediates"])
    found = found["intermediates"]["layers"]["memory"]
    np.testing.assert_allclose(found["lr"][0], start.REPLACED if mixer == "delta" else 1.0, rtol=0.2)
    np.testing.assert_allclose(found["decay"][0], 1 - start.FORGOTTEN, rtol=1e-6)
    logits = [
        lm.AllMemLM(config.replace(**change)).apply({"params": params}, TOKENS[None, :64])[0]
        for change in ({}, dict(write=False), dict(mixer="swa"))
    ]
    assert np.array_equal(logits[1], logits[2]) and not np.allclose(logits[0], logits[2], atol=1e-3)


def test_rates_move_the_read_out_alike():
    """A layer whose keys are alike gets a smaller rate than one whose keys are not; both move it by the same share."""
    rng = np.random.default_rng(3)
    rates = []
    for spread in (1.0, 0.2):
        inputs = (spread * rng.normal(size=(len(TOKENS), 48)) + rng.normal(size=48)).astype("f")
        _, _, memory = one_layer(SAME, inputs)
        memory = start.calibrate(SAME, memory, jnp.asarray(inputs))
        bias = np.asarray(memory["lr_proj"]["bias"])
        assert np.ptp(bias) == 0
        rates.append(np.log1p(np.exp(bias[0])))
    assert 1e-4 < rates[0] < 1 and 1e-4 < rates[1] < 1 and abs(np.log(rates[0] / rates[1])) > 0.05


@pytest.mark.parametrize(
    ("name", "mixer"), [("same", "allmem"), ("gemma", "allmem"), ("same", "delta"), ("same", "mamba2")]
)
def test_every_layer_adds_the_same_share_of_its_attention(name, mixer):
    config = SHAPES[name].replace(alpha_init=0.2, mixer=mixer)
    backbone = random_like(shapes(config)[0])
    memory = start.from_attention(config, backbone, TOKENS)
    taken = lambda module, _: module.name in ("attention", "memory")  # noqa: E731
    params = lm.merge_params(backbone, memory)
    _, found = lm.AllMemLM(config).apply(
        {"params": params}, TOKENS[None], capture_intermediates=taken, mutable=["intermediates"]
    )
    found = found["intermediates"]["layers"]
    (out, _), (added, _) = (found[name]["__call__"][0] for name in ("attention", "memory"))
    size = lambda x: np.sqrt(np.mean(np.square(x[0, 0, start.WARM_UP :])))  # noqa: E731
    np.testing.assert_allclose(size(added) / size(out), 0.2, rtol=1e-4)  # the first layer's inputs are the same


def test_what_cannot_start_is_told():
    with pytest.raises(ValueError, match="mixer='swa' has no memory that could start from attention"):
        start.from_attention(SAME.replace(mixer="swa"), {}, TOKENS)
    with pytest.raises(ValueError, match="the text has 5 tokens; a start from attention needs 512"):
        start.from_attention(SAME, {}, TOKENS[:5])


def test_floors_are_what_half_of_the_reads_find():
    config = SAME
    params = random_like(jax.eval_shape(lambda: lm.init_params(config)))
    backbone, _ = lm.split_params(params)
    memory = start.from_attention(config, backbone, TOKENS)["layers"]["memory"]
    inputs, _ = start.layer_inputs(config, backbone, jnp.asarray(TOKENS, jnp.int32)[None])
    for layer in range(config.n_layers):
        own = jax.tree.map(lambda leaf: leaf[layer], memory)  # noqa: B023 (used at once)
        shared = layers.Shared(rope=(), local_rope=(), window=None, sinks=0)
        _, found = memory_lib.Memory(config).apply(
            {"params": own}, inputs[layer][None], None, shared, mutable=["intermediates"], capture_intermediates=True
        )
        (normed,) = found["intermediates"]["out_norm"]["__call__"]  # of size 1 / sqrt(2) where a read is at the floor
        sizes = jnp.sqrt(jnp.mean(jnp.square(normed[0, start.WARM_UP :]), axis=-1))
        np.testing.assert_allclose(jnp.mean(sizes < 0.5**0.5, axis=0), 0.5, atol=0.02)


@pytest.mark.parametrize("mixer", ["allmem", *BASELINES])
def test_a_control_starts_as_what_it_is_held_against(mixer):
    config = SAME.replace(mixer=mixer, alpha_init=0.1)
    backbone = random_like(shapes(config)[0])
    ours, theirs = (start.from_attention(config.replace(write=write), backbone, TOKENS) for write in (True, False))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert np.isfinite(ours["layers"]["memory"]["alpha"]).all()
