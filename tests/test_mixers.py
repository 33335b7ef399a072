"""The baselines in the memory's place: their recurrences against single tokens, and the laws of a converted model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import LENGTH, TINY, random_params, random_split, random_tokens, read_in_pieces, relative, silence

import allmem_jax
from allmem_jax.decoding import generation
from allmem_jax.evaluation import divergence
from allmem_jax.model import config as config_lib
from allmem_jax.model import decoder, layers, linear_memory, lm, sharding
from allmem_jax.model import state as state_lib
from train.loop import compiled, models, steps
from train.recipe import FinetuneConfig

pytestmark = pytest.mark.core

BASELINES = ("mamba2", "delta")
RULES = {"mamba2": linear_memory.ssd, "delta": linear_memory.gated_delta}
BATCH, HEADS, KEY, VALUE = 3, 3, 6, 10


@pytest.fixture
def short_blocks(monkeypatch):
    """Several blocks in a tiny row."""
    monkeypatch.setattr(linear_memory, "BLOCK", 8)


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, tokens, segment_ids=None):
    """Logits; compiles once for each config and shape, so most tests below give it TINY and [3, LENGTH]."""
    return lm.AllMemLM(config).apply({"params": params}, tokens, segment_ids=segment_ids)


def one_head(rule, q, k, v, log_decay, beta, state, valid, reset):
    """The recurrence as it reads, for one row and head: q, k [L, Dk], v [L, Dv], rates and masks [L]."""

    def token(state, now):
        q, k, v, log_decay, beta, valid, reset = now
        state = jnp.where(reset, 0.0, state)
        forgotten = jnp.exp(log_decay) * state
        if rule == "delta":
            forgotten = forgotten - beta * jnp.outer(k, k @ forgotten)
            v = beta * v
        state = jnp.where(valid, forgotten + jnp.outer(k, v), state)
        return state, q @ state

    state, out = jax.lax.scan(token, state, (q, k, v, log_decay, beta, valid, reset))
    return out, state


def reference(rule, floats, valid, reset):
    """All rows and heads: out [B, L, N, Dv] and the state [B, N, Dk, Dv]."""
    if rule == "mamba2":  # one group: all heads share q and k
        floats = floats | {name: jnp.repeat(floats[name][:, :, None], HEADS, axis=2) for name in "qk"}
    tokens = [floats[name] for name in ("q", "k", "v", "log_decay", "beta")]
    heads = jax.vmap(functools.partial(one_head, rule), in_axes=(1, 1, 1, 1, 1, 0, None, None), out_axes=(1, 0))
    return jax.vmap(heads)(*tokens, floats["state"], valid, reset)


def blocked(rule, floats, valid, reset):
    """The same by the functions under test."""
    rates = [floats["log_decay"], *([floats["beta"]] if rule == "delta" else [])]
    tokens = (floats["q"], floats["k"], floats["v"])
    return RULES[rule](*tokens, *rates, floats["state"], valid=valid, reset=reset)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(function, rule, floats, valid, reset):
    """Gradients of a random function of all that is defined, then out (zero at padding) and the state."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=floats["v"].shape), rng.normal(size=floats["state"].shape)

    def total(floats):
        out, state = function(rule, floats, valid, reset)
        out = jnp.where(valid[..., None, None], out, 0)
        return jnp.sum(out * weights[0]) + jnp.sum(state * weights[1]), (out, state)

    grads, (out, state) = jax.grad(total, has_aux=True)(floats)
    return grads, out, state


def random_case(rule: str, length: int, ragged: bool = True):
    """Inputs of a call; where `ragged`, with rows that are partly padding and documents that begin in the middle."""
    rng = np.random.default_rng(length)
    heads = (HEADS,) if rule == "delta" else ()
    q, k = (rng.normal(size=(BATCH, length, *heads, KEY)) for _ in "qk")
    floats = {
        "q": q,
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": rng.normal(size=(BATCH, length, HEADS, VALUE)),
        "log_decay": -rng.exponential(0.1, (BATCH, length, HEADS)),
        "beta": rng.uniform(size=(BATCH, length, HEADS)),
        "state": rng.normal(size=(BATCH, HEADS, KEY, VALUE)),
    }
    valid, reset = np.ones((BATCH, length), bool), np.zeros((BATCH, length), bool)
    if ragged:
        valid[0, length - length // 3 :] = False
        valid[1, rng.integers(0, length, 4)] = False
        reset[1, [0, length // 2, length - 1]] = True
        reset[2, rng.integers(0, length, 3)] = True
    return {name: jnp.asarray(x, jnp.float32) for name, x in floats.items()}, jnp.asarray(valid), jnp.asarray(reset)


@pytest.mark.parametrize("length,ragged", [(1, False), (37, True), (128, False), (150, True)])
@pytest.mark.parametrize("rule", BASELINES)
def test_blocks_equal_single_tokens(rule, length, ragged):
    """Outputs, the last state and every gradient, in rows shorter and longer than a block."""
    case = random_case(rule, length, ragged)
    got, want = run(blocked, rule, *case), run(reference, rule, *case)
    assert relative(got[1], want[1]) < 1e-5
    assert relative(got[2], want[2]) < 1e-5
    for name in case[0].keys() - ({"beta"} if rule == "mamba2" else set()):
        assert relative(got[0][name], want[0][name]) < 1e-5, name


@pytest.mark.parametrize("rule", BASELINES)
def test_masks_and_state_may_be_left_out(rule):
    floats, valid, reset = random_case(rule, 128, ragged=False)
    rates = [floats[name] for name in ("log_decay", "beta")][: 1 if rule == "mamba2" else 2]
    plain = jax.jit(RULES[rule])(floats["q"], floats["k"], floats["v"], *rates)
    _, out, state = run(blocked, rule, floats | {"state": 0 * floats["state"]}, valid, reset)
    assert relative(plain[0], out) < 1e-6 and relative(plain[1], state) < 1e-6


@pytest.mark.parametrize("rule", BASELINES)
def test_bfloat16_stays_near_float32(rule):
    floats, *masks = random_case(rule, 150)
    low = {name: floats[name].astype(jnp.bfloat16) for name in "qkv"}
    rounded = floats | {name: x.astype(jnp.float32) for name, x in low.items()}
    got, want = run(blocked, rule, floats | low, *masks), run(reference, rule, rounded, *masks)
    assert got[1].dtype == jnp.bfloat16 and got[2].dtype == jnp.float32
    assert relative(got[1], want[1]) < 1e-2 and relative(got[2], want[2]) < 1e-2


@pytest.mark.parametrize("rule", BASELINES)
def test_strong_decay_gives_no_infinity(rule):
    """A sum of log decays far below what exp can hold, and its gradient."""
    floats, *masks = random_case(rule, 150)
    floats["log_decay"] = 1e4 * floats["log_decay"]
    got, want = run(blocked, rule, floats, *masks), run(reference, rule, floats, *masks)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(got))
    assert relative(got[1], want[1]) < 1e-5 and relative(got[2], want[2]) < 1e-5


def parameters(config: config_lib.ModelConfig) -> int:
    """Of one layer's memory, counted on the module."""
    x = jnp.zeros((1, 1, config.d_model))
    shared = layers.Shared(rope=(x, x), local_rope=(x, x), window=1, sinks=0)
    module = decoder.MEMORIES[config.mixer](config)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, None, shared)["params"])
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_as_many_parameters_as_the_memory():
    configs = {name: config_lib.preset(name) for name in config_lib.PRESETS}
    configs["tiny"] = TINY.replace(d_model=64, n_mem=2, d_mem=32)
    for name in ("tiny", "qwen3-0.6b", "gemma-3-270m"):
        assert parameters(configs[name]) == configs[name].memory_budget, name
    for name, config in configs.items():
        for mixer in BASELINES:
            share = parameters(config.replace(mixer=mixer)) / config.memory_budget
            assert abs(share - 1) < 0.05, (name, mixer, share)


def test_a_budget_too_small_is_named():
    with pytest.raises(ValueError, match=r"mixer='mamba2' has no state size of 8 or more .*: raise d_mem=1"):
        TINY.replace(mixer="mamba2", n_mem=1, d_mem=1)


def test_no_blind_gap_without_chunks(recwarn):
    for mixer in BASELINES:
        TINY.replace(mixer=mixer, chunk=100)
    assert not recwarn.list


@pytest.mark.slow
@pytest.mark.parametrize("mixer", BASELINES)
def test_the_law(mixer, short_blocks):
    """Prefill in one piece = in any pieces = token by token = training forward; outputs and states; ragged rows."""
    config = TINY.replace(mixer=mixer)
    params = random_params(config)
    lengths = np.array([LENGTH, 17, 3])
    tokens = random_tokens(3)
    want = forward(config, params, tokens)
    rng = np.random.default_rng(1)
    ways = {
        "one piece": [[n] for n in lengths],
        "token by token": [[1] * n for n in lengths],
        "random": [random_split(rng, n, LENGTH) for n in lengths],
    }
    states = {}
    for name, splits in ways.items():
        got, states[name] = read_in_pieces(config, params, tokens, lengths, splits)
        for row, length in enumerate(lengths):
            assert relative(got[row, :length], want[row, :length]) < 2e-5, (name, row)
    first = states.pop("one piece")
    assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, state_lib.init_state(config, 3))
    for name, state in states.items():
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(state), strict=True):
            assert np.linalg.norm(a - b) <= 2e-5 * max(np.linalg.norm(a), 1.0), name


@pytest.mark.parametrize("mixer", BASELINES)
def test_packed_documents_equal_separate_rows(mixer, short_blocks):
    config = TINY.replace(mixer=mixer)
    params, tokens = random_params(config), random_tokens(1)
    spans = [(0, 10), (10, 11), (11, 26)]
    segments, rows = np.zeros((1, LENGTH), np.int32), np.zeros((len(spans), LENGTH), np.int32)
    for number, (start, end) in enumerate(spans):
        segments[:, start:end] = number + 1
        rows[number, : end - start] = tokens[0, start:end]
    packed, separate = forward(config, params, tokens, segments), forward(config, params, rows)
    for number, (start, end) in enumerate(spans):
        assert relative(packed[0, start:end], separate[number, : end - start]) < 2e-5


@pytest.mark.parametrize("mixer", BASELINES)
def test_alpha_and_write_are_its_controls(mixer, short_blocks):
    """Silent, it is windowed attention; with writing off, it knows nothing beyond window and convolutions."""
    config, tokens = TINY.replace(mixer=mixer), random_tokens(3)
    params = random_params(config)
    windowed = forward(config.replace(mixer="swa"), lm.split_params(params)[0], tokens)
    assert relative(forward(config, silence(params), tokens), windowed) < 1e-6
    assert relative(forward(config, params, tokens), windowed) > 1e-2
    shallow = params | {"layers": jax.tree.map(lambda leaf: leaf[:1], params["layers"])}
    tokens[1] = tokens[0]
    tokens[1, :4] = (tokens[1, :4] + 1) % TINY.vocab_size
    for write in (True, False):
        now = config.replace(n_layers=1, sinks=0, write=write)
        one, other = forward(now, shallow, tokens)[:2, 4 + config.window + config.conv_kernel :]
        assert relative(one, other) > 1e-4 if write else relative(one, other) < 1e-6


def test_variants_keep_the_mixer():
    config = TINY.replace(mixer="delta")
    variants = divergence.standard_variants(config, lm.split_params(random_params(config))[1])
    assert [(v.config.mixer, v.config.write) for v in variants] == [("swa", True), ("delta", True), ("delta", False)]


@pytest.mark.parametrize("mixer", BASELINES)
def test_saved_with_its_mixer(tmp_path, mixer):
    config = TINY.replace(mixer=mixer)
    params = random_params(config)
    allmem_jax.save_pretrained(tmp_path / "model", config, params)
    loaded_config, loaded, _ = allmem_jax.load_pretrained(tmp_path / "model")
    assert loaded_config == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    windowed_config, windowed, _ = allmem_jax.load_pretrained(tmp_path / "model", mixer="swa")
    assert windowed_config.mixer == "swa" and jax.tree.structure(windowed) == jax.tree.structure(params)
    with pytest.raises(ValueError, match=f"is a memory for mixer='{mixer}', not for mixer='allmem'"):
        allmem_jax.load_pretrained(tmp_path / "model", mixer="allmem")
    with pytest.raises(ValueError, match="missing: fast_gate"):
        allmem_jax.save_pretrained(tmp_path / "other", config.replace(mixer="allmem"), params)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("mixer", BASELINES)
def test_generates_and_its_state_is_a_file(tmp_path, mixer, short_blocks):
    config = TINY.replace(mixer=mixer)
    params = random_params(config)
    prompts = [random_tokens(1, length, seed=length)[0].tolist() for length in (1, 12)]
    answers = generation.generate(params, config, prompts, max_tokens=6, piece=5)
    rows = np.zeros((3, LENGTH), np.int32)
    for row, prompt, answer in zip(rows, prompts, answers, strict=False):
        row[: len(prompt) + 6] = prompt + answer
    predicted = np.asarray(forward(config, params, rows)).argmax(-1)
    for row, prompt, answer in zip(predicted, prompts, answers, strict=False):
        assert answer == row[len(prompt) - 1 : len(prompt) + 5].tolist()
    state = jax.tree.map(lambda leaf: leaf + 1, state_lib.init_state(config, 2))
    state_lib.save_state(tmp_path / "book", config, state)
    jax.tree.map(np.testing.assert_array_equal, state_lib.load_state(tmp_path / "book", config), state)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", BASELINES)
def test_distils_one_step(mixer):
    """One update of training: finite, of alpha alone at first, with the rates that the memory reports."""
    recipe = FinetuneConfig(
        model="tiny",
        out="unused",
        mixer=mixer,
        steps=2,
        d_mem=8,
        window=(6, 6),
        sinks=(1, 1),
        chunk=(8,),
        seq_length=24,
        batch=2,
        warmup=0,
    )
    recipe.check()
    assert recipe.identity()["mixer"] == mixer
    start = models.load(recipe)
    assert start.config.mixer == mixer
    optimizer = compiled.optimizer(recipe)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 25)).astype(np.int32)
    batch = steps.Batch(jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]), jnp.ones((2, 24), bool))
    step = jax.jit(functools.partial(steps.train_step, config=start.config, loss=steps.Loss(), optimizer=optimizer))
    teacher = jnp.asarray(np.random.default_rng(1).normal(size=(2, 24, start.config.d_model)), jnp.float32)
    state = steps.init_state(start.memory, optimizer)
    after, values = step(state, start.backbone, batch, teacher, np.int32(6), np.int32(1), jax.random.key(0))
    assert int(after.skipped) == 0 and float(values["alpha_rms"]) > 0
    assert {"memory_lr", "memory_decay", "memory_state"} <= values.keys()
    again, values = step(after, start.backbone, batch, teacher, np.int32(6), np.int32(1), jax.random.key(0))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), after.trained, again.trained)
    assert all(jax.tree.leaves(moved)), moved


def test_sharded_like_the_memory():
    mesh = jax.sharding.AbstractMesh((1, 2, 2, 1), sharding.AXES)
    for mixer in BASELINES:
        config = TINY.replace(mixer=mixer, n_mem=2)
        shapes = jax.eval_shape(functools.partial(lm.init_memory, config))
        leaves = jax.tree_util.tree_leaves_with_path(sharding.tree_shardings(shapes, mesh))
        specs = {sharding.path_string(path).removeprefix("layers/memory/"): tuple(leaf.spec) for path, leaf in leaves}
        assert specs["z_proj/kernel"] == (None, "fsdp", "tensor")
        assert specs["out_proj/kernel"] == (None, "tensor", "fsdp")
        narrow = ("b_proj", "c_proj", "dt_proj") if mixer == "mamba2" else ("beta_proj", "decay_proj")
        assert all(specs[f"{name}/kernel"] == (None, "fsdp", None) for name in narrow)
        assert specs["x_conv/kernel" if mixer == "mamba2" else "k_conv/kernel"] == (None, None, "tensor")
