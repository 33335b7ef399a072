"""Planning: memory by part, operations by formula, advice; and no buffer of a sequence's logits in the real step."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest

from allmem_jax.checkpoints import families, hf_config
from allmem_jax.evaluation import cost
from allmem_jax.model import config as config_lib
from allmem_jax.model import sharding
from train import finetune
from train.loop import estimate, flops, plan
from train.recipe import FinetuneConfig

VOCABULARY, POSITIONS = 251, 128  # a number of tokens that no other axis has


@pytest.fixture(scope="module")
def recipe():
    return FinetuneConfig(
        model="tiny",
        out="unused",
        batch=1,
        seq_length=512,
        window=(64, 64),
        sinks=(4, 4),
        chunk=(64,),
        d_mem=8,
        loss_block=16,
        positions=POSITIONS / 512,
    )


@pytest.fixture(scope="module")
def found(recipe):
    return compiled(recipe)


def compiled(recipe):
    return plan.compile_step(recipe, planned(recipe), sharding.make_mesh())


def planned(recipe):
    return plan.planned_config(recipe).replace(vocab_size=VOCABULARY)


def logits_in(text):
    """The largest number of positions whose logits an array of the program holds."""
    shapes = (tuple(map(int, dims.split(","))) for dims in re.findall(r"\b(?:f32|bf16)\[([\d,]+)\]", text))
    return max((math.prod(shape) // VOCABULARY for shape in shapes if VOCABULARY in shape), default=0)


@pytest.mark.parametrize("objective", ["distill", "pretrain"])
def test_no_logits_of_a_sequence(recipe, found, objective):
    config = dataclasses.replace(recipe, objective=objective)
    if objective == "pretrain":
        found = compiled(config)
    parameters = 32  # the embedding's other axis
    assert logits_in(found.text) <= parameters
    whole = compiled(dataclasses.replace(config, loss_block=512))
    assert logits_in(whole.text) >= POSITIONS  # the pattern does find logits where they are


def test_parts_add_up(recipe, found):
    state, frozen, _ = plan.abstract_arguments(recipe, planned(recipe), sharding.make_mesh())
    gib = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 2**30  # noqa: E731
    assert found.memory["frozen parameters"] == gib(frozen)
    assert found.memory["optimiser"] > 1.9 * found.memory["trained parameters"] == 1.9 * gib(state.trained)
    held = [value for part, value in found.memory.items() if not part.startswith("temporaries")]
    assert found.peak == pytest.approx(sum(held) + found.memory["temporaries of the step"])


def test_the_page(recipe, found):
    mesh = sharding.make_mesh()
    page = plan.describe(recipe, planned(recipe), found, "v5e:2x2", mesh, 0.5)
    assert "temporaries of the step" in page and "fits" in page and "tokens/s" in page
    full = plan.describe(recipe, planned(recipe), found._replace(peak=99.0), "v5e:2x2", mesh, 0.5)
    assert "DOES NOT FIT" in full and "more context splits a row's tokens" in full and "--loss_block" not in full
    refused = found._replace(peak=None, refused="RESOURCE_EXHAUSTED: too much")
    assert "the compiler refused" in plan.describe(recipe, planned(recipe), refused, "h100", mesh, 0.5)


# As XLA prints programs for TPUs, without shapes: a loop of 28 layers, a kernel in it, a fusion that only what it fuses
# names, and a conditional.
HLO = """HloModule jit_step, is_scheduled=true

%fused_computation.1 (param_0.1: bf16[8]) -> bf16[8] {
  ROOT %multiply.1 = bf16[8] multiply(%a, %b), metadata={op_name="jit(step)/while/body/layers/memory/q_norm/mul"}
}

%body.1_spmd (param.1: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %fusion.1 = bf16[8] fusion(%x), metadata={op_name="mlp/up_proj/dot_general"}, backend_config={"estimated_cycles":"70"}
  %fusion.2 = bf16[8] fusion(%x), kind=kLoop, calls=%fused_computation.1, backend_config={"estimated_cycles":"5"}
  %swa_forward_kernel.3 = bf16[8] custom-call(%x), custom_call_target="tpu_custom_call"
}

%condition.1 (param.2: (s32[], bf16[8])) -> pred[] {
  %constant.1 = s32[] constant(28)
  ROOT %compare.1 = pred[] compare(%i, %constant.1), direction=LT
}

%again (param.3: f32[8]) -> f32[8] {
  %copy.1 = f32[8] copy(%param.3), metadata={op_name="jit(step)/loss/sub"}, backend_config={"estimated_cycles":"900"}
}

%kept (param.4: f32[8]) -> f32[8] {
  %copy.2 = f32[8] copy(%param.4), metadata={op_name="jit(step)/loss/mul"}, backend_config={"estimated_cycles":"9"}
}

ENTRY %main.1_spmd (param: bf16[8]) -> bf16[8] {
  %while.1 = (s32[], bf16[8]) while(%tuple.1), condition=%condition.1, body=%body.1_spmd
  %conditional.1 = f32[8] conditional(%p, %x, %y), true_computation=%again, false_computation=%kept
  %copy.3 = f32[8] copy(%param), backend_config={"estimated_cycles":"4"}
}
"""


def test_the_compilers_estimates_by_part(recipe, found):
    """Loops count as often as they run, conditionals by their shortest branch; other devices' programs have none."""
    once = estimate.read(HLO)
    assert once.products == {"mlp": 28 * 70} and once.rest == {"memory": 28 * 5, "loss": 9, "elsewhere": 4}
    assert once.kernels == {"swa_forward_kernel": 28}
    assert estimate.read(HLO, HLO).total() == 2 * once.total() == 2 * (28 * 75 + 13)
    branches = "branch_computations={%kept, %again}"
    assert estimate.read(HLO.replace("true_computation=%again, false_computation=%kept", branches)) == once
    mesh = sharding.make_mesh()
    page = plan.describe(recipe, planned(recipe), found._replace(estimate=once), "v5e:2x2", mesh, 0.5)
    assert re.search(r"mlp +0.0 +0.0\n", page) and "28 swa_forward_kernel" in page and "of the peak is" in page
    assert "attention's kernels:" in page
    assert found.estimate.total() == 0
    assert "estimate" not in plan.describe(recipe, planned(recipe), found, "h100", mesh, 0.5)


def test_operations_of_attentions_kernels(recipe):
    """By hand: two products of 2 D operations for each query and key that it sees, in each head and layer."""
    config = planned(recipe)
    length, window, sinks = recipe.seq_length, 8, 2
    seen = [min(t + 1, window + sinks) for t in range(length)]
    pair = 4 * config.head_dim * config.n_heads * config.n_layers * recipe.batch
    runs = {"swa_forward_kernel": 3 * config.n_layers, "swa_gradient_kernel": config.n_layers}
    found = flops.attention_kernels(recipe, config, window, sinks, runs)
    want = pair * (length * (length + 1) // 2 + sum(seen) * (2 + 5 / 2))
    assert found == pytest.approx(want, rel=1e-3)
    assert flops.attention_kernels(recipe, config, window, sinks, {}) == 0


def test_bad_names_and_meshes(recipe, error_of):
    with pytest.raises(ValueError, match="compile_only='a100' must be v4, v5e"):
        plan.make(recipe, "a100", 0.4)
    with pytest.raises(ValueError, match="mfu=2 above 0"):
        plan.make(recipe, "h100", 2)
    with pytest.warns(UserWarning, match="tensor x context = 4 does not divide the 2 key heads"):
        plan.warn_of_repeated_work(plan.planned_config(recipe), {"tensor": 2, "context": 2})
    arguments = ["configs/smoke.py", "--model", "qwen9", "--compile_only", "h100"]
    assert "no preset 'qwen9'" in error_of(finetune.main, arguments)


def test_a_gguf_is_planned_by_its_header(recipe, smollm2_path, monkeypatch):
    monkeypatch.setattr(np, "memmap", None)  # no tensor is read
    config = plan.planned_config(dataclasses.replace(recipe, model=str(smollm2_path)))
    wanted = recipe.student(config_lib.preset("smollm2-135m"), remembers=False)
    assert families.differing_fields(config, wanted) == [] and config.n_mem == wanted.n_mem == 3
    assert (config.mixer, config.window, config.d_mem) == ("allmem", 64, 8)
    with pytest.raises(FileNotFoundError, match="no such file"):
        plan.planned_config(dataclasses.replace(recipe, model="nowhere.gguf"))


@pytest.mark.parametrize("name", config_lib.PRESETS)
def test_a_preset_and_its_checkpoint_get_as_many_memory_heads(name):
    config = config_lib.preset(name)
    read = hf_config.from_hf(hf_config.to_hf(config))
    heads = {1: 4, 2: 4, 3: 3, 5: 5, 8: 8, 32: 8}[config.n_kv_heads]
    assert (config.n_mem, read.n_mem, read.memory_heads) == (heads,) * 3


def test_operations_of_a_step():
    """Against the rule of 6 operations a parameter and token, where attention and memory are small."""
    recipe = FinetuneConfig(objective="pretrain", batch=2, seq_length=512, chunk=(64,), window=(64, 64), sinks=(0, 0))
    config = config_lib.preset("qwen3-1.7b", window=64, chunk=64, sinks=0)
    got = sum(flops.step_flops(recipe, config, 64, 0, 64).values())
    groups = cost.parameter_groups(config)
    dense = sum(groups[name] for name in ("attention", "mlp", "embedding", "memory"))  # embeddings are the head too
    assert got == pytest.approx(6 * 1024 * dense, rel=0.12)
    distilled = flops.step_flops(dataclasses.replace(recipe, objective="distill", positions=0.25), config, 64, 0, 64)
    assert distilled["teacher"] < distilled["student"] < distilled["backward"] < 2 * distilled["student"]
    assert flops.peak("TPU v5 lite") == 197e12 and flops.peak("TPU v5p") == 459e12 and flops.peak("cpu") is None
    line = {"window": 64, "sinks": 0, "chunk": 64}
    speed = flops.speed(recipe, config, line, 2.0, 4, "NVIDIA H100 80GB HBM3")
    assert speed == {"tokens_per_s": 512.0, "mfu": pytest.approx(got / 2 / 4 / 989e12)}
