"""Counts of parameters, bytes and operations against arrays, formulas' parts and compiled programs; timing's sums."""

import contextlib
import functools
import io
import math

import jax
import jax.numpy as jnp
import pytest

from allmem_jax import cli
from allmem_jax.decoding import generation
from allmem_jax.evaluation import cost, latency
from allmem_jax.model import config as config_lib
from allmem_jax.model import lm, state
from allmem_jax.reporting import sections

pytestmark = pytest.mark.core
MEMORIES = config_lib.MEMORY_MIXERS


def tiny(**changes):
    fields = dict(
        vocab_size=61,
        d_model=16,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        d_ff=24,
        d_mem=8,
        window=12,
        sinks=2,
        chunk=8,
    )
    return config_lib.ModelConfig(**(fields | changes))


def shapes(config):
    return jax.eval_shape(lambda: lm.init_params(config))


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_embeddings": False, "qkv_bias": True}, {"qk_norm": True, "n_mem": 3}, *({"mixer": m} for m in MEMORIES)],
)
def test_groups_add_up_to_the_parameters(changes):
    config = tiny(**changes)
    groups = cost.parameter_groups(config)
    params = shapes(config)
    assert sum(groups.values()) == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert groups["memory"] == sum(leaf.size for leaf in jax.tree.leaves(lm.split_params(params)[1]))
    assert groups["embedding"] == 61 * 16
    assert groups["head"] == (0 if config.tie_embeddings else 61 * 16)


def test_a_mixer_without_memory_counts_the_one_that_conversion_adds():
    assert cost.parameter_groups(tiny(mixer="full")) == cost.parameter_groups(tiny())


@pytest.mark.parametrize("name, millions, share", [("qwen3-0.6b", 66, 0.099), ("qwen3-1.7b", 126, 0.068)])
def test_the_paper_s_added_parameters(name, millions, share):
    config = config_lib.preset(name)
    assert abs(cost.parameter_groups(config)["memory"] / 1e6 - millions) <= 1
    assert cost.added_share(config) == pytest.approx(share, abs=0.001)


def test_state_is_constant_and_the_cache_is_not():
    config = tiny()
    short, long = cost.state_bytes(config, 100), cost.state_bytes(config, 1000)
    for mixer in (*MEMORIES, "swa"):
        assert short[mixer] == long[mixer] == state.state_bytes(config.replace(mixer=mixer))
    assert long["full"] == 10 * short["full"] == 1000 * config.n_layers * 2 * 2 * 8 * 4
    assert cost.state_bytes(config.replace(dtype="bfloat16"), 100)["full"] * 2 == short["full"]
    assert len({cost.state_parts(config, 100, mixer)["cache"] for mixer in (*MEMORIES, "swa")}) == 1


def test_projections_are_two_operations_a_weight():
    config = tiny()
    params = shapes(config)
    flops = cost.flops_per_token(config, 100)
    for part, group in (("projections", "attention"), ("mlp", "mlp")):
        assert flops[part] == 2 * sum(leaf.size for leaf in jax.tree.leaves(params["layers"][group]))
    assert flops["head"] == 2 * 16 * 61


def test_attention_grows_with_the_context_only_when_full():
    config = tiny()
    assert cost.flops_per_token(config, 5, "full") == cost.flops_per_token(config, 5, "swa")
    assert cost.flops_per_token(config, 100, "full")["attention"] == 2 * 4 * 4 * 8 * 100
    for mixer in (*MEMORIES, "swa"):
        near, far = (cost.flops_per_token(config, context, mixer) for context in (100, 100_000))
        assert near == far and near["attention"] == 2 * 4 * 4 * 8 * 14
    assert cost.flops_per_token(config, 100, "swa")["memory"] == 0


def test_local_layers_see_their_own_window():
    config = tiny(local_layers=(True, False), local_window=10)
    per_key = 4 * 4 * 8
    assert cost.flops_per_token(config, 100, "full")["attention"] == per_key * (10 + 100)
    assert cost.flops_per_token(config, 100)["attention"] == per_key * (10 + 14)
    assert cost.state_bytes(config, 100)["full"] == (10 + 100) * 2 * 2 * 8 * 4


@pytest.mark.parametrize("mixer", ["full", "swa"])
def test_prefill_sees_the_mean_of_what_its_tokens_see(mixer):
    config = tiny(local_layers=(True, False), local_window=10)
    each = [cost.flops_per_token(config, context, mixer)["attention"] for context in range(1, 31)]
    assert cost.prefill_flops_per_token(config, 30, mixer)["attention"] == round(sum(each) / 30)


def test_the_memory_s_matrix_products():
    """Projections from the parameter shapes; fast weights from counting the products of the closed form."""
    config = tiny(chunk=10**6, window=10**6)
    heads, dim, hidden = config.memory_heads, config.d_mem, config.memory_hidden
    memory = lm.split_params(shapes(config))[1]["layers"]["memory"]
    kernels = [leaf["kernel"] for name, leaf in memory.items() if name.endswith(("_proj", "_conv"))]
    slow = 2 * sum(math.prod(leaf.shape) for leaf in kernels)
    products = 3 + 3 + 3  # read; gate k, up k, down^T v; outer products
    fast = config.n_layers * products * 2 * heads * hidden * dim
    assert cost.prefill_flops_per_token(config, 10**6)["memory"] == slow + fast


def test_errors():
    with pytest.raises(ValueError, match="context=0"):
        cost.flops_per_token(tiny(), 0)
    with pytest.raises(ValueError, match="context=0"):
        cost.state_bytes(tiny(), 0)
    with pytest.raises(ValueError, match="mixer='sva'"):
        cost.flops_per_token(tiny(), 10, "sva")
    with pytest.raises(ValueError, match="piece=256"):
        latency.measure(tiny(), contexts=(100,))
    with pytest.raises(ValueError, match="decode=0"):
        latency.measure(tiny(), decode=0)


# Compiled programs. One layer, so that the scan over layers is counted in full; heads as wide as Qwen3's and few words
# and hidden units, so that what the formulas leave out or count alike in every mixer does not hide the rest.


def one_layer(mixer="swa", **changes):
    fields = dict(
        vocab_size=32,
        d_model=256,
        n_layers=1,
        n_heads=4,
        n_kv_heads=2,
        head_dim=128,
        d_ff=32,
        d_mem=64,
        window=512,
        sinks=0,
        chunk=128,
        mixer=mixer,
    )
    return config_lib.ModelConfig(**(fields | changes))


@functools.cache
def decode_step(config):
    """The program of `generation.decode_step`, not yet compiled."""
    arguments = jax.eval_shape(
        lambda: (
            lm.init_params(config),
            jnp.zeros((1, 32)),
            state.init_state(config, 1),
            jnp.zeros(1, bool),
            jax.random.key(0),
        )
    )
    params, *rest = arguments
    return generation.decode_step.lower(params, config, *rest, generation.GREEDY)


@functools.cache
def forward(config, length):
    """The program of the forward pass over a row, not yet compiled."""
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return jax.jit(lambda params, x: lm.AllMemLM(config).apply({"params": params}, x)).lower(shapes(config), tokens)


def operations(program):
    return program.cost_analysis()["flops"]


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MEMORIES)
def test_the_memory_in_the_decode_step(mixer):
    """What the program has more than that of windowed attention alone is the memory: its chunk ends at every token."""
    for read_out in ("full", "difference"):
        config = one_layer(mixer, chunk=1, read_out=read_out)
        counted = operations(decode_step(config)) - operations(decode_step(one_layer()))
        assert counted == pytest.approx(cost.flops_per_token(config, 10**6)["memory"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("mixer, slack", [("swa", 0.03), ("mamba2", 0.03), ("delta", 0.03), ("allmem", 0.09)])
def test_the_compiled_decode_step(mixer, slack):
    """All operations, of which fusions repeat some on AllMem's fast weights; and bytes, which it overwrites in place.

    The code generator's effort does not change what is computed. Of several key heads a CPU multiplies all at once.
    """
    config = one_layer(mixer, chunk=1, n_kv_heads=1)  # chunk: or the operations at its end are counted at every token
    program = decode_step(config).compile(compiler_options={"xla_backend_optimization_level": 0})
    formula = sum(cost.flops_per_token(config, 10**6).values())
    assert formula <= operations(program) <= (1 + slack) * formula
    assert program.memory_analysis().alias_size_in_bytes == cost.state_bytes(config, 10**6)[mixer]


@pytest.mark.slow
def test_full_attention_is_a_window_as_long_as_the_context():
    near, far = (one_layer(window=window, n_kv_heads=1) for window in (512, 2048))
    counted = operations(decode_step(far)) - operations(decode_step(near))
    formula = [sum(cost.flops_per_token(far, context, "full").values()) for context in (512, 2048)]
    assert counted == pytest.approx(formula[1] - formula[0], rel=0.03)
    cache = cost.state_parts(far, 2048, "full")["cache"]
    assert cache == cost.state_parts(far, 2048, "swa")["cache"] == 2048 * 2 * 128 * 4


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MEMORIES)
def test_the_memory_in_prefill(mixer):
    """One block of tokens, so that the scan over blocks is counted in full as well."""
    config, length = one_layer(mixer, chunk=64), 64
    counted = operations(forward(config, length)) - operations(forward(one_layer(), length))
    assert counted / length == pytest.approx(cost.prefill_flops_per_token(config, length)["memory"], rel=0.02)


@pytest.mark.slow
def test_prefill_without_memory():
    """Attention in one block computes the masked half as well; its softmax is what the formula leaves out."""
    config, length = one_layer(), 64
    parts = cost.prefill_flops_per_token(config, length)
    whole = sum(parts.values()) - parts["attention"] + 4 * 4 * 128 * length
    assert whole <= operations(forward(config, length)) / length <= 1.1 * whole


# The section of the report, and the paper's claim.


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What `allmem cost` prints, and the section that it saves."""
    folder, out = tmp_path_factory.mktemp("cost"), io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main(["cost", "--out", str(folder)]) == 0
    return out.getvalue(), sections.load(folder / "cost.json")


@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen3-1.7b"])
def test_the_claim_at_128k(printed, name):
    """At most 1/10 of the operations by both countings; at most 1/20 of the bytes with the paper's window of 4096.

    A window of 8192 alone holds more than 1/16 of the keys, so that the bytes cannot be 1/20.
    """
    narrow, wide = (
        printed[1].data["times_less_than_full_attention"][f"{name}, window {window}"]["allmem"]
        for window in (4096, 8192)
    )
    assert min(narrow["mixer"], narrow["core"], wide["mixer"], wide["core"]) >= 10
    assert narrow["state"] >= 20
    assert 14 < wide["state"] < 131072 / 8192


def test_the_section(printed):
    text, section = printed
    assert len(section.plots) == 4 and all(plot.log_x and plot.log_y for plot in section.plots)
    for plot in section.plots:
        assert set(plot.lines) == set(config_lib.MIXERS)
        assert all(xs == tuple(2.0**power for power in range(10, 19)) for xs, _ in plot.lines.values())
    for plot in section.plots[1::2]:
        assert len(set(plot.lines["allmem"][1])) == 1
        full = plot.lines["full"][1]
        assert full[-1] == pytest.approx(256 * full[0])
    assert all(paragraph in text for paragraph in section.text)
    assert all(cell in text for table in section.tables for row in table.rows for cell in row)


# Times: what is compiled and recorded, never how long it takes.


@pytest.mark.slow
def test_programs_are_compiled_once_unless_attention_is_full():
    config = tiny(vocab_size=59)  # of no other test: programs are kept
    rows = latency.measure(config, mixers=("full", "mamba2"), contexts=(16, 64), piece=8, repeats=2, decode=2)
    assert [(row["mixer"], row["context"], row["programs"]) for row in rows] == [
        ("full", 16, 2),
        ("full", 64, 4),
        ("mamba2", 16, 2),
        ("mamba2", 64, 2),
    ]
    for row in rows:
        position = 4 if row["mixer"] == "full" else 0  # the only bytes of full attention's state that are no cache
        assert row["state_bytes"] == cost.state_bytes(config, row["context"])[row["mixer"]] + position
        assert row["prefill_s"] > 0 and row["decode_s"] > 0


def test_the_command_measures_a_small_shape(monkeypatch, tmp_path, capsys):
    asked = []

    def measure(config):
        asked.append(config)
        times = {"prefill_s": 0.002, "decode_s": 0.01, "state_bytes": 10**6, "programs": 2}
        return [{"mixer": mixer, "context": n, **times} for mixer in ("full", "allmem") for n in (1024, 4096)]

    monkeypatch.setattr(latency, "measure", measure)
    assert cli.main(["cost", "gemma-3-270m", "--windows", "512", "--measure", "--out", str(tmp_path)]) == 0
    (config,) = asked
    assert (config.n_layers, config.window, config.local_layers) == (2, 512, (True, True))
    section = sections.load(tmp_path / "latency-gemma-3-270m.json")
    assert section.text[0].startswith("allmem: at 4,096 tokens")
    assert section.tables[0].rows[1] == ("full", "4096", "2.000", "10.00", "1.00", "2")
    assert section.data["hardware"]["jax"] == jax.__version__
    assert "prefill ms/token" in capsys.readouterr().out
