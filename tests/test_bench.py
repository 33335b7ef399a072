"""What kernels are measured beside computes the same as they do."""

import jax
import numpy as np
import pytest

from pallas_kernels import ttt_memory
from pallas_kernels.tools import bench

torch_peers = pytest.importorskip("pallas_kernels.tools.torch_peers")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_memory_in_torch_is_the_memory(dtype):
    inputs = bench._memory_inputs(2, 48, 3, 8, jax.numpy.dtype(dtype))
    remember = lambda *x: ttt_memory(*x, chunk_size=16, implementation="reference")[0]  # noqa: E731
    want = [remember(*inputs), *jax.tree.leaves(bench._gradient(remember, len(inputs))(*inputs))]
    runs = torch_peers.memory_runs(inputs, 16, "cpu", compiled=False)
    got = [runs["forward"](), *runs["forward + backward"]()]
    for ours, theirs in zip(want, got, strict=True):
        ours, theirs = np.asarray(ours, np.float64), theirs.detach().double().numpy()
        assert np.linalg.norm(theirs - ours) <= {"float32": 1e-5, "bfloat16": 1e-2}[dtype] * np.linalg.norm(ours)


def test_what_torch_cannot_do_costs_no_figure(capsys):
    def fail(peers):
        raise RuntimeError("no compiler")

    (line,) = bench._torch("peer", "memory (1, 2)", fail, 1)
    assert line == {"case": "memory (1, 2)", "name": "peer", "error": "no compiler"}
    (line,) = bench._torch("peer", "memory (1, 2)", lambda peers: {"forward": lambda: None}, 1)
    assert (line["case"], line["name"]) == ("memory forward (1, 2)", "peer") and line["seconds"] >= 0
