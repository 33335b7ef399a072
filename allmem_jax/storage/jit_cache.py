"""Compiled programs, kept from one run of a command to the next."""

import hashlib
import pathlib
import platform

import jax

from allmem_jax.storage import stores

_MOST = 2**31  # bytes; those that were not used for longest make room
_QUICK = 0.5  # seconds: what takes less to compile is not kept


def keep() -> None:
    """Has JAX keep what it compiles in $ALLMEM_CACHE/compiled, or ~/.cache/allmem/compiled.

    Call it before anything is compiled. Where JAX was told of a place itself (JAX_COMPILATION_CACHE_DIR), or told to
    keep nothing (JAX_ENABLE_COMPILATION_CACHE=false), that holds. A folder below is one kind of processor's, as homes
    are shared and programs for a CPU are of its own instructions. Runs of one machine may share it: JAX locks it.
    """
    told = jax.config.values
    if told["jax_compilation_cache_dir"] is not None or not told["jax_enable_compilation_cache"]:
        return
    jax.config.update("jax_compilation_cache_max_size", _MOST)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _QUICK)
    jax.config.update("jax_compilation_cache_dir", str(stores.home() / "compiled" / _processor()))


def _processor() -> str:
    """A short name for what this machine's processor can do."""
    about = platform.machine(), platform.processor()
    cpuinfo, flags = pathlib.Path("/proc/cpuinfo"), list[str]()
    if cpuinfo.is_file():  # "flags" on x86, "Features" on ARM
        lines = cpuinfo.read_text(errors="replace").splitlines()
        flags = [line for line in lines if line.startswith(("flags", "Features"))]
    return hashlib.sha256(repr((about, flags[:1])).encode()).hexdigest()[:12]
