"""The wheel: built from this checkout, installed elsewhere, imported from another folder."""

import pathlib
import subprocess
import sys
import sysconfig
import zipfile

import pytest

from allmem_jax.checkpoints import memory_file

ROOT = pathlib.Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]

# Run with -I -S: neither the current folder nor any .pth file (an editable install) can reach the checkout.
IMPORT = """
import pathlib, sys
target, packages, root = sys.argv[1:]
sys.path += [target, packages]
import allmem_jax, allmem_jax.cli, pallas_kernels
for module in (allmem_jax, allmem_jax.cli, pallas_kernels):
    assert pathlib.Path(module.__file__).is_relative_to(target), module.__file__
used = [m.__file__ for m in list(sys.modules.values()) if getattr(m, "__file__", None)]
stray = [f for f in used if f.startswith(root) and not f.startswith((packages, target))]
assert not stray, stray
print(allmem_jax.preset("smollm2-135m").n_layers)
"""


def run(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, ROOT], cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_the_two_packages_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"allmem_jax", "pallas_kernels"}
    on_disk = [
        path.relative_to(ROOT) for room in ("allmem_jax", "pallas_kernels") for path in (ROOT / room).rglob("*.py")
    ]
    assert sorted(name for name in names if name.endswith(".py")) == sorted(path.as_posix() for path in on_disk)
    assert {"allmem_jax/py.typed", "pallas_kernels/py.typed"} <= set(names)  # pyproject.toml says that it is typed
    assert {f"allmem_jax/memories/{name}.safetensors" for name in memory_file.shipped()} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_imports_from_elsewhere(wheel, tmp_path):
    target = tmp_path / "target"
    run([*PIP, "install", "--no-deps", "--no-index", "--target", target, wheel], cwd=tmp_path)
    packages = sysconfig.get_paths()["purelib"]
    out = run([sys.executable, "-I", "-S", "-c", IMPORT, target, packages, f"{ROOT}/"], cwd=tmp_path)
    assert out.split() == ["30"]
    (script,) = (target / "bin").glob("allmem*") if (target / "bin").exists() else (target / "Scripts").glob("allmem*")
    assert "allmem_jax.cli" in script.read_text()
