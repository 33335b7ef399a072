"""A model's folder: a valid Hugging Face folder of the backbone, and beside it the memory.

`allmem_config.json` holds the whole `ModelConfig`, and `allmem.safetensors` the memory, by the paths of our parameter
tree.
"""

import contextlib
import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import safetensors

from allmem_jax.checkpoints import ends, families, hf_config, weights
from allmem_jax.model import config as config_lib

ALLMEM_CONFIG = "allmem_config.json"
ALLMEM_WEIGHTS = "allmem.safetensors"
CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_config(path: pathlib.Path) -> config_lib.ModelConfig:
    """What a folder holds, with the mixer that it runs with.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: a file is damaged, or says what is not supported.
    """
    if not (path / CONFIG).is_file():
        found = sorted(path.glob("*.gguf"))
        hint = f"give the file itself: {found[0]}" if found else "give a Hugging Face folder or a .gguf file"
        raise FileNotFoundError(f"{path} has no {CONFIG}; {hint}")
    for file in sorted(path.iterdir()):
        if file.is_file():
            refuse_pointer(file)
    with naming(path / CONFIG):
        raw = _read_json(path / CONFIG)
        config = hf_config.from_hf(raw)
    stated = {}
    if (path / GENERATION).is_file():
        with naming(path / GENERATION):
            stated = _read_json(path / GENERATION)
    eos_tokens = ends.gather(ends.of_hf(raw, stated), config.vocab_size)
    if (path / ALLMEM_CONFIG).is_file():
        with naming(path / ALLMEM_CONFIG):
            saved = config_lib.ModelConfig.from_json(_read_text(path / ALLMEM_CONFIG))
        if differing := families.differing_fields(saved, config):
            raise ValueError(f"{path / ALLMEM_CONFIG} is of another model than {CONFIG}: {', '.join(differing)}")
        config, eos_tokens = saved, tuple(sorted({*saved.eos_tokens, *eos_tokens}))
    config = config.replace(eos_tokens=eos_tokens)
    if (path / ALLMEM_WEIGHTS).is_file():
        return config.replace(mixer=config.memory_mixer)
    return config.replace(mixer="full") if config.mixer in config_lib.MEMORY_MIXERS else config


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files of the backbone, from its index where it has one."""
    if not (folder / INDEX).is_file():
        if (folder / WEIGHTS).is_file():
            return [folder / WEIGHTS]
        hint = "; pickled .bin weights are not read, convert them to safetensors" if any(folder.glob("*.bin")) else ""
        raise FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {INDEX}{hint}")
    with naming(folder / INDEX):
        weight_map = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("has no weight_map")
        names = sorted(set(map(str, weight_map.values())))
        if bad := [name for name in names if name in (".", "..") or "/" in name or "\\" in name]:
            raise ValueError(f"shard names must be plain file names in this folder, not {', '.join(map(repr, bad))}")
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks shards that {INDEX} lists: {', '.join(absent)}")
    return [folder / name for name in names]


def stored(path: pathlib.Path) -> list[weights.Stored]:
    """The tensors of a safetensors file, which stays open as long as they are there."""
    file = open_safetensors(path)
    tensors = []
    for name in file.keys():  # noqa: SIM118 (not a dict)
        view = file.get_slice(name)
        if view.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(f"{path}: tensor {name!r} has the unsupported dtype {view.get_dtype()}")
        tensors.append(weights.Stored(name, tuple(view.get_shape()), functools.partial(file.get_tensor, name)))
    return tensors


def open_safetensors(path: pathlib.Path) -> Any:
    """An open safetensors file; ValueError where it is damaged."""
    try:
        return safetensors.safe_open(path, framework="np")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: truncated or damaged safetensors file ({error}); fetch it again") from None


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
    """Puts the file's name before errors about its contents."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def refuse_pointer(path: pathlib.Path) -> None:
    """ValueError where a file is what Git leaves in the place of a large one."""
    with path.open("rb") as file:
        if file.read(24).startswith(b"version https://git-lfs"):
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        contents = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(contents, dict):
        raise ValueError(f"holds a {type(contents).__name__}, not an object")
    return contents


def _read_text(path: pathlib.Path) -> str:
    """UTF-8, with or without the byte-order mark that some editors put first."""
    return path.read_bytes().decode("utf-8-sig")
