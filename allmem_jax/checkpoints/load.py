"""Pretrained models in, from wherever they lie: Hugging Face folders (safetensors), GGUF files, and our own folders.

A path may be a URL, see `stores`. A config alone is read without weights, and may also be a preset's.
"""

import functools
import os
import pathlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import transformers

from allmem_jax.checkpoints import ends, families, gguf_config, gguf_reader, layout, memory_file, weights
from allmem_jax.checkpoints import tokenizer as tokenizer_lib
from allmem_jax.model import config as config_lib
from allmem_jax.model import lm
from allmem_jax.storage import stores

Loaded = tuple[config_lib.ModelConfig, dict[str, Any], transformers.PreTrainedTokenizerBase | None]


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    memory: str | os.PathLike[str] | None = None,
    **overrides: Any,
) -> Loaded:
    """Loads a pretrained model, or one that `save_pretrained` wrote.

    Args:
      path: a Hugging Face folder with safetensors weights, or a GGUF file; a URL of either, see `stores`, such as
        hf://OWNER/NAME on the Hugging Face Hub.
      dtype: "float32" or "bfloat16", of the backbone's parameters and of the config's arithmetic. The memory's
        parameters are always float32.
      memory: a trained memory to add to a model without one, see `memory_file`: the name of one that comes with this
        package, or a file. Window, sinks and chunk are then those it was trained with, where `overrides` has none.
      **overrides: fields of `ModelConfig`, e.g. `window=128`. Without a `mixer` the model comes as it runs: with the
        mixer of its memory where the folder has one, else "full", or "swa" where it was saved so. A mixer whose
        memory is missing gets an untrained one, with a warning.

    Returns:
      The config, the parameters and the tokenizer (None where there is none). The parameters are nested dicts of
      jax arrays; they hold `layers/memory` when the folder has a memory, or when `mixer` asks for one.

    Raises:
      FileNotFoundError: no such file or folder, or one without weights.
      ValueError: the files are damaged, or do not make a supported model. Unused, missing, doubly matched and
        wrongly shaped tensors come as one error that lists them all.
    """
    path = stores.local(path).expanduser()
    overrides["dtype"] = dtype
    if overrides.get("mixer") is None:
        overrides.pop("mixer", None)
    if path.is_dir():
        config, params = _load_folder(path, overrides)
    elif path.is_file():
        config, params = _load_gguf(path, overrides)
    else:
        raise FileNotFoundError(f"{path}: no such file or folder; give a local Hugging Face folder or a .gguf file")
    if memory is not None:
        if "memory" in params["layers"]:
            raise ValueError(f"memory={str(memory)!r}: {path} has a memory already; give the model it was made of")
        config, added = memory_file.load(memory, config)
        config = config.replace(**overrides)
        shapes = weights.flat_shapes(added["layers"]["memory"])
        weights.check(f"memory={str(memory)!r}", shapes, weights.memory_shapes(config))
        params = lm.merge_params(params, jax.tree.map(jnp.asarray, added))
    if config.mixer in config_lib.MEMORY_MIXERS and "memory" not in params["layers"]:
        warnings.warn(f"{path} has no memory: an untrained one is added, which changes nothing yet", stacklevel=2)
        params = lm.merge_params(params, lm.init_memory(config))
    tokenizer = tokenizer_lib.load_tokenizer(path)
    if "eos_tokens" not in overrides and tokenizer is not None:
        stated = {"the config": config.eos_tokens, f"the tokenizer of {path}": ends.of_tokenizer(tokenizer)}
        config = config.replace(eos_tokens=ends.gather(stated, config.vocab_size))
        tokenizer.stated_ends = config.eos_tokens
    return config, params, tokenizer


def load_with_tokenizer(path: str | os.PathLike[str], **given: Any) -> tuple[config_lib.ModelConfig, lm.Params, Any]:
    """`load_pretrained` of a model that is to read texts; ValueError where it has no tokenizer."""
    config, params, tokenizer = load_pretrained(path, **given)
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer: copy the original model's tokenizer.json into it")
    return config, params, tokenizer


def read_config(path: str | os.PathLike[str]) -> config_lib.ModelConfig:
    """The config of a Hugging Face folder, a GGUF file or a preset, as `load_pretrained` gives it; reads no weights.

    It has no `eos_tokens` that only the tokenizer knows. A preset has no memory.

    Raises:
      FileNotFoundError: no such file or folder, or one without a config.json.
      ValueError: an unknown preset, or a model that is damaged or not supported.
    """
    name, path = os.fspath(path), stores.local(path, (".json", layout.ALLMEM_WEIGHTS)).expanduser()
    if path.is_dir():
        return layout.read_config(path)
    if path.is_file():
        return _gguf_config(_open_gguf(path))
    if "/" in name or name.endswith(".gguf"):
        raise FileNotFoundError(f"{name}: no such file or folder")
    return config_lib.preset(name, mixer="full")


def _load_folder(path: pathlib.Path, overrides: dict[str, Any]) -> tuple[config_lib.ModelConfig, dict[str, Any]]:
    found = layout.read_config(path)
    config = found.replace(**overrides)
    remembers = (path / layout.ALLMEM_WEIGHTS).is_file()
    if remembers and config.mixer in config_lib.MEMORY_MIXERS and config.mixer != found.mixer:
        raise ValueError(
            f"{path / layout.ALLMEM_WEIGHTS} is a memory for mixer={found.mixer!r}, not for mixer={config.mixer!r}: "
            "leave mixer as it is, or start from a model without a memory"
        )
    stored = [tensor for file in layout.weight_files(path) for tensor in layout.stored(file)]
    params = weights.backbone(path, config, stored, families.HF_RULES[config.family])
    if remembers:
        file = path / layout.ALLMEM_WEIGHTS
        params["layers"]["memory"] = weights.memory(file, config.replace(mixer=found.mixer), layout.stored(file))
    return config, params


def _load_gguf(path: pathlib.Path, overrides: dict[str, Any]) -> tuple[config_lib.ModelConfig, dict[str, Any]]:
    file = _open_gguf(path)
    config = _gguf_config(file).replace(**overrides)
    stored = [
        weights.Stored(name, tensor.shape, functools.partial(file.read, name)) for name, tensor in file.tensors.items()
    ]
    return config, weights.backbone(path, config, stored, families.GGUF_RULES[config.family])


def _open_gguf(path: pathlib.Path) -> gguf_reader.GGUFFile:
    layout.refuse_pointer(path)
    if path.suffix == ".safetensors":
        raise ValueError(f"{path} holds weights alone; give the folder that has its config.json too")
    file = gguf_reader.open_gguf(path)
    if file.metadata.get("split.count", 1) != 1:
        raise ValueError(f"{path} is one of {file.metadata['split.count']} parts; merge them with llama-gguf-split")
    return file


def _gguf_config(file: gguf_reader.GGUFFile) -> config_lib.ModelConfig:
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    with layout.naming(file.path):
        factors = file.read("rope_freqs.weight") if "rope_freqs.weight" in shapes else None
        config = gguf_config.from_gguf(file.metadata, shapes, factors)
        return config.replace(mixer="full", eos_tokens=ends.gather(ends.of_gguf(file.metadata), config.vocab_size))
