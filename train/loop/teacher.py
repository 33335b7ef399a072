"""The teacher's hidden states, kept on disk: runs that share rows, such as a control or other seeds, pay for them once.

B batch    L tokens of a row    d model
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import safetensors
import safetensors.flax
from jax.sharding import Mesh

from allmem_jax.model import config as config_lib
from allmem_jax.model import lm, sharding
from allmem_jax.storage import files
from train.loop import steps
from train.recipe import MEMORY

_STUDENT = {*MEMORY, "window", "sinks", "chunk", "remat"}  # fields that the teacher has no use for


class Kept:
    """A teacher, (frozen, batch) -> hidden states [B, L, d], that finds what it computed before.

    When the folder is full, what no call since this one was made has asked for goes first; where nothing is left of
    that, nothing more is kept, so that the next run finds the rows that it begins with.

    Args:
      teacher: computes them; see `compiled.make`.
      folder: one file a batch.
      limit: bytes that the folder may have.
      config: of the student.
      origin: what tells the backbone from others.
      mesh: of the devices, all of this process.
    """

    def __init__(
        self,
        teacher: Callable[[lm.Params, steps.Batch], jax.Array],
        folder: Path,
        limit: float,
        config: config_lib.ModelConfig,
        origin: str,
        mesh: Mesh,
    ):
        fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in _STUDENT}
        self._depends = json.dumps([origin, fields], sort_keys=True).encode()
        self._teacher, self._folder, self._limit, self._config, self._mesh = teacher, folder, limit, config, mesh
        folder.mkdir(parents=True, exist_ok=True)
        files.sweep(folder)
        self._began = time.time()

    def __call__(self, frozen: lm.Params, batch: steps.Batch) -> jax.Array:
        """Hidden states [B, L, d]."""
        digest = hashlib.sha256(self._depends)
        for part in (batch.tokens, batch.segment_ids):
            digest.update(b"none" if part is None else jax.device_get(part).tobytes())
        path = self._folder / f"{digest.hexdigest()[:32]}.safetensors"
        if (found := self._read(path, batch.tokens.shape)) is not None:
            return found
        hidden = self._teacher(frozen, batch)
        content = safetensors.flax.save({"hidden": hidden})
        if self._room(len(content)):
            files.write(path, content)
        return hidden

    def _read(self, path: Path, shape: tuple[int, ...]) -> jax.Array | None:
        """What is there, or None where that is nothing or damaged."""
        try:
            hidden = safetensors.flax.load_file(path)["hidden"]
            os.utime(path)
        except (FileNotFoundError, KeyError, safetensors.SafetensorError):
            return None
        if (hidden.shape, hidden.dtype) != ((*shape, self._config.d_model), jnp.dtype(self._config.dtype)):
            return None
        return jax.device_put(hidden, sharding.batch_sharding(self._mesh))

    def _room(self, size: int) -> bool:
        """Whether that many bytes more may be kept, now that old files have gone for them."""
        found = []
        for path in self._folder.glob("*.safetensors"):
            with contextlib.suppress(FileNotFoundError):  # another run removed it
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        room = self._limit - sum(taken for _, taken, _ in found)
        for used, taken, path in sorted(found):
            if room >= size or used >= self._began:
                break
            room += taken
            path.unlink(missing_ok=True)
        return room >= size
