"""Two processes of four devices each, stopped and killed, then one process: the losses of a run that never stopped."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests import compiling
from train.loop import distributed, metrics, models

ROOT = pathlib.Path(__file__).parents[1]
# Slowly, so that a signal finds it at work; the smoke recipe's chunks would compile twice.
PROGRAM = """
import sys, time
from train import finetune
from train.loop import metrics
show = metrics.Progress.show
def slowly(self, line):
    show(self, line)
    time.sleep(1)
if "--slowly" in sys.argv:
    sys.argv.remove("--slowly")
    metrics.Progress.show = slowly
finetune.main()
"""
RECIPE = ["configs/smoke.py", "--steps", "12", "--batch", "8", "--chunk", "8", "--checkpoint-every", "4"]


def start(out, devices, *arguments):
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": compiling.on_devices(devices),
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(out.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-c", PROGRAM, *RECIPE, "--out", str(out), "--cache", str(out.parent / "tokens")]
    return subprocess.Popen([*command, *arguments], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def start_two(out, *arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    join = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--local-devices", "4"]
    mesh = ["--mesh", "1", "2", "2", "2"]
    return [start(out, 4, *join, *mesh, "--process", str(i), *arguments) for i in range(2)]


def wait_for_step(out, step, processes):
    log, until = out / "metrics.jsonl", time.monotonic() + 300
    while not (log.exists() and log.read_text().count("\n") >= step):
        assert time.monotonic() < until and all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.05)


def finish(processes):
    """Exit codes and what was said."""
    said = [process.communicate(timeout=300)[1] for process in processes]
    return [process.returncode for process in processes], said


def losses(out):
    lines = metrics.read_metrics(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13))
    return np.asarray([[line["loss"], line["grad_norm"]] for line in lines])


@pytest.mark.slow
def test_stopped_killed_and_resumed_elsewhere(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    codes, said = finish([start(whole, 1)])
    assert codes == [0], said

    pair = start_two(parts, "--slowly")
    wait_for_step(parts, 2, pair)
    pair[1].send_signal(signal.SIGTERM)  # one is told; both stop at the same step
    codes, said = finish(pair)
    assert codes == [0, 0], said
    stopped = int(re.search(r"stopped after step (\d+)", said[0])[1])
    assert 2 <= stopped < 12 and (parts / f"checkpoints/{stopped}").is_dir()

    pair = start_two(parts, "--slowly")
    wait_for_step(parts, stopped + 2, pair)
    for process in pair:
        process.kill()
    assert finish(pair)[0] == [-signal.SIGKILL] * 2

    codes, said = finish([start(parts, 1)])
    assert codes == [0], said
    assert re.search(r"going on after step (\d+) of 12", said[0])
    np.testing.assert_allclose(losses(parts), losses(whole), rtol=1e-5)
    for got, want in zip(memory(parts), memory(whole), strict=True):
        assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)


def memory(out):
    import jax

    return jax.tree.leaves(models.trained_memory(out))


@pytest.mark.parametrize(
    ("environment", "answer"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "8"}, True),
        ({"SLURM_NTASKS": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_who_speaks_of_several_processes(environment, answer):
    assert distributed.several(environment) is answer


def test_slurm_tasks_that_leave_gpus_idle():
    with pytest.raises(ValueError, match="start it with srun"):
        distributed.check_slurm({"SLURM_NTASKS": "16"})
    with pytest.raises(ValueError, match="--ntasks-per-node=8"):
        distributed.check_slurm({"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "1"})
    distributed.check_slurm({"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "8"})


def test_flags_that_do_not_belong_together():
    with pytest.raises(ValueError, match="belong together"):
        distributed.join(distributed.Processes(coordinator="host:1", processes=2))
    with pytest.raises(ValueError, match="has 1 devices and local_devices=4 are expected"):
        distributed.join(distributed.Processes("off", local_devices=4))
