"""How tests compile: most of their time is compilation, and the arrays are tiny.

Without LLVM's optimisations, in few parts and by XLA's older emitters, a gradient takes a third of the time.
"""

FLAGS = " ".join(
    (
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=4",
        "--xla_llvm_enable_alias_scope_metadata=false",
        "--xla_llvm_enable_noalias_metadata=false",
    )
)


def on_devices(count: int) -> str:
    """XLA_FLAGS of a program that sees so many devices."""
    return f"--xla_force_host_platform_device_count={count} {FLAGS}"
