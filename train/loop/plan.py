"""What a run will need, found by compiling its real step for devices that need not be there.

    python -m train.finetune configs/qwen3_1_7b_128k.py --model qwen3-1.7b --compile_only v5p:4x4x4

Memory comes from the compiler of those devices (what does not fit is its own error), operations from
`train.loop.flops`, and the speed from the share of the peak that one expects to reach. The compilers of TPUs also
estimate what the step takes outside of kernels, by part.
"""

import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from allmem_jax.checkpoints import load as load_lib
from allmem_jax.model import config as config_lib
from allmem_jax.model import sharding
from pallas_kernels.tools import topology
from train.loop import compiled as compiled_lib
from train.loop import estimate as estimate_lib
from train.loop import flops, steps, tiny
from train.recipe import FinetuneConfig

# By the first part of a topology's name: what `flops.PEAK` calls it, and GiB of memory that a program may use.
DEVICES = {
    "v4": ("TPU v4", 31.0),
    "v5e": ("TPU v5e", 15.7),
    "v5p": ("TPU v5", 95.0),
    "v6e": ("TPU v6", 31.2),
    "tpu7x": ("TPU7x", 94.7),
    "h100": ("H100", 74.0),  # of 79.1, as JAX leaves a share to others
}
# Cycles a second that those peaks imply, where a device is one core.
CLOCK = {"v5e": 1.5e9, "v6e": 1.75e9, "tpu7x": 2.2e9}


class Plan(NamedTuple):
    """What compiling tells.

    Attributes:
      memory: GiB of a device by part; temporaries of the teacher and of the student are not there at once.
      peak: GiB, the most at a time; None where the compiler refused.
      refused: the compiler's words where it did, else "".
      operations: of one step by part, over all devices.
      text: of the compiled step (optimised HLO); "" where there is none.
      estimate: of the cycles of teacher and student, see `estimate`.
    """

    memory: dict[str, float]
    peak: float | None
    refused: str
    operations: dict[str, float]
    text: str
    estimate: estimate_lib.Estimate = estimate_lib.read()


def make(config: FinetuneConfig, name: str, mfu: float) -> str:
    """A page on what the recipe needs on the devices called `name`, and what to change when it does not fit."""
    if name.split(":")[0] not in DEVICES or not 0 < mfu <= 1:
        raise ValueError(
            f"compile_only={name!r} must be {', '.join(DEVICES)} or a topology of them such as v5p:4x4x4, and "
            f"mfu={mfu} above 0 and at most 1"
        )
    model_config = planned_config(config)
    try:
        devices = topology.devices(name)
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    mesh = topology.mesh(name, sharding.mesh_shape(config.mesh, len(devices)), sharding.AXES)
    found = compile_step(config, model_config, mesh)
    return describe(config, model_config, found, name, mesh, mfu)


def planned_config(config: FinetuneConfig) -> config_lib.ModelConfig:
    """The student's config from a preset's name, or from a model whose weights are not read."""
    if config.model == "tiny":
        return config.student(tiny.CONFIG, remembers=False)
    found = load_lib.read_config(config.model)
    return config.student(found, remembers=found.mixer in config_lib.MEMORY_MIXERS)


def compile_step(config: FinetuneConfig, model_config: config_lib.ModelConfig, mesh: Mesh) -> Plan:
    """Compiles teacher and student for the mesh, at the smallest chunk, which keeps the most."""
    config.check_mesh(tuple(mesh.shape.values()))
    chunk = min(config.chunk)
    state, frozen, batch = abstract_arguments(config, model_config, mesh)
    teacher, student = compiled_lib.make(config, model_config, jax.tree.map(lambda x: x.sharding, state), mesh)
    parts = {
        "frozen parameters": frozen,
        "trained parameters": state.trained,
        "optimiser": state.optimizer,
        "average": state.average,
        "batch": batch,
    }
    memory, hidden = {part: _gib(tree) for part, tree in parts.items()}, None
    if teacher is not None:
        shape = (config.batch, config.seq_length, model_config.d_model)
        hidden = jax.ShapeDtypeStruct(shape, model_config.dtype, sharding=sharding.batch_sharding(mesh))
        memory["teacher's hidden states"] = _gib(hidden)
    temporaries, texts = dict[str, float](), list[str]()
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    drawn = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=scalar.sharding)
    operations = flops.step_flops(config, model_config, config.window[1], config.sinks[1], chunk)
    try:
        with jax.set_mesh(mesh):
            if teacher is not None:
                compiled = teacher.lower(frozen, batch).compile()
                temporaries["temporaries of the teacher"] = _temporaries(compiled)
                texts.append(compiled.as_text())
            compiled = student(chunk).lower(state, frozen, batch, hidden, scalar, scalar, drawn).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Plan(memory | temporaries, None, str(error), operations, "")
    temporaries["temporaries of the step"] = _temporaries(compiled)
    peak = sum(memory.values()) + max(temporaries.values())
    texts.append(compiled.as_text())
    return Plan(memory | temporaries, peak, "", operations, texts[-1], estimate_lib.read(*texts))


def abstract_arguments(
    config: FinetuneConfig, model_config: config_lib.ModelConfig, mesh: Mesh
) -> tuple[steps.TrainState, Any, steps.Batch]:
    """State, frozen parameters and batch of the recipe as shapes with shardings."""

    def place(tree: Any) -> Any:
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            tree,
            sharding.tree_shardings(tree, mesh),
        )

    trained, frozen = compiled_lib.split(
        config, jax.eval_shape(lambda: compiled_lib.random_params(config, model_config))
    )
    state = jax.eval_shape(lambda tree: compiled_lib.initial_state(config, tree), trained)
    rows, shape = sharding.batch_sharding(mesh), (config.batch, config.seq_length)
    tokens: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
    mask: Any = jax.ShapeDtypeStruct(shape, bool, sharding=rows)
    segments = tokens if config.packed else None
    return place(state), place(frozen), steps.Batch(tokens, tokens, mask, segments)


def _gib(tree: Any) -> float:
    """GiB that one device holds of arrays with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves) / 2**30


def _temporaries(compiled: jax.stages.Compiled) -> float:
    """GiB beside arguments: intermediate values, and results that do not take over an argument's place."""
    sizes: Any = compiled.memory_analysis()
    return (sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes) / 2**30


def describe(
    config: FinetuneConfig, model_config: config_lib.ModelConfig, found: Plan, name: str, mesh: Mesh, mfu: float
) -> str:
    """The page."""
    kind, limit = DEVICES[name.split(":")[0]]
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    tokens = config.batch * config.seq_length
    lines = [
        f"{name}: {mesh.size} device{'s' * (mesh.size > 1)}, {shape}",
        f"step: {config.batch} rows of {config.seq_length:,} tokens in {config.accumulate} pieces, {config.objective}, "
        f"compiled at chunk {min(config.chunk)}",
        "",
        f"memory of a device, GiB (of {limit:g} that a program may use)",
        *(f"  {part:28} {value:9.3f}" for part, value in found.memory.items() if value),
    ]
    if found.peak is None:
        lines += [
            "  the compiler refused:",
            f"  {found.refused.splitlines()[0][:300]}",
            *advice(config, model_config, mesh),
        ]
    else:
        fits = found.peak <= limit
        lines.append(f"  {'at a time, at most':28} {found.peak:9.3f}  {'fits' if fits else 'DOES NOT FIT'}")
        lines += [] if fits else advice(config, model_config, mesh)
    total, top = sum(found.operations.values()), flops.peak(kind)
    assert top is not None
    seconds = total / (top * mesh.size * mfu)
    lines += [
        "",
        f"operations of a step: {total:.3g}, {total / tokens:.3g} a token, by the formulas of train/loop/flops.py",
        *(f"  {part:28} {value / total:9.1%}" for part, value in found.operations.items()),
        f"at {mfu:.0%} of the peak of {top / 1e12:g} TFLOP/s a device: {tokens / seconds:,.0f} tokens/s, "
        f"{seconds:.3g} s a step, {config.steps * seconds / 3600:.3g} h for {config.steps:,} steps "
        f"({config.steps * tokens / 1e6:,.1f} M tokens, {config.steps * seconds / 3600 * mesh.size:.3g} device hours)",
    ]
    if table := estimate_lib.lines(found.estimate):
        lines += ["", *table]
        if clock := CLOCK.get(name.split(":")[0]):
            sizes = config.window[1], config.sinks[1], found.estimate.kernels
            attention = flops.attention_kernels(config, model_config, *sizes) / (top * mesh.size)
            least = found.estimate.total() / clock + attention
            share = total / (top * mesh.size * least)
            lines += [
                f"attention's kernels: {attention * clock / 1e6:,.1f} million cycles if they reach the peak",
                f"so a step takes {least:.3g} s at least, and the share of the peak is {share:.0%} at most",
            ]
    return "\n".join(lines)


def advice(config: FinetuneConfig, model_config: config_lib.ModelConfig, mesh: Mesh) -> list[str]:
    """What would lower the memory, the cheapest first."""
    tips = []
    rows = config.batch // (mesh.shape["data"] * mesh.shape["fsdp"] * config.accumulate)
    if config.remat != "layer":
        tips.append(f"--remat layer keeps less than --remat {config.remat}, for about a quarter more operations")
    if rows > 1:
        tips.append(f"--accumulate {config.accumulate * rows} takes one row of a device at a time")
    if mesh.shape["data"] > 1:
        tips.append(f"fsdp {mesh.shape['data'] * mesh.shape['fsdp']} in place of data splits the parameters further")
    if mesh.shape["context"] * mesh.shape["tensor"] < model_config.n_kv_heads:
        tips.append(f"more context splits a row's tokens, to {model_config.n_kv_heads} with tensor (the key heads)")
    if config.backbone_dtype == "float32" and config.objective == "distill":
        tips.append("--backbone_dtype bfloat16 halves the frozen parameters")
    if config.loss_block > 128:
        tips.append("--loss_block 128 has fewer logits at a time")
    tips.append("a smaller --seq_length, or more devices")
    return ["  to make it fit:", *(f"    {tip}" for tip in tips)]


def warn_of_repeated_work(model_config: config_lib.ModelConfig, shape: Mapping[str, int]) -> None:
    """Warns where tensor x context is more than the heads can be split over: devices then repeat the same heads."""
    parts = shape["tensor"] * shape["context"]
    heads = {"key": model_config.n_kv_heads, "memory": model_config.memory_heads}
    uneven = [f"{count} {what} heads" for what, count in heads.items() if count % parts]
    if uneven:
        warnings.warn(
            f"tensor x context = {parts} does not divide the {' and the '.join(uneven)}: devices repeat each other's "
            "work inside the mixers. Give those axes fewer devices and fsdp or data more",
            stacklevel=3,
        )
