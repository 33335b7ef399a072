"""Reading the TPU compiler's schedule, from a dump as it writes one."""

import sys

import jax
import pytest

from pallas_kernels.tools import bench, schedule

pytestmark = pytest.mark.core
DUMP = """== CAPACTIY:
MXU, XLU, VALU
    4     3     4
== UTILIZATION:
0 0 1
2 0 3
0 0 4
4 1 0
0 0 0
"""


def test_the_main_part_is_between_the_matrix_units_first_and_last_use(tmp_path):
    (tmp_path / f"17-ttt_memory_forward.1-70-{schedule.SUFFIX}").write_text(DUMP)
    (tmp_path / f"17-fusion.2-70-{schedule.SUFFIX}").write_text(DUMP)
    (found,) = schedule.read(tmp_path, "ttt")
    assert (found.kernel, found.bundles, found.main) == ("ttt_memory_forward", 5, 3)
    assert found.mxu_share == pytest.approx(2 / 3)
    assert found.slots["VALU"] == pytest.approx(7 / 3) and found.capacity == {"MXU": 4, "XLU": 3, "VALU": 4}


def test_floor_counts_passes_through_the_units():
    # forward, v5e, a pack of 128 columns and 256 hidden units: 5 products of 1 x 2 tiles, 1 of 2 x 1, each with 512
    # rows, and 3 of 4 x 2 tiles with 128 rows; four units take a row a cycle each
    assert schedule.memory_floor("v5e", 512, 128, 256, False) == (6 * 2 * 512 + 3 * 8 * 128) / 4


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="it moves JAX to the CPU")
def test_a_wrong_kernel_has_no_schedule(monkeypatch, tmp_path):
    out = tmp_path / "bench.json"
    monkeypatch.setattr(bench, "_error", lambda *_: 1.0)
    monkeypatch.setattr(bench, "_schedules", lambda *_: pytest.fail("read a schedule"))
    monkeypatch.setattr(sys, "argv", ["bench", "--tpu", "v5e", "--out", str(out)])
    with pytest.raises(SystemExit, match="attention is wrong"):
        bench.main()
    assert not out.exists()
