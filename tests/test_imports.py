"""Imports point one way, configs -> train -> allmem_jax -> pallas_kernels -> jax, and only to declared dependencies."""

import ast
import importlib
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
SERVING = declared(PROJECT["optional-dependencies"]["serve"]) | {"pydantic"}  # fastapi's own
EXTRAS = {  # files that want an extra
    "allmem_jax/evaluation/harness.py": declared(PROJECT["optional-dependencies"]["eval"]),
    "allmem_jax/cli/serve.py": SERVING,
    "allmem_jax/serving/answers.py": SERVING,
    "allmem_jax/serving/api.py": SERVING,
    "allmem_jax/serving/shapes.py": SERVING,
    "pallas_kernels/tools/torch_peers.py": {"torch"},  # where it is installed, to be measured beside
    "pallas_kernels/swa/decode_triton.py": {"triton"},
    "pallas_kernels/swa/triton_gpu.py": {"triton"},
    "pallas_kernels/ttt/triton_gpu.py": {"triton"},
    "pallas_kernels/ttt/triton_kernels.py": {"triton"},
    "train/loop/metrics.py": {"wandb"},  # where a recipe asks for it
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


# Within a package, too: a room may import itself and what stands before it.
ORDER = {
    "pallas_kernels": ["triton_call", "backends", "dots", "norms", "conv", "rope", "swa", "ttt", "tools"],
    "allmem_jax": ["storage", "model", "nn", "checkpoints", "decoding", "reporting", "evaluation", "serving", "cli"],
    "train": ["errors", "fetch", "data", "recipe", "loop", "finetune", "experiments"],
}


def rooms(package):
    """The folders of a package that hold modules."""
    return {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}


def between(package):
    """Yields (path, line, room, other room, names) for what a room of a package imports from others, of any package."""
    for path in sorted((ROOT / package).rglob("*.py")):
        room = path.relative_to(ROOT / package).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                top, *rest = node.module.split(".")
                if top in ROOMS and rest and (top, rest[0]) != (package, room):
                    yield path.relative_to(ROOT), node.lineno, room, (top, *rest), [alias.name for alias in node.names]


@pytest.mark.core
@pytest.mark.parametrize("package", sorted(ORDER))
def test_rooms_import_downward(package):
    order = ORDER[package]
    assert rooms(package) <= set(order)
    wrong = [
        f"{path}:{line}: {room} may not import {other[1]}"
        for path, line, room, other, _ in between(package)
        if other[0] == package and room in order and other[1] in order and order.index(other[1]) > order.index(room)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.core
@pytest.mark.parametrize("package", ROOMS)
def test_rooms_are_entered_by_their_faces(package):
    """From another room come modules, or names, that its `__init__` lists."""
    wrong = []
    for path, line, _, (top, room, *deeper), names in between(package):
        inside = path.is_relative_to("pallas_kernels/tools")  # measures the kernels' own parts
        if inside or path.name == "__init__.py" and path.parent.name == top or room not in rooms(top):
            continue
        shown = importlib.import_module(f"{top}.{room}").__all__
        if deeper or not set(names) <= set(shown):
            wrong.append(f"{path}:{line}: {'.'.join((top, room, *deeper))} does not show {names}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.core
@pytest.mark.parametrize("package", ROOMS[:-1])
def test_faces_name_every_module(package):
    for room in rooms(package):
        face = importlib.import_module(f"{package}.{room}")
        hidden = [
            path.stem
            for path in (ROOT / package / room).glob("*.py")
            if path.stem != "__init__" and not re.search(rf"\b{path.stem}\b", face.__doc__)
        ]
        assert not hidden, f"{package}/{room}/__init__.py says nothing of {hidden}"
