"""`allmem info`."""

from __future__ import annotations

from typing import Annotated

import tyro

from allmem_jax.cli import options

ModelOrPreset = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]


def info(
    model: ModelOrPreset,
    context: int = 131072,
    sizes: options.SizeOptions = options.SIZES,
    n_mem: int | None = None,
    dtype: options.DType = "bfloat16",
) -> None:
    """Show what a model costs: parameters, bytes of state, operations per token. Loads no weights.

    Example: allmem info qwen3-0.6b --context 131072

    Args:
        model: Folder, .gguf file, or the name of a preset.
        context: Tokens seen when the token in question is decoded.
        n_mem: Heads of the memory.
    """
    from allmem_jax.checkpoints import load
    from allmem_jax.evaluation import cost

    config = load.read_config(model).replace(dtype=dtype, **options.given(sizes))
    config = config.replace(mixer=config.memory_mixer, n_mem=config.n_mem if n_mem is None else n_mem)
    groups = cost.parameter_groups(config)
    state = cost.state_bytes(config, context)
    original, converted = (cost.flops_per_token(config, context, mixer) for mixer in ("full", config.mixer))
    if config.mixer == "allmem":
        memory = f"chunk {config.chunk}, memory {config.memory_heads} x {config.d_mem}"
    else:
        memory = f"memory {config.mixer} {' x '.join(map(str, config.linear_state_shape))}"
    print(f"{model}: {config.family}, {config.n_layers} layers, window {config.window}, sinks {config.sinks}, {memory}")
    print("\nparameters (millions)")
    for name, count in groups.items():
        print(f"  {name:<12}{count / 1e6:>12.2f}")
    print(f"  {'total':<12}{sum(groups.values()) / 1e6:>12.2f}   the memory is {cost.added_share(config):.1%}")
    print(f"\nstate of one sequence after {context} tokens (MiB, {dtype})")
    print(f"  full attention {state['full'] / 2**20:>12.1f}")
    print(
        f"  converted      {state[config.mixer] / 2**20:>12.1f}   whatever the length; without memory "
        f"{state['swa'] / 2**20:.1f}"
    )
    print(f"\noperations for the token at {context} (GFLOP)     full   converted")
    for part in original:
        print(f"  {part:<44}{original[part] / 1e9:>8.3f}{converted[part] / 1e9:>12.3f}")
    totals = [sum(parts.values()) / 1e9 for parts in (original, converted)]
    print(f"  {'total':<44}{totals[0]:>8.3f}{totals[1]:>12.3f}   {totals[0] / totals[1]:.2f} x fewer")
