"""Models out, as folders that `load` and transformers both read: see `layout`."""

import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import huggingface_hub
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import transformers

from allmem_jax.checkpoints import ends, families, hf_config, layout, weights
from allmem_jax.checkpoints import tokenizer as tokenizer_lib
from allmem_jax.model import config as config_lib
from allmem_jax.storage import stores


def save_pretrained(
    path: str | os.PathLike[str],
    config: config_lib.ModelConfig,
    params: Mapping[str, Any],
    tokenizer: transformers.PreTrainedTokenizerBase | None = None,
    *,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> None:
    """Writes a folder that `load_pretrained` reads, and whose backbone transformers reads.

    The folder is written beside `path` and renamed when it is complete, so a failure leaves `path` as it was. What is
    written to a URL has its config.json last.

    Args:
      path: the folder or its URL; it must not exist, or be empty, unless `overwrite`.
      config: the model's config.
      params: its parameters, with or without `layers/memory`. With one, the folder is loaded with its mixer again,
        whatever `config.mixer` runs without it.
      tokenizer: saved too when given.
      dtype: "float32" or "bfloat16", of the backbone's tensors; None keeps that of the parameters.
      max_shard_size: backbones above this size are split, e.g. "5GB".
      overwrite: replace what `path` holds.

    Raises:
      FileExistsError: `path` is taken.
      ValueError: the parameters do not fit the config, or no Hugging Face class can express it.
    """
    if stores.is_url(path):
        if not overwrite and stores.taken(path):
            raise FileExistsError(f"{path} is not empty; give another, or overwrite=True to replace it")
        with stores.scratch("model") as folder:
            save_pretrained(folder, config, params, tokenizer, dtype=dtype, max_shard_size=max_shard_size)
            return stores.replace(folder, path, last=layout.CONFIG)
    path = pathlib.Path(path).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; give the name of a folder")
    if stores.taken(path) and not overwrite:
        raise FileExistsError(f"{path} is not empty; give another folder, or overwrite=True to replace it")
    backbone = flax.traverse_util.flatten_dict(params, sep="/")
    remembered = [name for name in backbone if name.startswith(weights.MEMORY)]
    memory = {name: np.asarray(backbone.pop(name), np.float32) for name in remembered}
    if memory:
        config = config.replace(mixer=config.memory_mixer)
    raw = hf_config.to_hf(config)
    wanted = weights.param_shapes(config if memory else config.replace(mixer="full"))
    weights.check("params", {name: leaf.shape for name, leaf in (backbone | memory).items()}, wanted)
    stored_as = config.replace(dtype=dtype or str(backbone["embed/embedding"].dtype)).dtype
    raw |= {"torch_dtype": stored_as, "transformers_version": transformers.__version__}
    if tokenizer is not None:
        raw["bos_token_id"] = tokenizer.bos_token_id
        stated = {"the config": config.eos_tokens, "the tokenizer": ends.of_tokenizer(tokenizer)}
        config = config.replace(eos_tokens=ends.gather(stated, config.vocab_size))
    listed = list(config.eos_tokens)
    generation = {"eos_token_id": listed if len(listed) > 1 else listed[0] if listed else None}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        _write_backbone(part, config, backbone, jnp.dtype(stored_as), max_shard_size)
        _write_json(part / layout.CONFIG, raw | generation)
        _write_json(part / layout.GENERATION, generation)
        (part / layout.ALLMEM_CONFIG).write_text(config.to_json() + "\n")
        if memory:
            safetensors.numpy.save_file(memory, part / layout.ALLMEM_WEIGHTS)
        if tokenizer is not None:
            tokenizer_lib.save_tokenizer(tokenizer, part)
        part.chmod(0o755)
        _replace_folder(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_json(path: pathlib.Path, contents: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=2) + "\n")


def _write_backbone(
    folder: pathlib.Path,
    config: config_lib.ModelConfig,
    backbone: Mapping[str, Any],
    dtype: np.dtype,
    max_shard_size: int | str,
) -> None:
    """Writes the safetensors files and, when there are several, their index."""
    places = {}  # name in the file -> parameter, layer or None, and transform
    for path in backbone:
        for layer in weights.slices(config, path):
            name, transform = families.to_name(families.HF_RULES[config.family], path, layer)
            places[name] = (path, layer, transform)

    def n_bytes(place: tuple[str, int | None, str]) -> int:
        path, _, _ = place
        return backbone[path].size // len(weights.slices(config, path)) * dtype.itemsize

    def tensor(path: str, layer: int | None, transform: str) -> np.ndarray:
        array = np.asarray(backbone[path])[... if layer is None else layer]
        return np.ascontiguousarray(array.T if transform == "transpose" else array, dtype)

    split = huggingface_hub.split_state_dict_into_shards_factory(
        places,
        get_storage_size=n_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file_name, names in split.filename_to_tensors.items():
        tensors = {name: tensor(*places[name]) for name in names}
        safetensors.numpy.save_file(tensors, folder / file_name, metadata={"format": "pt"})
    if split.is_sharded:
        _write_json(folder / layout.INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def _replace_folder(part: pathlib.Path, path: pathlib.Path) -> None:
    """Renames `part` to `path`; what `path` held is put back if that fails, and removed if it succeeds."""
    if not stores.taken(path):
        os.replace(part, path)
        return
    old = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    os.replace(path, old)
    try:
        os.replace(part, path)
    except OSError:
        os.replace(old, path)
        raise
    shutil.rmtree(old)
