"""Imports point one way, configs -> train -> allmem_jax -> pallas_kernels -> jax, and only to declared dependencies."""

import ast
import pathlib
import re
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
ROOMS = ["pallas_kernels", "allmem_jax", "train", "configs"]  # each may import itself and what stands before it
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORT_NAMES = {"orbax-checkpoint": "orbax"}  # where it is not the project's name


def declared(requirements):
    """The top-level modules that a list of requirements provides."""
    names = [re.match(r"[\w.-]+", requirement).group() for requirement in requirements]
    return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}


LIBRARY = declared(PROJECT["dependencies"])
TRAINING = LIBRARY | declared(PROJECT["optional-dependencies"]["train"])
THIRD_PARTY = {"pallas_kernels": {"jax", "numpy"}, "allmem_jax": LIBRARY, "train": TRAINING, "configs": set()}
EXTRAS = {  # files that want an extra
    "allmem_jax/harness.py": declared(PROJECT["optional-dependencies"]["eval"]),
    "pallas_kernels/bench.py": {"torch"},  # where it is installed, to be measured beside
    "pallas_kernels/swa/decode_triton.py": {"triton"},
    "pallas_kernels/swa/triton_gpu.py": {"triton"},
    "pallas_kernels/ttt/triton_gpu.py": {"triton"},
    "train/metrics.py": {"wandb"},  # where a recipe asks for it
}


def imports(path):
    """Yields (line, top-level module) for every import statement in a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.lineno, node.module.split(".")[0]


@pytest.mark.core
@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_downward(room):
    allowed = set(ROOMS[: ROOMS.index(room) + 1]) | THIRD_PARTY[room] | set(sys.stdlib_module_names)
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {room} may not import {name}"
        for path in sorted((ROOT / room).rglob("*.py"))
        for line, name in imports(path)
        if name not in allowed | EXTRAS.get(path.relative_to(ROOT).as_posix(), set())
    ]
    assert not wrong, "\n".join(wrong)
