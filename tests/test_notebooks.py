"""The notebooks run from top to bottom, and what they say of their results is asserted in them."""

import json
import pathlib

import pytest

from tests import compiling

ROOT = pathlib.Path(__file__).parent.parent


def run(name, flags, monkeypatch):
    """Executes the code cells of a notebook one after another."""
    monkeypatch.setenv("CHECKOUT", str(ROOT))
    notebook = json.loads((ROOT / "docs" / "notebooks" / name).read_text())
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells), "commit notebooks without their outputs"
    compiling.run("\n".join("".join(cell["source"]) for cell in cells), flags)


@pytest.mark.slow
def test_the_mixer_in_ones_own_model(monkeypatch):
    run("mixer.ipynb", compiling.FLAGS, monkeypatch)


@pytest.mark.slow
def test_convert_and_ask(smollm2_path, monkeypatch):
    if smollm2_path != ROOT / ".cache" / "models" / smollm2_path.name:
        pytest.skip("the notebook reads the model of this checkout")
    run("ask.ipynb", "", monkeypatch)  # a real model takes longer to run than to compile
