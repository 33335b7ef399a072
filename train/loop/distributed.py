"""Joining the processes of a run, and what they agree on: TPU pods, Slurm, GKE, or plain flags.

JAX assumes one process a host on TPUs and one process a GPU under Slurm and Open MPI.
"""

import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import jax
from jax.experimental import multihost_utils


@dataclasses.dataclass(frozen=True)
class Processes:
    """Where the other processes of a run are."""

    distributed: Literal["auto", "on", "off"] = "auto"
    """Join other processes: where Slurm, Open MPI, GKE or a TPU pod says that there are some; always (TPU VMs, whose
    metadata server knows); never."""
    coordinator: str = ""
    """HOST:PORT of process 0, to join by flags; with processes and process."""
    processes: int = 0
    """How many processes there are."""
    process: int = -1
    """Which of them this is, from 0."""
    local_devices: int = 0
    """Devices that this process must have; 0 takes any number."""


def join(others: Processes) -> None:
    """Makes this process one of its run's; to be called before anything touches a device.

    Raises:
      ValueError: flags that are incomplete, or devices other than expected, which would leave some idle in silence.
    """
    coordinator, processes, process = others.coordinator, others.processes, others.process
    given = (bool(coordinator), processes > 0, process >= 0)
    if any(given):
        if not all(given) or process >= processes:
            raise ValueError(
                f"coordinator={coordinator!r}, processes={processes} and process={process} belong together: HOST:PORT, "
                "the number of processes, and this one's from 0"
            )
        jax.distributed.initialize(coordinator, processes, process, cluster_detection_method="deactivate")
    elif others.distributed == "on" or (others.distributed == "auto" and several(os.environ)):
        check_slurm(os.environ)
        jax.distributed.initialize()
    here = jax.local_device_count()
    if others.local_devices not in (0, here):
        raise ValueError(
            f"process {jax.process_index()} of {jax.process_count()} has {here} devices and local_devices="
            f"{others.local_devices} are expected. Under Slurm start one process a GPU (--ntasks-per-node equal to "
            "--gpus-per-node); on a TPU one process a host; or set local_devices to what is meant"
        )


def several(environment: Mapping[str, str]) -> bool:
    """Whether the environment speaks of more than one process."""
    counts = (environment.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES"))
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "").count(",") + 1
    return any(count.isdigit() and int(count) > 1 for count in counts) or hosts > 1


def check_slurm(environment: Mapping[str, str]) -> None:
    """Raises a ValueError where a Slurm job would leave GPUs or nodes idle, as JAX gives each process one GPU."""
    if environment.get("SLURM_NTASKS", "1") != "1" and "SLURM_STEP_NODELIST" not in environment:
        raise ValueError(
            f"Slurm gave this job {environment['SLURM_NTASKS']} tasks and this process is none of them: start it with "
            "srun, or give --distributed off to run alone"
        )
    gpus, tasks = environment.get("SLURM_GPUS_ON_NODE", ""), environment.get("SLURM_NTASKS_PER_NODE", "")
    if gpus.isdigit() and tasks.isdigit() and gpus != tasks:
        raise ValueError(
            f"Slurm gave this node {gpus} GPUs and {tasks} tasks, and under Slurm JAX takes one GPU a task: ask for "
            f"--ntasks-per-node={gpus} (and srun, not a plain command)"
        )


def main_process() -> bool:
    """Whether this process writes what the run says of itself."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns when every process is here; `what` is the same in all of them, and of this one place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


@contextmanager
def stop_signals() -> Iterator[Callable[[int], int]]:
    """Turns SIGTERM and a first Ctrl-C into a number to ask for after each step (0: none).

    Of several processes all get the same answer at the same step, whichever of them was signalled; Ctrl-C then acts as
    usual, and SIGTERM is JAX's, which spreads the word.
    """
    if jax.process_count() > 1:
        yield lambda step: signal.SIGTERM * multihost_utils.reached_preemption_sync_point(step)
        return
    seen: list[int] = []
    kinds = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        signal.signal(number, before[signal.Signals(number)])

    for kind in kinds:
        signal.signal(kind, note)
    try:
        yield lambda step: seen[0] if seen else 0
    finally:
        for kind in kinds:
            signal.signal(kind, before[kind])
