"""Operations of a training step by formula, and the speed that they are done with.

MFU, the share of the devices' peak, counts what the step needs and not what is computed again to save memory:

    pretraining    3 x the forward pass: once forward, twice backward (for activations and for weights)
    distillation   the teacher's forward pass with full attention, and the student's
                   + backward: 1 x projections, MLP and head, which are frozen and pass gradients on; 2 x attention,
                   which has two factors at each product; 2 x the memory
    head           at the positions of the loss alone

The forward pass is `allmem_jax.evaluation.cost.prefill_flops_per_token`: windowed attention counts visible keys, the
memory its projections, read and update.
"""

from collections.abc import Mapping
from typing import Any

from allmem_jax.evaluation import cost
from allmem_jax.model import config as config_lib
from train.recipe import FinetuneConfig

# Vendors' peaks in bfloat16 without sparsity, for what JAX calls a device, by a part of its name; the first that fits.
PEAK = (
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6", 918e12),
    ("TPU7x", 1153.5e12),  # half a chip
    ("H100", 989e12),
    ("H200", 989e12),
    ("A100", 312e12),
    ("B200", 2250e12),
)


def peak(device_kind: str) -> float | None:
    """Operations a second of a device, or None where it is not in the table."""
    return next((value for name, value in PEAK if name in device_kind), None)


def step_flops(
    config: FinetuneConfig, model_config: config_lib.ModelConfig, window: int, sinks: int, chunk: int
) -> dict[str, float]:
    """Operations of one step by part: {"teacher", "student", "backward", "head"}."""
    length, tokens = config.seq_length, config.batch * config.seq_length
    student = model_config.replace(window=max(window, chunk), chunk=chunk, sinks=sinks)  # no warning of a gap
    forward = cost.prefill_flops_per_token(student, length)
    narrow = cost.prefill_flops_per_token(student.replace(window=window, chunk=min(chunk, window)), length)
    forward["attention"] = narrow["attention"]
    head, dense = forward.pop("head"), forward["projections"] + forward["mlp"]
    backward = dense + 2 * (forward["attention"] + forward["memory"])
    if config.objective == "pretrain":
        return {
            "teacher": 0.0,
            "student": float(tokens * sum(forward.values())),
            "backward": 2.0 * tokens * sum(forward.values()),
            "head": 3.0 * tokens * head,
        }
    teacher = cost.prefill_flops_per_token(model_config, length, "full")
    return {
        "teacher": float(tokens * (sum(teacher.values()) - teacher["head"])),
        "student": float(tokens * sum(forward.values())),
        "backward": float(tokens * backward),
        "head": 3 * config.positions * tokens * head,  # teacher, student, and back into the student
    }


def attention_kernels(
    config: FinetuneConfig, model_config: config_lib.ModelConfig, window: int, sinks: int, kernels: Mapping[str, int]
) -> float:
    """Operations of one step in the TPU kernels of attention, what they compute again included.

    Args:
      config, model_config, window, sinks: as in `step_flops`.
      kernels: how often each runs on a device, by name, as in `estimate.Estimate`.
    """
    student = model_config.replace(window=window, chunk=min(model_config.chunk, window), sinks=sinks)

    def operations(of: config_lib.ModelConfig, mixer: str) -> int:
        each = cost.prefill_flops_per_token(of, config.seq_length, mixer)["attention"]
        return config.batch * config.seq_length * each

    # Products for each key and query that it sees: two forward, five backward, of which two kernels do two twice.
    products = {"forward": 2, "gradient": 5, "query_gradient": 3, "key_gradient": 4}
    runs = sum(count * kernels.get(f"swa_{name}_kernel", 0) for name, count in products.items()) / 2
    runs /= model_config.n_layers * config.accumulate
    distilled = config.objective != "pretrain" and runs > 0  # the teacher's forward pass is one of them
    return operations(student, model_config.mixer) * (runs - distilled) + operations(model_config, "full") * distilled


def speed(
    config: FinetuneConfig,
    model_config: config_lib.ModelConfig,
    line: Mapping[str, Any],
    seconds: float,
    devices: int,
    kind: str,
) -> dict[str, float]:
    """Tokens a second of a step that took `seconds` on all devices, and its MFU where the peak of their kind is known.

    `line` holds the step's window, sinks and chunk.
    """
    values = {"tokens_per_s": config.batch * config.seq_length / seconds}
    if (top := peak(kind)) is not None:
        operations = sum(step_flops(config, model_config, line["window"], line["sinks"], line["chunk"]).values())
        values["mfu"] = operations / seconds / (top * devices)
    return values
