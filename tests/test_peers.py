"""The comparison with transformers: who takes part, and what is written."""

import json
import pathlib

import pytest
import tiny_folder

pytest.importorskip("torch")
pytest.importorskip("transformers")

from train.experiments import peers  # noqa: E402

pytestmark = pytest.mark.slow


def test_everyone_takes_part(tmp_path: pathlib.Path, capsys):
    tiny_folder.write(tmp_path / "plain")
    out = tmp_path / "found" / "peers.json"
    sizes = dict(window=16, prompt=70, decode=4, repeats=1)
    peers.main(tmp_path / "plain", dtypes=("float32",), out=out, **sizes)
    written = json.loads(out.read_text())
    speeds = written["found"]["float32"]
    assert set(speeds) == {"full", "swa", "allmem", "transformers"} and set(written["versions"]) == set(peers.PACKAGES)
    assert all(speed > 0 for each in speeds.values() for speed in each.values())
    said = capsys.readouterr().out
    ratio = speeds["swa"]["decode"] / speeds["transformers"]["decode"]
    assert f"{speeds['swa']['decode']:.1f}  ({ratio:.2f} x)" in said and "transformers, float32" in said
