"""How tests compile: most of their time is compilation, and the arrays are tiny.

Without LLVM's optimisations, in few parts and by XLA's older emitters, a gradient takes a third of the time.
"""

import importlib.metadata
import os
import subprocess
import sys

FLAGS = " ".join(
    (
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=4",
        "--xla_llvm_enable_alias_scope_metadata=false",
        "--xla_llvm_enable_noalias_metadata=false",
    )
)
# Later ones have one kind of emitters, and end at a flag they do not know.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
# The scheduler that looks for concurrency runs a collective of a loop beside one that does not depend on it, on some
# devices in the other order: they wait for one another for ever.
IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"


def on_devices(count: int) -> str:
    """XLA_FLAGS of a program that sees so many devices."""
    return f"--xla_force_host_platform_device_count={count} {IN_ORDER} {FLAGS}"


def run(program: str, flags: str) -> str:
    """Runs a program in a Python of its own with these XLA_FLAGS; returns its stderr, and fails where it does."""
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=env, timeout=900, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def run_on_eight_devices(program: str) -> None:
    """The same, where the compiler must find a way for every array."""
    assert "Involuntary full rematerialization" not in run(program, on_devices(8))
