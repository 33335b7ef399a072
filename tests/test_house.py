"""What keeps the house small: no long files, nothing written twice, tables the formatter may not touch are few."""

import collections
import importlib
import inspect
import pathlib
import re
import subprocess

import pytest

pytestmark = pytest.mark.core

ROOT = pathlib.Path(__file__).parent.parent
CODE = ("allmem_jax", "pallas_kernels", "train")
LONGEST = 400  # lines of a file
SHARED = 10  # lines that two places may not have in common


def sources(*folders):
    """The files below some folders, relative to the checkout."""
    return [path.relative_to(ROOT) for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_files_are_short():
    counts = {path.as_posix(): len((ROOT / path).read_text().splitlines()) for path in sources(*CODE, "configs")}
    long = {path: count for path, count in counts.items() if count > LONGEST}
    assert not long, f"more than {LONGEST} lines; a file holds one idea: {long}"


def test_nothing_is_written_twice():
    """No two places share ten lines, not counting blank ones, comments, imports and brackets alone."""
    seen = collections.defaultdict(set)
    for path in sources(*CODE):
        lines = [
            (number, line.strip())
            for number, line in enumerate((ROOT / path).read_text().splitlines(), 1)
            if re.search(r"\w", line) and not re.match(r"\s*(#|from |import )", line)
        ]
        for first in range(len(lines) - SHARED + 1):
            run = lines[first : first + SHARED]
            seen[tuple(text for _, text in run)].add(f"{path}:{run[0][0]}")
    twice = sorted(sorted(places) for places in seen.values() if len(places) > 1)
    assert not twice, f"{SHARED} lines stand in more than one place, which one function could serve: {twice[:5]}"


def test_the_formatter_decides():
    skipped = [
        f"{path}:{number}"
        for path in sources(*CODE, "configs", "tests")
        for number, line in enumerate((ROOT / path).read_text().splitlines(), 1)
        if re.search(r"# fmt: (skip|off)$", line)
    ]
    assert len(skipped) <= 10, f"tables that the formatter leaves alone are to be few: {skipped}"


@pytest.mark.parametrize("package", ["allmem_jax", "pallas_kernels"])
def test_public_names_are_there_and_described(package):
    """What `__all__` lists is found, is described, and comes with types."""
    module = importlib.import_module(package)
    for name in module.__all__:
        public = getattr(module, name)
        assert inspect.getdoc(public), f"{package}.{name} has no docstring"
        if inspect.isfunction(public):
            bare = [p for p in inspect.signature(public).parameters.values() if p.annotation is p.empty]
            assert not bare, f"{package}.{name}: {bare} have no types"


def test_nothing_but_sources_is_tracked():
    """No lock files, weights of models other than the released memories, results or environments."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    wrong = [path for path in tracked.stdout.splitlines() if re.search(r"(\.lock|\.gguf|\.npy|\.arrayrecord)$", path)]
    assert not wrong, wrong
