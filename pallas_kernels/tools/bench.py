"""How fast the kernels are beside what one would use instead, on the machine at hand.

    python -m pallas_kernels.tools.bench                       # a GPU or this CPU: times; writes out/kernel_bench.json
    python -m pallas_kernels.tools.bench --tpu v5e v6e         # no TPU needed: the compiler's schedule of every kernel

A kernel is compared with the reference first, for a schedule by interpreting it, and one that fails ends the program.
Beside them, where torch is installed, stands what its users would run (`torch_peers`). On a GPU the whole set takes
less than 8 minutes; on a CPU the shapes are small and the figures are ratios.

Axes: B batch, L tokens, Hq and Hkv heads of attention, N heads of the memory, D head dim.
"""

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.swa import swa_attention, swa_decode
from pallas_kernels.ttt import FastWeights, ttt_memory

TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-5}  # relative norm
SINKS = 128
DECODE_SLOTS = 4096 + SINKS  # of the cache whose schedule is read


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What is measured.

    Attributes:
      dtype: of tokens.
      memory: (B, L, N, D, chunk).
      attention: (B, Hq, Hkv, D), that of qwen3-0.6b on a GPU.
      windows, lengths: of attention; every length that is longer than the window.
      decode: (B, tokens of context), one token a row.
      repeats: calls, of which the median counts.
    """

    dtype: str
    memory: tuple[int, int, int, int, int]
    attention: tuple[int, int, int, int]
    windows: tuple[int, ...]
    lengths: tuple[int, ...]
    decode: tuple[int, int]
    repeats: int


GPU = Shapes("bfloat16", (1, 32768, 8, 64, 2048), (1, 16, 8, 128), (4096, 8192), (32768, 131072), (32, 131072), 20)
CPU = Shapes("float32", (1, 8192, 8, 64, 2048), (1, 4, 2, 32), (256,), (2048,), (2, 4096), 5)


def main() -> None:
    """Measures what the arguments say and writes one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tpu", nargs="*", metavar="DEVICE", help="schedules for v5e, v5p, v6e, tpu7x (default: all)")
    parser.add_argument("--dims", nargs="*", type=int, default=[64, 128], help="head dims of the schedules")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/kernel_bench.json"))
    arguments = parser.parse_args()
    if arguments.tpu is not None:
        jax.config.update("jax_platforms", "cpu")
    found: dict[str, Any] = {"machine": _machine()}  # which starts JAX, so after the platform is set
    if arguments.tpu is not None:
        found["checks"] = _check_interpreted(arguments.dims)
        found["schedules"] = _schedules(arguments.tpu or ["v5e", "v5p", "v6e", "tpu7x"], arguments.dims)
    else:
        platform = jax.default_backend()
        shapes = GPU if platform == "gpu" else CPU
        found["shapes"] = dataclasses.asdict(shapes)
        found["checks"] = _check({"gpu": "triton", "tpu": "pallas"}.get(platform, "xla"), shapes)
        found["times"] = _times(shapes, platform)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=2))
    print(f"wrote {arguments.out}")


def _machine() -> dict[str, str]:
    """Hardware, versions and commit."""
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "python": sys.version.split()[0],
        "commit": run.stdout.strip() or "unknown",
    }


def _schedules(devices: list[str], dims: list[int]) -> list[dict[str, Any]]:
    """One line for each kernel, from a process of its own, as the compiler's options are read once."""
    lines = []
    for device in devices:
        for kernel in ("memory", "attention", "decode"):
            for dim in dims:
                command = [sys.executable, "-m", "pallas_kernels.tools.schedule", device, kernel, "--dim", str(dim)]
                command += ["--length", str(DECODE_SLOTS)] if kernel == "decode" else []
                run = subprocess.run(command, capture_output=True, text=True, check=False)
                if run.returncode:
                    raise SystemExit(f"{' '.join(command)} failed:\n{run.stderr[-3000:]}")
                for line in map(json.loads, filter(lambda x: x.startswith("{"), run.stdout.splitlines())):
                    lines.append(line)
                    print(
                        f"{device:6} D={dim:<4} {line['kernel']:26} main {line['main']:6} bundles, "
                        f"matrix unit in {line['mxu_share']:.0%}"
                        + (f", floor {line['floor']:.0f} for {line['tokens']} tokens" if "floor" in line else ""),
                        flush=True,
                    )
    return lines


# Correctness.


def _check(implementation: str, shapes: Shapes) -> dict[str, float]:
    """Returns the errors of outputs and gradients at small shapes; ends the program where one is too large."""
    errors = {}
    dtype = jnp.dtype(shapes.dtype)
    q, k, v = _attention_inputs(1, 384, *shapes.attention[1:], dtype)
    attend = lambda name: lambda q, k, v: swa_attention(q, k, v, window=100, sinks=20, implementation=name)  # noqa: E731
    errors["attention"] = _error(attend(implementation), attend("reference"), (q, k, v))
    arguments = _memory_inputs(1, 384, *shapes.memory[2:4], dtype)
    remember = lambda name: lambda *x: ttt_memory(*x, chunk_size=128, implementation=name)[0]  # noqa: E731
    errors["memory"] = _error(remember(implementation), remember("reference"), arguments)
    errors["decode"] = _error(_decode(implementation), _decode("reference"), _decode_inputs(4, 384, shapes, dtype))
    for kernel, error in errors.items():
        print(f"{kernel}: {implementation} differs from the reference by {error:.1e}", flush=True)
        if not error < TOLERANCE[shapes.dtype]:
            raise SystemExit(f"{kernel} is wrong: {error:.1e} is over {TOLERANCE[shapes.dtype]}; nothing is measured")
    return errors


def _check_interpreted(dims: list[int]) -> dict[str, dict[str, float]]:
    """`_check` of the TPU kernels as they are interpreted, at every head dim."""
    errors = {}
    for dim in dims:
        shapes = dataclasses.replace(GPU, memory=(1, 384, 2, dim, 128), attention=(1, 4, 2, dim))
        with pltpu.force_tpu_interpret_mode():
            errors[str(dim)] = _check("pallas", shapes)
    return errors


def _error(function: Callable[..., Any], reference: Callable[..., Any], arguments: Any) -> float:
    """The largest relative error of the output and of all gradients."""

    def both(function):
        def loss(*arguments):
            out = function(*arguments)
            return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

        return jax.jit(jax.grad(loss, tuple(range(len(arguments))), has_aux=True))(*arguments)

    errors = []
    for a, b in zip(jax.tree.leaves(both(function)), jax.tree.leaves(both(reference)), strict=True):
        got, want = np.asarray(a, np.float64), np.asarray(b, np.float64)
        errors.append(float(np.linalg.norm(got - want) / max(float(np.linalg.norm(want)), 1e-30)))
    return max(errors)


# Times.


def _times(shapes: Shapes, platform: str) -> list[dict[str, Any]]:
    """Seconds of every case, ours first; the median of some calls."""
    lines: list[dict[str, Any]] = []

    def measure(case: str, name: str, function: Callable[..., Any], arguments: Any) -> None:
        try:
            run = jax.jit(function)
            seconds = _median(lambda: jax.block_until_ready(run(*arguments)), shapes.repeats)
        except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
            lines.append({"case": case, "name": name, "error": str(error).splitlines()[0][:200]})
        else:
            lines.append({"case": case, "name": name, "seconds": seconds})
        print(lines[-1], flush=True)

    def both(kernel: str, sizes: Any, name: str, function: Callable[..., Any], arguments: Any) -> None:
        measure(f"{kernel} forward {sizes}", name, function, arguments)
        measure(f"{kernel} forward + backward {sizes}", name, _gradient(function, len(arguments)), arguments)

    dtype = jnp.dtype(shapes.dtype)
    arguments = _memory_inputs(*shapes.memory[:4], dtype)
    for name in ("best", "xla"):
        both("memory", shapes.memory, name, _memory_call(_named(name), shapes.memory[4]), arguments)
    device = "cuda" if platform == "gpu" else "cpu"
    make = lambda peers: peers.memory_runs(arguments, shapes.memory[4], device)  # noqa: E731
    lines += _torch("LaCT's form, torch.compile", f"memory {shapes.memory}", make, shapes.repeats)
    dense = "cudnn" if platform == "gpu" else "xla"
    for length in shapes.lengths:
        qkv = _attention_inputs(shapes.attention[0], length, *shapes.attention[1:], dtype)
        for window in shapes.windows:
            entries = {"ours": _windowed(None, window), "ours, plain JAX": _windowed("xla", window)}
            if platform == "gpu":
                entries["cudnn, no sinks"] = _dense(dense, (window - 1, 0))
            for name, attend in entries.items():
                both("attention", f"{length}/{window}", name, attend, qkv)
            if platform == "gpu":
                flex = functools.partial(_flex, shapes.attention, length, window)
                lines += _torch("FlexAttention", f"attention {length}/{window}", flex, shapes.repeats)
        measure(f"attention forward {length}/all", dense, _dense(dense, None), qkv)
    lines += _layer_ratios(lines, shapes)
    measure_decode(measure, shapes, dtype)
    return lines


def measure_decode(measure: Callable[..., None], shapes: Shapes, dtype: Any) -> None:
    """One token a row: attention to the whole context, and to a ring of window and sinks with one step of memory."""
    batch, context = shapes.decode
    memory = _memory_inputs(batch, 1, *shapes.memory[2:4], dtype)
    remember = _memory_call(None, shapes.memory[4])

    def full(q, k, v, keys, values):
        return jax.nn.dot_product_attention(q[:, None], keys, values)

    def ours(*arguments):
        return _decode(None)(*arguments[:5]), remember(*arguments[5:])

    ring = _decode_inputs(batch, min(shapes.windows) + SINKS, shapes, dtype)
    measure(f"decode {shapes.decode}", "full", full, _decode_inputs(batch, context, shapes, dtype))
    measure(f"decode {shapes.decode}", "ours", ours, (*ring, *memory))
    for name in ("best", "xla"):
        measure(f"decode, attention alone {ring[3].shape}", name, _decode(_named(name)), ring)


def _layer_ratios(lines: list[dict[str, Any]], shapes: Shapes) -> list[dict[str, Any]]:
    """Attention to everything over windowed attention and memory together, per token, at every length measured."""
    found = {(line["case"], line["name"]): line.get("seconds") for line in lines}
    memory = found.get((f"memory forward {shapes.memory}", "best"))
    ratios = []
    for length, window in itertools.product(shapes.lengths, shapes.windows):
        ours = found.get((f"attention forward {length}/{window}", "ours"))
        full = next((s for (case, _), s in found.items() if case == f"attention forward {length}/all"), None)
        if memory and ours and full:
            ratio = full / (ours + memory * length / shapes.memory[1])
            ratios.append({"case": f"prefill {length}/{window}, full over ours", "ratio": ratio})
    return ratios


def _memory_call(implementation: str | None, chunk: int) -> Callable[..., Any]:
    return lambda *arguments: ttt_memory(*arguments, chunk_size=chunk, implementation=implementation)[0]


def _decode(implementation: str | None) -> Callable[..., Any]:
    """`swa_decode` where every row's ring is full and has gone round, each row in a phase of its own."""

    def decode(q, k, v, keys, values):
        count = keys.shape[1]
        position = 2 * count + 37 * jnp.arange(q.shape[0])
        sizes = {"sink_slots": SINKS, "window": count - SINKS, "sinks": SINKS}
        return swa_decode(q, k, v, keys, values, position, **sizes, implementation=implementation)

    return decode


def _windowed(implementation: str | None, window: int) -> Callable[..., Any]:
    return lambda q, k, v: swa_attention(q, k, v, window=window, sinks=SINKS, implementation=implementation)


def _dense(implementation: Any, window: tuple[int, int] | None) -> Callable[..., Any]:
    return lambda q, k, v: jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=window, implementation=implementation
    )


def _gradient(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    return jax.grad(lambda *x: jnp.sum(function(*x).astype(jnp.float32)), tuple(range(count)))


def _named(name: str) -> str | None:
    """The implementation that a line of the report is about."""
    return None if name == "best" else name


def _median(run: Callable[[], Any], repeats: int) -> float:
    """Seconds of `run`, which waits for what it starts; the first call, which compiles, does not count."""
    run()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _flex(attention: tuple[int, int, int, int], length: int, window: int, peers: Any) -> Any:
    return peers.attention_runs(attention, length, window, SINKS)


def _torch(name: str, case: str, make: Callable[[Any], dict[str, Callable[[], Any]]], repeats: int) -> list[Any]:
    """Lines of what torch users would run, `make` of the module `torch_peers`; none where torch is not installed."""
    if not importlib.util.find_spec("torch"):
        return []
    lines: list[dict[str, Any]] = []
    try:
        runs = make(importlib.import_module("pallas_kernels.tools.torch_peers"))
        for what, run in runs.items():
            kernel, sizes = case.split(" ", 1)
            lines.append({"case": f"{kernel} {what} {sizes}", "name": name, "seconds": _median(run, repeats)})
            print(lines[-1], flush=True)
    except Exception as error:  # another project's: it must not cost our own figures
        lines.append({"case": case, "name": name, "error": str(error)[:200]})
        print(lines[-1], flush=True)
    return lines


def _normal(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def _attention_inputs(batch, length, heads, kv_heads, dim, dtype):
    return tuple(_normal(seed, (batch, length, h, dim), dtype) for seed, h in enumerate((heads, kv_heads, kv_heads)))


def _decode_inputs(batch, slots, shapes, dtype):
    """A token's q, k and v, and the cache's keys and values."""
    _, heads, kv_heads, dim = shapes.attention
    sizes = ((batch, heads, dim), *((batch, kv_heads, dim),) * 2, *((batch, slots, kv_heads, dim),) * 2)
    return tuple(_normal(seed, size, dtype) for seed, size in enumerate(sizes))


def _memory_inputs(batch, length, heads, dim, dtype):
    """q and k of norm one, as in the model, and (v, lr, momentum, init)."""
    shape, hidden = (batch, length, heads, dim), 2 * dim
    q, k, v = (_normal(seed, shape, jnp.float32) for seed in range(3))
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    lr = jax.nn.softplus(_normal(3, (*shape[:3], 3), jnp.float32) - 5)
    momentum = jax.nn.sigmoid(_normal(4, shape[:3], jnp.float32))
    weights = ((heads, hidden, dim), (heads, hidden, dim), (heads, dim, hidden))
    init = FastWeights(*(_normal(5 + i, s, jnp.float32) / s[-1] ** 0.5 for i, s in enumerate(weights)))
    return *(x.astype(dtype) for x in (q, k, v)), lr, momentum, init


if __name__ == "__main__":
    main()
