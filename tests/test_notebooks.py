"""The notebooks run from top to bottom, and what they say of their results is asserted in them."""

import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def run(name, monkeypatch):
    """Executes the code cells of a notebook in one namespace."""
    monkeypatch.setenv("CHECKOUT", str(ROOT))
    notebook = json.loads((ROOT / "docs" / "notebooks" / name).read_text())
    assert notebook["nbformat"] == 4
    space = {"__name__": "notebook"}
    for cell in notebook["cells"]:
        assert cell["cell_type"] != "code" or not cell["outputs"], "commit notebooks without their outputs"
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}:{cell['id']}", "exec"), space)


@pytest.mark.slow
def test_the_mixer_in_ones_own_model(monkeypatch):
    run("mixer.ipynb", monkeypatch)


@pytest.mark.slow
def test_convert_and_ask(smollm2_path, monkeypatch):
    if smollm2_path != ROOT / ".cache" / "models" / smollm2_path.name:
        pytest.skip("the notebook reads the model of this checkout")
    run("ask.ipynb", monkeypatch)
