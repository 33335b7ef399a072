"""Counts of parameters, bytes and operations against what the arrays and the formulas' parts say."""

import math

import jax
import pytest

from allmem_jax import config as config_lib
from allmem_jax import cost, model, state

pytestmark = pytest.mark.core


def tiny(**changes):
    fields = dict(
        vocab_size=61, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=24, d_mem=8, window=12,
        sinks=2, chunk=8,
    )  # fmt: skip
    return config_lib.ModelConfig(**(fields | changes))


def shapes(config):
    return jax.eval_shape(lambda: model.init_params(config))


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "qkv_bias": True}, {"qk_norm": True, "n_mem": 3}])
def test_groups_add_up_to_the_parameters(changes):
    config = tiny(**changes)
    groups = cost.parameter_groups(config)
    params = shapes(config)
    assert sum(groups.values()) == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert groups["memory"] == sum(leaf.size for leaf in jax.tree.leaves(model.split_params(params)[1]))
    assert groups["embedding"] == 61 * 16
    assert groups["head"] == (0 if config.tie_embeddings else 61 * 16)
    assert groups == cost.parameter_groups(config.replace(mixer="full"))


@pytest.mark.parametrize("name, millions, share", [("qwen3-0.6b", 66, 0.099), ("qwen3-1.7b", 126, 0.068)])
def test_the_paper_s_added_parameters(name, millions, share):
    config = config_lib.preset(name)
    assert abs(cost.parameter_groups(config)["memory"] / 1e6 - millions) <= 1
    assert cost.added_share(config) == pytest.approx(share, abs=0.001)


def test_state_is_constant_and_the_cache_is_not():
    config = tiny()
    short, long = cost.state_bytes(config, 100), cost.state_bytes(config, 1000)
    assert short["allmem"] == long["allmem"] == state.state_bytes(config)
    assert long["full"] == 10 * short["full"] == 1000 * config.n_layers * 2 * 2 * 8 * 4
    assert cost.state_bytes(config.replace(dtype="bfloat16"), 100)["full"] * 2 == short["full"]


def test_projections_are_two_operations_a_weight():
    config = tiny()
    params = shapes(config)
    kernels = [params["layers"][group] for group in ("attention", "mlp")]
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(kernels))
    flops = cost.flops_per_token(config, 100)
    assert flops["projections"] == 2 * weights
    assert flops["head"] == 2 * 16 * 61


def test_attention_grows_with_the_context_only_when_full():
    config = tiny()
    assert cost.flops_per_token(config, 5, "full") == cost.flops_per_token(config, 5, "swa")
    assert cost.flops_per_token(config, 100, "full")["attention"] == 2 * 4 * 4 * 8 * 100
    near, far = (cost.flops_per_token(config, context) for context in (100, 100_000))
    assert near == far and near["attention"] == 2 * 4 * 4 * 8 * 14
    assert cost.flops_per_token(config, 100, "swa")["memory"] == 0


def test_local_layers_see_their_own_window():
    config = tiny(local_layers=(True, False), local_window=10)
    per_key = 4 * 4 * 8
    assert cost.flops_per_token(config, 100, "full")["attention"] == per_key * (10 + 100)
    assert cost.flops_per_token(config, 100)["attention"] == per_key * (10 + 14)
    assert cost.state_bytes(config, 100)["full"] == (10 + 100) * 2 * 2 * 8 * 4


def test_the_memory_s_matrix_products():
    """Projections from the parameter shapes; fast weights from counting the products of the closed form."""
    config = tiny(chunk=10**6, window=10**6)
    heads, dim, hidden = config.memory_heads, config.d_mem, config.memory_hidden
    memory = model.split_params(shapes(config))[1]["layers"]["memory"]
    kernels = [leaf["kernel"] for name, leaf in memory.items() if name.endswith(("_proj", "_conv"))]
    slow = 2 * sum(math.prod(leaf.shape) for leaf in kernels)
    products = 3 + 3 + 3  # read; gate k, up k, down^T v; outer products
    fast = config.n_layers * products * 2 * heads * hidden * dim
    assert cost.flops_per_token(config, 100)["memory"] == slow + fast


def test_errors():
    with pytest.raises(ValueError, match="context=0"):
        cost.flops_per_token(tiny(), 0)
    with pytest.raises(ValueError, match="mixer='sva'"):
        cost.flops_per_token(tiny(), 10, "sva")
