"""What every test shares: the CPU, and the real model where it has been fetched."""

import atexit
import os
import pathlib
import shutil
import tempfile

from tests import compiling

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before anything imports jax
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
# What one process of a run has compiled, the others and those that tests start need not compile again.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="allmem-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ.setdefault("XLA_FLAGS", compiling.FLAGS)

import fsspec
import jax
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from train import fetch as fetch_lib


@pytest.fixture(autouse=True)
def _interpreted(request):
    """Without a TPU, tests whose parameter `implementation` is "pallas" interpret it, and fail where accesses race."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if parameters.get("implementation") != "pallas" or jax.default_backend() == "tpu":
        yield
        return
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield
    assert not interpret_pallas_call.races.races_found


@pytest.fixture(scope="session")
def smollm2_path() -> pathlib.Path:
    """The SmolLM2-135M-Instruct GGUF; a test that asks for it is skipped where the file is missing."""
    path = fetch_lib.cached("smollm2")
    if path is None:
        pytest.skip("needs the real model: python -m train.fetch smollm2")
    return path


@pytest.fixture(scope="session")
def shakespeare_path() -> pathlib.Path:
    """The folder of real texts; a test that asks for it is skipped where the folder is missing."""
    path = fetch_lib.cached("shakespeare")
    if path is None:
        pytest.skip("needs the real texts: python -m train.fetch shakespeare")
    return path


@pytest.fixture
def error_of(capsys):
    """error_of(command, *arguments): the line on stderr with which a command ends that cannot do what it is asked."""

    def call(command, *arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            command(*arguments)
        assert stop.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    return call


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A URL below which there is nothing, in a store that is this process's memory."""
    monkeypatch.setenv("ALLMEM_CACHE", str(tmp_path / "kept"))
    fsspec.filesystem("memory").store.clear()
    return "memory://bucket/place"
