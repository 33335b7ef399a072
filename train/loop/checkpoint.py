"""Checkpoints of a run: what is trained, never the frozen backbone. The only module that touches orbax.

A checkpoint holds the arrays (memory, optimiser, counters), a small JSON record (where the data stream stands) and,
as metadata, the run's identity: everything that a continuation must share to give the same losses, with a hash of the
backbone in place of its arrays. Identity and shapes are compared before an array is read.

Orbax writes to local folders and to gs:// by itself. To other stores, such as s3://, a step is copied once it is
complete, by the one process that there may then be.
"""

import contextlib
import hashlib
import json
import os
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from allmem_jax.model import sharding
from allmem_jax.storage import stores

Identity = dict[str, Any]
_LAST = "_CHECKPOINT_METADATA"  # of orbax, in every step; where steps are copied, the file that is copied last


class CheckpointMismatch(ValueError):
    """The checkpoint belongs to another run: another recipe, another backbone or other shapes."""


class Checkpoints:
    """The checkpoints of one run, in one folder; a context manager.

    Saving is atomic: a step exists completely or not at all. What a killed process left half-written is never listed;
    it is removed in the background when the folder is opened again, at the latest before the next save is complete.

    Args:
      directory: created when missing; or a URL.
      identity: JSON values that a checkpoint must agree on with the run that reads it.
      keep: how many of the newest steps stay.
    """

    def __init__(self, directory: str | os.PathLike[str], identity: Identity, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep={keep} must be at least 1")
        self._identity = json.loads(json.dumps(identity))  # what it will look like when read back
        self._saving: Any = None
        self._copies = os.fspath(directory) if stores.is_url(directory) and not shared(directory) else ""
        self._copying = futures.ThreadPoolExecutor(1)
        self._opened = contextlib.ExitStack()
        if self._copies:
            directory = self._spool = self._opened.enter_context(stores.scratch("checkpoints"))
            _fetch(self._copies, self._spool)
        self._manager = ocp.training.Checkpointer(
            os.fspath(directory) if stores.is_url(directory) else Path(directory).absolute(),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.wait()
        finally:
            self._manager.close()
            self._copying.shutdown()
            self._opened.close()

    @property
    def steps(self) -> list[int]:
        """Steps on disk, oldest first."""
        return [checkpoint.step for checkpoint in self._manager.checkpoints]

    def save(self, step: int, arrays: Any, record: dict[str, Any]) -> None:
        """Writes one step in the background; a step that is there already stays as it is.

        Returns once the arrays are copied, so that they may be given away. A save that is still under way is waited
        for first, and leaving the context waits for the last one.

        Args:
          step: number of steps done.
          arrays: pytree of `jax.Array`.
          record: JSON values.

        Raises:
          OSError: this save or the one before could not be written, as on a full disk; older steps stay.
        """
        self.wait()
        if step in self.steps:
            return
        metadata = {"identity": self._identity, "shapes": _shapes(arrays), "record": record}
        self._saving = self._manager.save_checkpointables_async(step, {"arrays": arrays}, custom_metadata=metadata)
        if self._copies:
            self._saving = self._copying.submit(self._copy, self._saving, step)

    def _copy(self, saving: Any, step: int) -> None:
        """Copies a step to the URL when it is complete, and removes there what is kept no longer."""
        saving.result()
        stores.replace(self._spool / str(step), f"{self._copies}/{step}", last=_LAST)
        kept = {str(step) for step in self.steps}
        old = [name for name in stores.names(self._copies) if name.partition("/")[0] not in kept]
        stores.remove(self._copies, sorted(old, key=lambda name: not name.endswith(f"/{_LAST}")))

    def wait(self) -> None:
        """Returns when nothing is being written."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def restore(self, like: Any, step: int | None = None) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest checkpoint (or that of `step`), placed as `like` is; None when there is none.

        Args:
          like: arrays of the expected shapes, dtypes and shardings; their values are not used.
          step: one of `steps`; None takes the newest.

        Raises:
          CheckpointMismatch: it was written by another run; every difference is named with both values.
        """
        self.wait()
        if not self.steps:
            return None
        step = self.steps[-1] if step is None else step
        metadata = self._manager.checkpointables_metadata(step).custom_metadata
        differences = _differences(metadata["identity"], self._identity)
        differences += _differences(metadata["shapes"], _shapes(like))
        if differences:
            place = self._copies or self._manager.directory
            raise CheckpointMismatch(
                f"the checkpoint in {place} is of another run: {'; '.join(differences[:8])}"
                f"{' ...' if len(differences) > 8 else ''}. Use another output folder, or the settings it was made with"
            )
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        arrays = self._manager.load_checkpointables(step, {"arrays": abstract})["arrays"]
        return step, arrays, metadata["record"]


def shared(directory: str | os.PathLike[str]) -> bool:
    """Whether several processes can write a checkpoint together to such a path."""
    return not stores.is_url(directory) or os.fspath(directory).startswith("gs://")


def _fetch(url: str, folder: Path) -> None:
    """Copies the complete steps below a URL."""
    names = stores.names(url)
    complete = {name.partition("/")[0] for name in names if name.endswith(f"/{_LAST}") and name.count("/") == 1}
    stores.get(url, [name for name in names if name.partition("/")[0] in complete], folder)


def content_hash(tree: Any) -> str:
    """sha256 over paths, dtypes, shapes and bytes of all arrays: equal for equal parameters, wherever they lie."""
    digest = hashlib.sha256()
    for path, leaf in sorted((sharding.path_string(p), x) for p, x in jax.tree_util.tree_leaves_with_path(tree)):
        value = np.ascontiguousarray(leaf)
        digest.update(f"{path} {value.dtype} {value.shape}\n".encode())
        digest.update(value.view(np.uint8).data)
    return digest.hexdigest()


def _shapes(tree: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {sharding.path_string(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _differences(saved: Identity, current: Identity) -> list[str]:
    return [
        f"{name} is {saved.get(name, 'absent')} there and {current.get(name, 'absent')} here"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name, "absent") != current.get(name, "absent")
    ]
