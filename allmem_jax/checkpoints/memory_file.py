"""A trained memory by itself: one small file that makes a converted model of a pretrained one.

A safetensors file with the parameters under `layers/memory`. The large matrices are int8, each output channel with a
scale of its own (`NAME:scale`); everything else is float32. The header holds the config of the model that it was
trained for, and the text of its model card. Those that come with this package lie in `allmem_jax/memories/`.

    Y layers    N memory heads    D, H dimensions of a head and of its hidden layer
"""

import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import numpy as np
import safetensors.numpy

from allmem_jax.checkpoints import families, layout
from allmem_jax.model import config as config_lib
from allmem_jax.storage import files, stores

SHIPPED = pathlib.Path(__file__).parent.parent / "memories"
_LARGE = re.compile(r"([qkv]|out)_proj/kernel|fast_(gate|up|down)")
_SCALE = ":scale"


def shipped() -> tuple[str, ...]:
    """Names of the memories that come with this package."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.safetensors")))


def save(
    path: str | os.PathLike[str], config: config_lib.ModelConfig, memory: Mapping[str, Any], card: str = ""
) -> None:
    """Writes a memory, whole or not at all.

    Args:
      path: of the file, or its URL.
      config: of the converted model.
      memory: parameters, {"layers": {"memory": ...}}.
      card: what it was trained on and how, what it does and does not.
    """
    tensors: dict[str, np.ndarray] = {}
    for name, leaf in flax.traverse_util.flatten_dict(memory["layers"]["memory"], sep="/").items():
        array = np.asarray(leaf, np.float32)
        if _LARGE.fullmatch(name):
            array, tensors[name + _SCALE] = quantise(array)
        tensors[name] = array
    header = {"allmem_config": config.replace(mixer=config.memory_mixer).to_json(), "card": card}
    files.write(path, safetensors.numpy.save(tensors, metadata=header))


def quantise(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [..., in, out] as int8 of that shape and its scale, float32 [..., 1, out]."""
    scale = np.maximum(np.abs(array).max(axis=-2, keepdims=True), 1e-12) / 127
    return np.round(array / scale).astype(np.int8), scale.astype(np.float32)


def load(name: str | os.PathLike[str], found: config_lib.ModelConfig) -> tuple[config_lib.ModelConfig, dict[str, Any]]:
    """Reads a memory for a model.

    Args:
      name: a file or its URL, or the name of one that comes with this package.
      found: config of the pretrained model.

    Returns:
      The converted model's config, and float32 parameters {"layers": {"memory": ...}}.

    Raises:
      FileNotFoundError: no such file or name.
      ValueError: the file is damaged, or for another model.
    """
    path = find(name)
    file = layout.open_safetensors(path)
    config, _ = _header(path, file)
    tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    if differing := families.differing_fields(config, found):
        raise ValueError(f"{path} is a memory for another model: {', '.join(differing)}")
    flat = {}
    for key, array in tensors.items():
        if not key.endswith(_SCALE):
            wide = array.astype(np.float32)
            flat[key] = wide * tensors[key + _SCALE] if array.dtype == np.int8 else wide
    memory = {"layers": {"memory": flax.traverse_util.unflatten_dict(flat, sep="/")}}
    return config.replace(eos_tokens=found.eos_tokens), memory


def describe(name: str | os.PathLike[str]) -> tuple[config_lib.ModelConfig, str]:
    """The converted model's config and the model card that a memory's file holds; `name` and errors as for `load`."""
    path = find(name)
    return _header(path, layout.open_safetensors(path))


def _header(path: pathlib.Path, file: Any) -> tuple[config_lib.ModelConfig, str]:
    header = file.metadata() or {}
    if "allmem_config" not in header:
        raise ValueError(f"{path} says nothing of the model it is for: it is no memory that `memory_file.save` wrote")
    try:
        return config_lib.ModelConfig.from_json(header["allmem_config"]), header.get("card", "")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def find(name: str | os.PathLike[str]) -> pathlib.Path:
    """The file of a memory that is named as `load` takes it."""
    inside = SHIPPED / f"{name}.safetensors"
    if re.fullmatch(r"[\w.-]+", str(name)) and inside.is_file():
        return inside
    path = stores.local(name).expanduser()
    if not path.is_file():
        known = ", ".join(shipped()) or "none"
        raise FileNotFoundError(f"memory={str(name)!r}: no such file, and none of those that come with it ({known})")
    return path
