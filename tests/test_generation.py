"""Generation: the same tokens as the plain forward pass, whatever the batch, the pieces and the prompt's length."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import TINY, random_params, random_tokens, relative

from allmem_jax.decoding import generation
from allmem_jax.model import functional, lm
from pallas_kernels import dots

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def params():
    return random_params(TINY)


def test_greedy_follows_the_forward_pass(params):
    """Ragged prompts, in pieces shorter than most of them, against the forward pass over the whole row."""
    prompts = [random_tokens(1, length, seed=length)[0].tolist() for length in (1, 7, 12)]
    out = generation.generate(params, TINY, prompts, max_tokens=10, piece=5)
    forward = jax.jit(lambda t: lm.AllMemLM(TINY).apply({"params": params}, t))
    for prompt, answer in zip(prompts, out, strict=True):
        row = np.zeros((1, 22), np.int32)
        row[0, : len(prompt) + 10] = prompt + answer
        predicted = np.asarray(forward(row)).argmax(-1)[0]
        assert answer == predicted[len(prompt) - 1 : len(prompt) + 9].tolist()


def test_full_mixer_generates_like_the_original(params):
    config = TINY.replace(mixer="full")
    prompt = random_tokens(1, 9)[0].tolist()
    (answer,) = generation.generate(params, config, [prompt], max_tokens=6, piece=5)
    row = np.asarray([prompt + answer], np.int32)
    predicted = np.asarray(jax.jit(lambda t: lm.AllMemLM(config).apply({"params": params}, t))(row)).argmax(-1)[0]
    assert answer == predicted[len(prompt) - 1 : -1].tolist()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="steps go on from numbers elsewhere")
def test_steps_on_a_cpu_go_on_from_bits(params):
    """They are those from numbers, leave the caller's state alone, and are read, saved and forked as numbers are."""
    config = TINY.replace(dtype="bfloat16")
    prompts = [random_tokens(1, length, seed=length)[0].tolist() for length in (7, 12)]
    logits, state = generation.prefill(params, config, prompts, piece=5)
    *_, (_, _, _, last) = generation.stream(params, config, logits, state, max_tokens=9, stop_tokens=())
    assert {leaf.dtype for leaf in jax.tree.leaves(last)} == {jnp.dtype(x) for x in ("uint16", "float32", "int32")}
    once, key = lm.unstack(params), jax.random.key(0)
    numbers = jax.tree.map(jnp.copy, state)
    for _ in range(9):
        *_, logits, numbers = generation.decode_step(
            once, config, logits, numbers, np.zeros(2, bool), key, generation.GREEDY
        )
    jax.tree.map(np.testing.assert_array_equal, functional.numbers(last), numbers)
    jax.tree.map(np.testing.assert_array_equal, functional.bits(numbers), last)
    after = [generation.prefill(params, config, prompts, state=each, piece=5) for each in (last, numbers)]
    jax.tree.map(np.testing.assert_array_equal, *after)


def test_stop_tokens_end_rows_one_by_one(params):
    prompts = [random_tokens(1, length, seed=length)[0].tolist() for length in (7, 12)]
    free = generation.generate(params, TINY, prompts, max_tokens=10, piece=5)
    stop = free[0][3]
    stopped = generation.generate(params, TINY, prompts, max_tokens=10, piece=5, stop_tokens=[stop])
    for whole, short in zip(free, stopped, strict=True):
        assert short == (whole[: whole.index(stop)] if stop in whole else whole)
    seen: list[tuple[list[int], list[bool]]] = []
    generation.generate(
        params,
        TINY,
        prompts,
        max_tokens=10,
        piece=5,
        stop_tokens=[stop],
        on_tokens=lambda tokens, live: seen.append((tokens.tolist(), live.tolist())),
    )
    streamed = [[tokens[row] for tokens, live in seen if live[row]] for row in range(2)]
    assert [[t for t in row if t != stop] for row in streamed] == stopped


def test_a_saved_state_answers_again(params):
    """Read once, ask twice: a state is a value, and using it does not change it."""
    book, questions = random_tokens(1, 15)[0].tolist(), [[3, 4], [5, 6, 7]]
    _, state = generation.prefill(params, TINY, [book], piece=5)
    for question in questions:
        asked = generation.generate(params, TINY, [question], max_tokens=4, piece=5, state=state)
        assert asked == generation.generate(params, TINY, [book + question], max_tokens=4, piece=5)


@pytest.mark.parametrize("mixer, tied", [("allmem", True), ("allmem", False), ("mamba2", True), ("delta", True)])
@pytest.mark.parametrize("dtype, units", [("float32", False), ("bfloat16", False), ("bfloat16", True)])
def test_unstacked_kernels_are_the_same_model(dtype, units, mixer, tied, monkeypatch):
    """Kernels of each layer as arrays of their own, and a head in parts where the processor has no units for bfloat16.

    The same logits for few rows and for many.
    """
    monkeypatch.setattr(dots, "multiplies_bfloat16", lambda: units)
    dots._turned.clear_cache()
    sizes = dict(vocab_size=2311, d_model=512)  # more than one part
    config = TINY.replace(dtype=dtype, mixer=mixer, tie_embeddings=tied, **sizes)
    backbone, memory = lm.split_params(random_params(config))
    backbone = jax.tree.map(lambda leaf: leaf.astype(dtype), backbone)
    params = lm.merge_params(backbone, memory)
    apart = lm.unstack(params, dtype=dtype)
    assert lm.unstack(apart) is apart and lm.variables(apart) is apart
    if jax.default_backend() == "cpu":
        kernels, mlp = apart["kernels"]["layers"]["mlp"]["gate_proj"]["kernel"], params["layers"]["mlp"]
        both = jnp.concatenate([mlp["gate_proj"]["kernel"], mlp["up_proj"]["kernel"]], axis=-1)
        assert np.array_equal(jnp.stack(kernels), both.swapaxes(1, 2))
        assert "up_proj" not in apart["params"]["layers"]["mlp"]
        assert len(apart["kernels"]["lm_head"]["kernel"]) == (1 if dtype == "float32" or units else 2)
    apply = jax.jit(lm.AllMemLM(config).apply)
    exact = jax.jit(lm.AllMemLM(config.replace(dtype="float32")).apply)
    for tokens in (random_tokens(1, 1), random_tokens(2, 9), random_tokens(2, 70)):
        got, stacked = (apply(lm.variables(given), tokens) for given in (apart, params))
        expected = exact({"params": jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)}, tokens)
        assert stacked.dtype == got.dtype == jnp.float32
        assert relative(got, expected) < max(1e-5, 1.2 * relative(stacked, expected))  # rounding grows with depth
        hidden = jax.random.normal(jax.random.key(0), (*tokens.shape, config.d_model), dtype)
        got, expected = (lm.logits(given, config, hidden) for given in (apart, params))
        assert relative(got, expected) < (1e-5 if dtype == "float32" else 1e-2)


def test_unstacking_can_give_back_the_room(params):
    """Donated kernels are gone once they are copied; the other arrays are shared."""
    mine = jax.tree.map(jnp.copy, params)
    apart = lm.unstack(mine, donate=True)
    if jax.default_backend() == "cpu":
        assert mine["layers"]["mlp"]["up_proj"]["kernel"].is_deleted()
        assert apart["params"]["embed"]["embedding"] is mine["embed"]["embedding"]
    tokens = random_tokens(1, 5)
    expected = lm.AllMemLM(TINY).apply({"params": params}, tokens)
    assert relative(lm.AllMemLM(TINY).apply(lm.variables(apart), tokens), expected) < 1e-5


def test_long_generation_compiles_once(params):
    """2,000 tokens, and prompts of many lengths: a program for steps, two for pieces, and a state of one size."""
    before = generation.decode_step._cache_size(), generation.prefill_piece._cache_size()
    config = TINY.replace(max_length=1234)  # its own cache entry
    for length in (3, 40, 111):
        logits, state = generation.prefill(params, config, [random_tokens(1, length)[0]], piece=16)
    steps = generation.stream(params, config, logits, state, max_tokens=2000)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    *_, (_, _, _, last) = steps
    assert int(last.position[0]) == 111 + 2000
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(last)) == size
    assert (generation.decode_step._cache_size(), generation.prefill_piece._cache_size()) == (
        before[0] + 1,
        before[1] + 2,
    )


def test_sampling_follows_the_distribution():
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))
    draw = jax.jit(lambda s: generation.sample(jax.random.key(0), np.tile(logits, (20_000, 1)), s))

    def frequencies(**settings) -> np.ndarray:
        settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings
        return np.bincount(draw(generation.Sampling(**settings)), minlength=4) / 20_000

    np.testing.assert_allclose(frequencies(), [0.5, 0.25, 0.15, 0.1], atol=0.015)
    np.testing.assert_allclose(frequencies(top_k=2), [2 / 3, 1 / 3, 0, 0], atol=0.015)
    np.testing.assert_allclose(frequencies(top_p=0.8), [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0], atol=0.015)
    np.testing.assert_allclose(frequencies(top_k=3, top_p=0.5), [1, 0, 0, 0], atol=0.015)
    np.testing.assert_allclose(frequencies(temperature=0.0), [1, 0, 0, 0])
    sharp = np.array([0.25, 0.0625, 0.0225, 0.01])
    np.testing.assert_allclose(frequencies(temperature=0.5), sharp / sharp.sum(), atol=0.015)
    assert draw._cache_size() == 1


def test_of_equally_likely_tokens_the_lower_ids_are_kept():
    """Exactly k, and exactly the smallest set that reaches p, whatever is tied with the last of them."""
    tied = np.zeros((2000, 6), np.float32)
    tied[:, 4] = 1.0
    draw = jax.jit(lambda s: generation.sample(jax.random.key(0), tied, s))
    share = np.exp([1, 0, 0, 0, 0, 0]) / (np.e + 5)  # of the likeliest token, and of each of the five others
    for settings, kept in (
        (generation.Sampling(1.0, 3, 1.0), {4, 0, 1}),
        (generation.Sampling(1.0, 0, float(share[0] + 1.5 * share[1])), {4, 0, 1}),
        (generation.Sampling(1.0, 2, 0.99), {4, 0}),
        (generation.Sampling(1.0, 0, 1.0), set(range(6))),
        (generation.Sampling(1.0, 99, 1.0), set(range(6))),
    ):
        assert set(np.asarray(draw(settings)).tolist()) == kept


def test_full_attention_goes_on_from_its_state(params):
    """Its cache grows with what is read; a window that has forgotten nothing is as good a beginning."""
    full = TINY.replace(mixer="full")
    text = random_tokens(1, 12, seed=3)[0].tolist()
    (expected,) = generation.generate(params, full, [text], max_tokens=6, piece=5)
    _, state = generation.prefill(params, full, [text[:7]], piece=5)
    for _ in range(2):  # forked, not consumed
        assert generation.generate(params, full, [text[7:]], max_tokens=6, piece=5, state=state) == [expected]
    logits, state = generation.prefill(params, full, [text[7:]], piece=5, state=state)
    steps = generation.stream(params, full, logits, state, max_tokens=6)
    assert [int(tokens[0]) for tokens, *_ in steps] == expected

    config = generation.full_as_windowed(full, 7)
    _, state = generation.prefill(params, config, [text[:7]], piece=5)
    grown, state = generation.with_room(full, state, 1, 600)
    assert grown.window == state.keys.shape[2] == 1024
    (answer,) = generation.generate(params, full, [text[7:]], max_tokens=6, piece=5, state=state)
    assert answer == expected


def test_full_attention_refuses_a_state_that_is_not_its_own(params):
    full = TINY.replace(mixer="full")
    windowed = TINY.replace(mixer="swa")
    forgotten = generation.state_lib.init_state(windowed, 1).replace(position=np.full(1, 40, np.int32))
    with pytest.raises(ValueError, match="has read 40 tokens and holds"):
        generation.generate(params, full, [[1]], max_tokens=2, state=forgotten)
    for other in (TINY, windowed.replace(n_layers=5)):
        with pytest.raises(ValueError, match="another model or mixer"):
            generation.prefill(params, full, [[1]], state=generation.state_lib.init_state(other, 1))


def test_texts_beyond_the_training_length_are_warned_of(params, monkeypatch):
    windowed, full = (TINY.replace(mixer=mixer, max_length=20) for mixer in ("swa", "full"))
    with pytest.warns(UserWarning, match="may reach 21 tokens.*trained on 20: full attention"):
        generation.warn_beyond(full, 15, 6)
    with pytest.warns(UserWarning, match="ends at token 21.*trained on 20.*sinks"):
        generation.warn_beyond(windowed, 21, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generation.warn_beyond(full, 14, 6)
        generation.warn_beyond(windowed, 20, 100)
    monkeypatch.setattr(generation, "prefill", lambda *_, **__: (_ for _ in ()).throw(InterruptedError))
    with pytest.warns(UserWarning, match="ends at token 21") as found, pytest.raises(InterruptedError):
        generation.generate(params, windowed, [[1] * 21, [1] * 3], max_tokens=9)
    assert len(found) == 1


def test_seeds_repeat(params):
    prompt = [random_tokens(1, 7)[0].tolist()]
    hot = generation.Sampling(temperature=1.5)
    runs = [generation.generate(params, TINY, prompt, max_tokens=8, piece=5, sampling=hot, seed=s) for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    "prompts,settings,message",
    [
        ([], {}, "prompts is empty"),
        ([[1, 2], []], {}, "prompt 1 is empty"),
        ([[1, 99]], {}, "outside \\[0, 61\\)"),
        ([[1]], {"max_tokens": -1}, "max_tokens=-1"),
        ([[1]], {"sampling": generation.Sampling(top_p=0.0)}, "top_p=0.0"),
        ([[1]], {"sampling": generation.Sampling(temperature=-1.0)}, "temperature=-1.0"),
        ([[1]], {"piece": 0}, "piece=0"),
    ],
)
def test_bad_requests_are_named(params, prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        generation.generate(params, TINY, prompts, **({"max_tokens": 2} | settings))
