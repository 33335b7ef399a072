"""The model: what conversion may not change, and the one law of the decode state."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from allmem_jax.model import config as config_lib
from allmem_jax.model import functional, layers, lm
from allmem_jax.model import state as state_lib
from pallas_kernels import norms

pytestmark = pytest.mark.core

LENGTH = 29
TINY = config_lib.ModelConfig(
    vocab_size=61,
    d_model=24,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    d_ff=40,
    window=6,
    sinks=2,
    chunk=5,
    n_mem=3,
    d_mem=8,
    alpha_init=0.7,
    lr_init=0.2,
)
GEMMA = TINY.replace(
    family="gemma3_text",
    qk_norm=True,
    activation="gelu_tanh",
    sandwich_norms=True,
    norm_offset=1.0,
    embed_scale=5.0,
    query_scale=0.3,
    local_layers=(True, False, True),
    local_window=4,
    local_rope_theta=100.0,
    n_kv_heads=1,
    rope_scaling=config_lib.RopeScaling("linear", 8.0),
)
DELAYED = TINY.replace(read_out="difference", delay=True, window=11)  # six tokens wait
BIASED = TINY.replace(qkv_bias=True, o_bias=True, mlp_bias=True, tie_embeddings=False, qk_scale="rms", chunk=6)


@functools.cache
def random_params(config: config_lib.ModelConfig, seed: int = 0) -> lm.Params:
    """Parameters with every leaf random, biases and norms too."""
    params = lm.init_params(config, seed)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return tree.unflatten(
        [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    )


def random_tokens(batch: int, length: int = LENGTH, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, (batch, length)).astype(np.int32)


def forward(config: config_lib.ModelConfig, params: lm.Params, tokens: np.ndarray, **kwargs) -> jax.Array:
    return jax.jit(lambda p, t: lm.AllMemLM(config).apply({"params": p}, t, **kwargs))(params, tokens)


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def silence(params: lm.Params) -> lm.Params:
    """The same parameters with alpha = 0."""
    memory = params["layers"]["memory"]
    return params | {"layers": params["layers"] | {"memory": memory | {"alpha": 0 * memory["alpha"]}}}


@pytest.mark.parametrize("config", [TINY, GEMMA, BIASED], ids=["llama", "gemma", "biased"])
def test_silent_memory_changes_nothing(config):
    params, tokens = random_params(config), random_tokens(2)
    quiet = silence(params)
    full = forward(config.replace(mixer="full"), params, tokens)
    wide = forward(config.replace(window=LENGTH, sinks=0), quiet, tokens)
    assert relative(wide, full) < 1e-5
    windowed = forward(config.replace(mixer="swa"), params, tokens)
    assert relative(forward(config, quiet, tokens), windowed) < 1e-6
    assert relative(windowed, full) > 1e-3  # the window does bite
    assert relative(forward(config, params, tokens), windowed) > 1e-2  # and so does the memory


def test_teacher_needs_no_memory_parameters():
    params, tokens = random_params(TINY), random_tokens(1)
    backbone, memory = lm.split_params(params)
    config = TINY.replace(mixer="full")
    np.testing.assert_array_equal(forward(config, backbone, tokens), forward(config, params, tokens))
    assert jax.tree.structure(lm.merge_params(backbone, memory)) == jax.tree.structure(params)
    assert jax.tree.map(jnp.shape, lm.init_memory(TINY)) == jax.tree.map(jnp.shape, memory)


def test_windows_and_sinks_may_be_traced():
    params, tokens = random_params(TINY), random_tokens(1)
    compiled = jax.jit(lambda w, s: lm.AllMemLM(TINY).apply({"params": params}, tokens, window=w, sinks=s))
    for window, sinks in [(3, 0), (7, 4), (LENGTH, 1)]:
        config = TINY.replace(window=window, sinks=sinks)
        assert relative(compiled(window, sinks), forward(config, params, tokens)) < 1e-5
    assert compiled._cache_size() == 1


def test_write_off_is_a_fixed_network():
    """Without writing, what lies beyond the window and the convolutions' reach leaves no trace."""
    config = TINY.replace(write=False, sinks=0, n_layers=1)
    params, tokens = random_params(config), random_tokens(1)
    other = tokens.copy()
    other[:, :4] = (other[:, :4] + 1) % TINY.vocab_size
    late = slice(4 + config.window + config.conv_kernel, None)
    np.testing.assert_allclose(
        forward(config, params, tokens)[:, late], forward(config, params, other)[:, late], rtol=1e-5, atol=1e-5
    )
    writing = config.replace(write=True)
    gap = relative(forward(writing, params, tokens)[:, late], forward(writing, params, other)[:, late])
    assert gap > 1e-4


@functools.partial(jax.jit, static_argnums=0)
def step(config, params, tokens, lengths, state):
    return lm.AllMemLM(config).apply({"params": params}, tokens, lengths=lengths, state=state)


def read_in_pieces(config, params, tokens, lengths, splits):
    """Feeds each row `splits[b]` pieces at its own pace, padded to the widest piece; returns logits and state."""
    state = state_lib.init_state(config, len(tokens))
    out = np.zeros((*tokens.shape, config.vocab_size), np.float32)
    done = np.zeros(len(tokens), int)
    width = min(width for width in (1, 12, LENGTH) if width >= max(map(max, splits)))  # few shapes to compile
    for turn in range(max(len(split) for split in splits)):
        sizes = np.array([split[turn] if turn < len(split) else 0 for split in splits])
        piece = random_tokens(len(tokens), width, seed=turn)  # padding is random too: it must not matter
        for row, size in enumerate(sizes):
            piece[row, :size] = tokens[row, done[row] : done[row] + size]
        logits, state = step(config, params, piece, sizes.astype(np.int32), state)
        for row, size in enumerate(sizes):
            out[row, done[row] : done[row] + size] = logits[row, :size]
        done += sizes
    assert (done == lengths).all()
    return out, state


def random_split(rng: np.random.Generator, length: int, widest: int) -> list[int]:
    sizes = []
    while sum(sizes) < length:
        sizes.append(int(rng.integers(0, min(widest, length - sum(sizes)) + 1)))
    return sizes


@pytest.mark.parametrize("config", [TINY, GEMMA, BIASED, DELAYED], ids=["llama", "gemma", "biased", "delayed"])
def test_the_law(config):
    """Prefill in one piece = in any pieces = token by token = training forward; outputs and states; ragged rows."""
    params = random_params(config)
    lengths = np.array([LENGTH, 17, 3])
    tokens = random_tokens(3)
    want = forward(config, params, tokens)
    rng = np.random.default_rng(1)
    ways = {
        "one piece": [[n] for n in lengths],
        "token by token": [[1] * n for n in lengths],
        "random": [random_split(rng, n, 9) for n in lengths],
        "random again": [random_split(rng, n, 12) for n in lengths],
    }
    states = {}
    for name, splits in ways.items():
        got, states[name] = read_in_pieces(config, params, tokens, lengths, splits)
        for row, length in enumerate(lengths):
            assert relative(got[row, :length], want[row, :length]) < 2e-5, (name, row)
    first = states.pop("one piece")
    np.testing.assert_array_equal(first.position, lengths)
    for name, state in states.items():
        for path, a in jax.tree_util.tree_leaves_with_path(first):
            b = dict(jax.tree_util.tree_leaves_with_path(state))[path]
            assert np.linalg.norm(a - b) <= 2e-5 * max(np.linalg.norm(a), 1.0), (name, jax.tree_util.keystr(path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_written_gives_no_gradient(dtype):
    """Where nothing was written the norm of the difference is at its steepest, and must not turn rounding into one."""
    config = TINY.replace(read_out="difference", dtype=dtype, chunk=LENGTH)
    params, tokens = random_params(config), random_tokens(2)

    def total(memory, chunk):
        changed = params | {"layers": params["layers"] | {"memory": memory}}
        return lm.AllMemLM(config.replace(chunk=chunk)).apply({"params": changed}, tokens).astype(jnp.float32).std()

    gradient = jax.jit(jax.grad(total), static_argnums=1)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient(params["layers"]["memory"], LENGTH)))
    some = jax.tree.leaves(gradient(params["layers"]["memory"], 5))
    assert all(np.isfinite(leaf).all() for leaf in some) and max(np.abs(leaf).max() for leaf in some) < 1


@pytest.mark.parametrize("config", [TINY, GEMMA, BIASED], ids=["llama", "gemma", "biased"])
def test_a_difference_that_writes_nothing_is_windowed_attention(config):
    """Exactly, in training and when a prompt is read and answered: the control of such a memory has no adapter."""
    control = config.replace(read_out="difference", write=False)
    windowed = config.replace(mixer="swa")
    params, tokens = random_params(control), random_tokens(2)
    np.testing.assert_array_equal(forward(control, params, tokens), forward(windowed, params, tokens))
    lengths = np.array([LENGTH, 17])
    splits = [[12, 12, 1, 1, 1, 1, 1], [12, 1, 1, 1, 1, 1]]
    ours, state = read_in_pieces(control, params, tokens, lengths, splits)
    theirs, other = read_in_pieces(windowed, params, tokens, lengths, splits)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(state.keys, other.keys)
    writing, _ = read_in_pieces(config.replace(read_out="difference"), params, tokens, lengths, splits)
    assert relative(writing, theirs) > 1e-3


def test_a_delayed_memory_is_what_another_was_a_window_ago():
    """Less a chunk: whatever has left the window is in it. Rows are of other lengths, read in one piece and another."""
    config = DELAYED.replace(n_layers=1, window=15)  # ten tokens wait: two chunks
    params, tokens = random_params(config), random_tokens(2)
    lengths = np.array([LENGTH, 23])
    _, late = read_in_pieces(config, params, tokens, lengths, [[12, 12, 5], [3, 12, 8]])
    _, before = step(
        config.replace(delay=False),
        params,
        tokens[:, :19],
        lengths - 10,
        state_lib.init_state(config.replace(delay=False), 2),
    )
    for ours, theirs in zip(jax.tree.leaves(late.memory), jax.tree.leaves(before.memory), strict=True):
        assert relative(ours, theirs) < 1e-5


def test_nothing_is_added_within_the_window():
    """Exactly, where chunks fill the window; and a traced window is the same."""
    config = DELAYED.replace(window=10)
    params, tokens = random_params(config), random_tokens(2)
    ours, theirs = forward(config, params, tokens), forward(config.replace(mixer="swa"), params, tokens)
    np.testing.assert_array_equal(ours[:, :10], theirs[:, :10])
    assert relative(ours[:, 10:], theirs[:, 10:]) > 1e-3
    wide = config.replace(window=20)
    traced = jax.jit(lambda w: lm.AllMemLM(wide).apply({"params": params}, tokens, window=w))
    for window in (3, 10, 40):  # shorter than a chunk, and longer than the row
        assert relative(traced(jnp.int32(window)), forward(config.replace(window=window), params, tokens)) < 2e-5


def test_a_floor_keeps_small_what_is_small():
    x = np.random.default_rng(0).normal(size=(4, 3, 2, 64)).astype("f")
    scale = np.linspace(0.5, 2, 64, dtype="f")
    low, high = np.log(np.float32([1e-6, 1e-6])), np.log(np.float32([1e-6, 3.0]))
    normed = lambda floor: layers.FlooredNorm().apply({"params": {"scale": scale, "log_floor": floor}}, x)  # noqa: E731
    plain = norms.rms_norm(x, scale, 0.0)
    assert relative(normed(low), plain) < 1e-5
    rms = np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True))
    found = normed(high)
    assert relative(found[..., 0, :], plain[..., 0, :]) < 1e-5
    assert relative(found[..., 1, :], (x / np.sqrt(rms**2 + 9) * scale)[..., 1, :]) < 1e-5


@pytest.mark.parametrize("config", [TINY, DELAYED], ids=["at once", "delayed"])
def test_packed_documents_equal_separate_rows(config):
    params = random_params(config)
    tokens = random_tokens(1)
    spans = [(0, 10), (10, 15), (15, 26)]  # chunk 5: on the grid
    segments = np.zeros((1, LENGTH), np.int32)
    for number, (start, end) in enumerate(spans, 1):
        segments[:, start:end] = number
    packed = forward(config, params, tokens, segment_ids=jnp.asarray(segments))
    for start, end in spans:
        assert relative(packed[:, start:end], forward(config, params, tokens[:, start:end])) < 2e-5


def test_state_is_constant_and_forks():
    config, params = TINY, random_params(TINY)
    tokens = random_tokens(1)
    apply = jax.jit(lambda t, s: lm.AllMemLM(config).apply({"params": params}, t, state=s))
    _, short = apply(tokens[:, :10], state_lib.init_state(config, 1))
    _, long = apply(tokens[:, :10], short)
    assert jax.tree.map(jnp.shape, short) == jax.tree.map(jnp.shape, long)
    assert state_lib.state_bytes(config) == sum(leaf.nbytes for leaf in jax.tree.leaves(long))
    again, _ = apply(tokens[:, 10:20], short)
    np.testing.assert_array_equal(again, apply(tokens[:, 10:20], short)[0])


@pytest.mark.parametrize("config", [TINY.replace(dtype="bfloat16"), DELAYED.replace(window=6)])
def test_states_are_files(tmp_path, config):
    empty = state_lib.init_state(config, 2)
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: jnp.asarray(rng.integers(0, 9, leaf.shape), leaf.dtype), empty)
    file = tmp_path / "book.safetensors"
    state_lib.save_state(file, config, state)
    jax.tree.map(np.testing.assert_array_equal, state_lib.load_state(file, config), state)
    with pytest.raises(ValueError, match="another model: window is 6 there and 7 here"):
        state_lib.load_state(file, config.replace(window=7))
    state_lib.save_state(file, config, dataclasses.replace(state, conv=None))
    with pytest.raises(ValueError, match="not a saved state: conv missing"):
        state_lib.load_state(file, config)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a saved state"):
        state_lib.load_state(file, config)


@pytest.mark.parametrize(
    "made, message",
    [
        (dict(sinks=3, window=5), "made with sinks=3 and the config has sinks=2"),  # as many slots
        (dict(window=7), "made with window=7 and the config has window=6"),
        (dict(mixer="swa"), "the state's conv is missing, where mixer='allmem' and 2 rows of tokens need"),
        (dict(mixer="delta"), "the state's conv is"),
        (dict(n_mem=2), "the state's conv is"),
        (dict(mem_expansion=3), r"the state's memory.pending.down is \(3, 2, 3, 8, 24\)"),
        (dict(n_kv_heads=1, n_mem=3), r"the state's keys is \(3, 2, 8, 1, 8\)"),
        (dict(n_layers=2), "the state's conv is"),
        (
            dict(delay=True),
            r"the state's waiting is \(3, 2, 1, 128\), where mixer='allmem' and 2 rows of tokens need none",
        ),
    ],
)
def test_the_state_of_another_config_is_refused(made, message):
    other = state_lib.init_state(TINY.replace(**made), 2)
    run = lambda state: lm.AllMemLM(TINY).apply({"params": random_params(TINY)}, random_tokens(2, 4), state=state)  # noqa: E731
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(run, other)
    with pytest.raises(ValueError, match="use the config that the state was made with"):
        jax.eval_shape(run, other)
    with pytest.raises(ValueError, match="the state's conv is .* 2 rows of tokens need"):
        jax.eval_shape(run, state_lib.init_state(TINY, 3))
    assert jax.eval_shape(run, state_lib.init_state(TINY, 2))[1].sinks == TINY.sinks


def test_bfloat16_stays_near_float32():
    params, tokens = random_params(TINY), random_tokens(2)
    low = forward(TINY.replace(dtype="bfloat16"), params, tokens)
    assert low.dtype == jnp.float32
    assert relative(low, forward(TINY, params, tokens)) < 3e-2


@pytest.mark.parametrize("name,millions", [("qwen3-0.6b", 66), ("qwen3-1.7b", 126)])
def test_added_parameters_match_the_paper(name, millions):
    config = config_lib.preset(name)
    shapes = jax.eval_shape(lambda: lm.init_memory(config))
    assert abs(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6 - millions) < 1


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_rope_scaling_keeps_fast_channels(kind):
    plain, _ = functional.rope_frequencies(64, 10_000.0)
    scaled, factor = functional.rope_frequencies(64, 10_000.0, config_lib.RopeScaling(kind, 4.0, 1024))
    assert np.all(np.asarray(scaled) <= np.asarray(plain) * 1.000001)
    np.testing.assert_allclose(scaled[-1], plain[-1] / 4, rtol=1e-5)
    assert (factor > 1) == (kind == "yarn")
    if kind != "linear":
        np.testing.assert_allclose(scaled[0], plain[0], rtol=1e-6)


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(n_heads=5), "n_heads=5 does not divide by n_kv_heads=2"),
        (dict(window=0), "window=0"),
        (dict(sinks=-1), "sinks=-1"),
        (dict(mixer="none"), "'allmem', 'mamba2', 'delta', 'swa', 'full'"),
        (dict(local_layers=(True,)), "1 entries for n_layers=3"),
        (dict(widnow=3), "did you mean 'window'"),
    ],
)
def test_bad_configs_are_named(changes, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        TINY.replace(**changes)


def test_blind_gap_warns():
    with pytest.warns(UserWarning, match="window=6 is shorter than chunk=8"):
        TINY.replace(chunk=8)


def test_configs_survive_json():
    for config in (TINY, GEMMA, BIASED):
        assert config_lib.ModelConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="not a model config"):
        config_lib.ModelConfig.from_json('{"wheels": 4}')


def test_model_refuses_what_it_cannot_mean():
    tokens = random_tokens(1)
    params = random_params(TINY)
    with pytest.raises(ValueError, match="together with state"):
        lm.AllMemLM(TINY).apply({"params": params}, tokens, state=state_lib.init_state(TINY, 1), window=3)
    with pytest.raises(ValueError, match="mixer='swa'"):
        state_lib.init_state(TINY.replace(mixer="full"), 1)
    with pytest.raises(ValueError, match="tokens must be integers"):
        lm.AllMemLM(TINY).apply({"params": params}, tokens[0])


@pytest.mark.parametrize("remat", ["attention", "dots", "none"])
def test_what_a_layer_keeps_changes_no_gradient(remat):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 24)))
    params = lm.init_params(TINY)

    def gradient(config):
        loss = lambda params: jnp.sum(jnp.square(lm.AllMemLM(config).apply({"params": params}, tokens)))  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    for got, want in zip(*map(jax.tree.leaves, (gradient(TINY.replace(remat=remat)), gradient(TINY))), strict=True):
        assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


def test_attention_whose_result_is_kept_is_not_computed_again():
    def loops(remat):
        config = TINY.replace(remat=remat, mixer="swa")  # its attention's loops are all there are within a layer
        loss = lambda params, x: jnp.sum(jnp.square(lm.AllMemLM(config).apply({"params": params}, x)))  # noqa: E731
        params = jax.eval_shape(lambda: lm.random_params(config))
        return (
            jax.jit(jax.grad(loss)).lower(params, jnp.zeros((1, 600), jnp.int32)).compile().as_text().count(" while(")
        )

    once = loops("none")
    assert loops("attention") == loops("dots") == once < loops("layer")
