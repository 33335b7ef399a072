"""Pretrained checkpoints in, and back out: Hugging Face folders (safetensors) and GGUF files.

The backbone of an exported folder is a valid Hugging Face model. Beside it lie `allmem_config.json` (the whole
`ModelConfig`) and `allmem.safetensors` (the memory, by the paths of our parameter tree).
"""

import contextlib
import functools
import json
import os
import pathlib
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
import transformers

from allmem_jax.checkpoints import ends, families, gguf_reader, memory_file
from allmem_jax.checkpoints import tokenizer as tokenizer_lib
from allmem_jax.model import config as config_lib
from allmem_jax.model import lm
from allmem_jax.storage import stores

ALLMEM_CONFIG = "allmem_config.json"
ALLMEM_WEIGHTS = "allmem.safetensors"
_GENERATION = "generation_config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class Stored(NamedTuple):
    """A tensor in a file: its name and shape there, and how to read it."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    memory: str | os.PathLike[str] | None = None,
    **overrides: Any,
) -> tuple[config_lib.ModelConfig, dict[str, Any], transformers.PreTrainedTokenizerBase | None]:
    """Loads a pretrained model, or one that `save_pretrained` wrote.

    Args:
      path: a Hugging Face folder with safetensors weights, or a GGUF file; a URL of either, see `stores`.
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
    _np_dtype(dtype)
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
        shapes = {name: leaf.shape for name, leaf in _flatten(added["layers"]["memory"]).items()}
        _check_memory(f"memory={str(memory)!r}", config, shapes)
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


def read_config(path: str | os.PathLike[str]) -> config_lib.ModelConfig:
    """The config of a Hugging Face folder, a GGUF file or a preset, as `load_pretrained` gives it; reads no weights.

    It has no `eos_tokens` that only the tokenizer knows.

    Raises:
      FileNotFoundError: no such file or folder, or one without a config.json.
      ValueError: an unknown preset, or a model that is damaged or not supported.
    """
    name, path = os.fspath(path), stores.local(path, (".json", ALLMEM_WEIGHTS)).expanduser()
    if path.is_dir():
        return _folder_config(path)
    if path.is_file():
        return _gguf_config(_open_gguf(path))
    if "/" in name or name.endswith(".gguf"):
        raise FileNotFoundError(f"{name}: no such file or folder")
    return config_lib.preset(name)


def _np_dtype(name: str) -> np.dtype:
    if name not in _DTYPES:
        raise ValueError(f"dtype={name!r} is not one of {', '.join(map(repr, _DTYPES))}")
    return _DTYPES[name]


def _open_gguf(path: pathlib.Path) -> gguf_reader.GGUFFile:
    _refuse_pointer(path)
    if path.suffix == ".safetensors":
        raise ValueError(f"{path} holds weights alone; give the folder that has its config.json too")
    file = gguf_reader.open_gguf(path)
    if file.metadata.get("split.count", 1) != 1:
        raise ValueError(f"{path} is one of {file.metadata['split.count']} parts; merge them with llama-gguf-split")
    return file


def _gguf_config(file: gguf_reader.GGUFFile) -> config_lib.ModelConfig:
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    with _naming(file.path):
        factors = file.read("rope_freqs.weight") if "rope_freqs.weight" in shapes else None
        config = families.config_from_gguf(file.metadata, shapes, factors)
        return config.replace(mixer="full", eos_tokens=ends.gather(ends.of_gguf(file.metadata), config.vocab_size))


def _load_gguf(path: pathlib.Path, overrides: dict[str, Any]) -> tuple[config_lib.ModelConfig, dict[str, Any]]:
    file = _open_gguf(path)
    config = _gguf_config(file).replace(**overrides)
    stored = [Stored(name, tensor.shape, functools.partial(file.read, name)) for name, tensor in file.tensors.items()]
    return config, _build(path, config, stored, families.GGUF_RULES[config.family])


def _folder_config(path: pathlib.Path) -> config_lib.ModelConfig:
    """What a folder holds, with the mixer that it runs with."""
    if not (path / "config.json").is_file():
        found = sorted(path.glob("*.gguf"))
        hint = f"give the file itself: {found[0]}" if found else "give a Hugging Face folder or a .gguf file"
        raise FileNotFoundError(f"{path} has no config.json; {hint}")
    for file in sorted(path.iterdir()):
        if file.is_file():
            _refuse_pointer(file)
    with _naming(path / "config.json"):
        raw = _read_json(path / "config.json")
        config = families.config_from_hf(raw)
    stated = {}
    if (path / _GENERATION).is_file():
        with _naming(path / _GENERATION):
            stated = _read_json(path / _GENERATION)
    eos_tokens = ends.gather(ends.of_hf(raw, stated), config.vocab_size)
    if (path / ALLMEM_CONFIG).is_file():
        with _naming(path / ALLMEM_CONFIG):
            saved = config_lib.ModelConfig.from_json(_read_text(path / ALLMEM_CONFIG))
        if differing := families.differing_fields(saved, config):
            raise ValueError(f"{path / ALLMEM_CONFIG} is of another model than config.json: {', '.join(differing)}")
        config, eos_tokens = saved, tuple(sorted({*saved.eos_tokens, *eos_tokens}))
    config = config.replace(eos_tokens=eos_tokens)
    if (path / ALLMEM_WEIGHTS).is_file():
        return config.replace(mixer=config.memory_mixer)
    return config.replace(mixer="full") if config.mixer in config_lib.MEMORY_MIXERS else config


def _load_folder(path: pathlib.Path, overrides: dict[str, Any]) -> tuple[config_lib.ModelConfig, dict[str, Any]]:
    found = _folder_config(path)
    config = found.replace(**overrides)
    remembers = (path / ALLMEM_WEIGHTS).is_file()
    if remembers and config.mixer in config_lib.MEMORY_MIXERS and config.mixer != found.mixer:
        raise ValueError(
            f"{path / ALLMEM_WEIGHTS} is a memory for mixer={found.mixer!r}, not for mixer={config.mixer!r}: leave "
            "mixer as it is, or start from a model without a memory"
        )
    with contextlib.ExitStack() as files:
        stored = [tensor for file in _weight_files(path) for tensor in _open_safetensors(file, files)]
        params = _build(path, config, stored, families.HF_RULES[config.family])
        if remembers:
            memory = _open_safetensors(path / ALLMEM_WEIGHTS, files)
            like = config.replace(mixer=found.mixer)
            params["layers"]["memory"] = _build_memory(path / ALLMEM_WEIGHTS, like, memory)
    return config, params


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    """Puts the file's name before errors about its contents."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


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


def _refuse_pointer(path: pathlib.Path) -> None:
    with path.open("rb") as file:
        if file.read(24).startswith(b"version https://git-lfs"):
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files of a model, from its index where it has one."""
    if not (folder / _INDEX).is_file():
        if (folder / _WEIGHTS).is_file():
            return [folder / _WEIGHTS]
        hint = "; pickled .bin weights are not read, convert them to safetensors" if any(folder.glob("*.bin")) else ""
        raise FileNotFoundError(f"{folder} has neither {_WEIGHTS} nor {_INDEX}{hint}")
    with _naming(folder / _INDEX):
        weight_map = _read_json(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("has no weight_map")
        names = sorted(set(map(str, weight_map.values())))
        if bad := [name for name in names if name in (".", "..") or "/" in name or "\\" in name]:
            raise ValueError(f"shard names must be plain file names in this folder, not {', '.join(map(repr, bad))}")
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks shards that {_INDEX} lists: {', '.join(absent)}")
    return [folder / name for name in names]


def _open_safetensors(path: pathlib.Path, files: contextlib.ExitStack) -> list[Stored]:
    """The tensors of one file, which stays open until `files` closes."""
    try:
        file = files.enter_context(safetensors.safe_open(path, framework="np"))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: truncated or damaged safetensors file ({error}); fetch it again") from None
    stored = []
    for name in file.keys():  # noqa: SIM118 (not a dict)
        view = file.get_slice(name)
        if view.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(f"{path}: tensor {name!r} has the unsupported dtype {view.get_dtype()}")
        stored.append(Stored(name, tuple(view.get_shape()), functools.partial(file.get_tensor, name)))
    return stored


def _build(
    source: pathlib.Path, config: config_lib.ModelConfig, stored: list[Stored], rules: tuple[families.Rule, ...]
) -> dict[str, Any]:
    """The backbone's parameters: every tensor to its place, layers stacked."""
    shapes = families.param_shapes(config)
    slots: dict[tuple[str, int | None], tuple[Stored, str]] = {}
    problems: dict[str, list[str]] = {"unused": [], "matched twice": [], "wrong shape": [], "missing": []}
    head: Stored | None = None
    for tensor in stored:
        if families.IGNORED.fullmatch(tensor.name):
            continue
        found = families.to_path(rules, tensor.name)
        path, layer, transform = found or ("", None, "")
        if path == "lm_head/kernel" and config.tie_embeddings:
            head = tensor
        elif path not in shapes or (layer is not None and layer >= config.n_layers):
            problems["unused"].append(tensor.name)
        elif (path, layer) in slots:
            problems["matched twice"].append(f"{tensor.name} and {slots[path, layer][0].name} are both {path}")
        else:
            slots[path, layer] = (tensor, transform)
            wanted = shapes[path] if layer is None else shapes[path][1:]
            wanted = wanted if transform in ("", "minus_one") else wanted[::-1]
            if tensor.shape != wanted:
                problems["wrong shape"].append(f"{tensor.name} is {tensor.shape}, the config wants {wanted}")
    for path in shapes:
        for layer in range(config.n_layers) if path.startswith("layers/") else (None,):
            if (path, layer) not in slots:
                problems["missing"].append(_file_name(rules, path, layer))
    _raise_problems(source, problems)
    params = _fill(source, config, shapes, slots)
    if head is not None:
        _check_tied(source, head, params["embed/embedding"])
    return _nest(params)


def _file_name(rules: tuple[families.Rule, ...], path: str, layer: int | None) -> str:
    try:
        return families.to_name(rules, path, layer)[0]
    except KeyError:
        return f"{path} (which no rule of this file format names)"


def _raise_problems(source: pathlib.Path | str, problems: Mapping[str, list[str]]) -> None:
    lines = [f"  {kind}: {item}" for kind, items in problems.items() for item in items]
    if lines:
        raise ValueError(f"{source}: {len(lines)} tensors do not fit the config:\n" + "\n".join(lines))


def _fill(
    source: pathlib.Path,
    config: config_lib.ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    slots: Mapping[tuple[str, int | None], tuple[Stored, str]],
) -> dict[str, jax.Array]:
    """Reads one parameter after another, so that no more than one is held twice."""
    params, broken = {}, []
    for path, shape in shapes.items():
        target = np.empty(shape, _DTYPES[config.dtype])
        for layer in range(config.n_layers) if path.startswith("layers/") else (None,):
            tensor, transform = slots[path, layer]
            array = tensor.read()
            if not np.isfinite(array).all():
                broken.append(tensor.name)
            target[... if layer is None else layer] = families.to_param(array, transform, config.head_dim)
        params[path] = jnp.asarray(target)
    if broken:
        raise ValueError(f"{source}: NaN or infinite weights in {', '.join(broken)}")
    return params


def _check_tied(source: pathlib.Path, head: Stored, embedding: jax.Array) -> None:
    if head.shape != embedding.shape or not np.array_equal(head.read().astype(embedding.dtype), np.asarray(embedding)):
        raise ValueError(
            f"{source}: {head.name} differs from the embedding although config.json says tie_word_embeddings; "
            "set tie_word_embeddings to false there if the head is meant to be its own"
        )


def _build_memory(source: pathlib.Path, config: config_lib.ModelConfig, stored: list[Stored]) -> dict[str, Any]:
    """The tree under `layers/memory`, held against the shapes that the model itself has."""
    by_name = {tensor.name.removeprefix("layers/memory/"): tensor for tensor in stored}
    _check_memory(source, config, {name: tensor.shape for name, tensor in by_name.items()})
    arrays = {name: by_name[name].read().astype(np.float32) for name in by_name}
    if broken := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise ValueError(f"{source}: NaN or infinite weights in {', '.join(broken)}")
    return _nest({name: jnp.asarray(array) for name, array in arrays.items()})


def _check_memory(
    source: pathlib.Path | str, config: config_lib.ModelConfig, found: Mapping[str, tuple[int, ...]]
) -> None:
    """Holds the shapes under `layers/memory` against those of the config's memory."""
    tree = jax.eval_shape(lambda: lm.init_memory(config))["layers"]["memory"]
    shapes = {path: leaf.shape for path, leaf in _flatten(tree).items()}
    problems = {
        "unused": sorted(set(found) - set(shapes)),
        "wrong shape": [
            f"{name} is {shape}, the config wants {shapes[name]}"
            for name, shape in found.items()
            if name in shapes and shape != shapes[name]
        ],
        "missing": sorted(set(shapes) - set(found)),
    }
    _raise_problems(source, problems)


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


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
            return stores.replace(folder, path, last="config.json")
    path = pathlib.Path(path).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; give the name of a folder")
    if path.exists() and any(path.iterdir()) and not overwrite:
        raise FileExistsError(f"{path} is not empty; give another folder, or overwrite=True to replace it")
    flat = _flatten(params)
    memory = {name: np.asarray(leaf, np.float32) for name, leaf in flat.items() if name.startswith("layers/memory/")}
    backbone = {name: leaf for name, leaf in flat.items() if name not in memory}
    if memory:
        config = config.replace(mixer=config.memory_mixer)
    raw = families.config_to_hf(config)
    _check_params(config, backbone)
    if memory:
        _check_memory("params", config, {name.removeprefix("layers/memory/"): x.shape for name, x in memory.items()})
    np_dtype = _np_dtype(dtype or str(backbone["embed/embedding"].dtype))
    raw |= {"torch_dtype": np_dtype.name, "transformers_version": transformers.__version__}
    if tokenizer is not None:
        raw["bos_token_id"] = tokenizer.bos_token_id
        stated = {"the config": config.eos_tokens, "the tokenizer": ends.of_tokenizer(tokenizer)}
        config = config.replace(eos_tokens=ends.gather(stated, config.vocab_size))
    listed = list(config.eos_tokens)
    generation = {"eos_token_id": listed if len(listed) > 1 else listed[0] if listed else None}
    raw |= generation
    path.parent.mkdir(parents=True, exist_ok=True)
    part = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        _write_backbone(part, config, backbone, np_dtype, max_shard_size)
        (part / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        (part / _GENERATION).write_text(json.dumps(generation, indent=2) + "\n")
        (part / ALLMEM_CONFIG).write_text(config.to_json() + "\n")
        if memory:
            safetensors.numpy.save_file(memory, part / ALLMEM_WEIGHTS)
        if tokenizer is not None:
            tokenizer_lib.save_tokenizer(tokenizer, part)
        part.chmod(0o755)
        _replace_folder(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _check_params(config: config_lib.ModelConfig, backbone: Mapping[str, Any]) -> None:
    shapes = families.param_shapes(config)
    problems = {
        "unused": sorted(set(backbone) - set(shapes)),
        "missing": sorted(set(shapes) - set(backbone)),
        "wrong shape": [
            f"{path} is {backbone[path].shape}, the config wants {shape}"
            for path, shape in shapes.items()
            if path in backbone and backbone[path].shape != shape
        ],
    }
    _raise_problems("params", problems)


class _Piece(NamedTuple):
    """A tensor to be written: one layer of a parameter, or a whole one."""

    path: str
    layer: int | None
    transform: str
    n_bytes: int


def _write_backbone(
    folder: pathlib.Path,
    config: config_lib.ModelConfig,
    backbone: Mapping[str, Any],
    dtype: np.dtype,
    max_shard_size: int | str,
) -> None:
    """Writes the safetensors files and, when there are several, their index."""
    shapes = families.param_shapes(config)
    pieces: dict[str, _Piece] = {}
    for path, shape in shapes.items():
        stacked = path.startswith("layers/")
        for layer in range(config.n_layers) if stacked else (None,):
            name, transform = families.to_name(families.HF_RULES[config.family], path, layer)
            pieces[name] = _Piece(path, layer, transform, int(np.prod(shape[stacked:])) * dtype.itemsize)
    split = huggingface_hub.split_state_dict_into_shards_factory(
        pieces,
        get_storage_size=lambda piece: piece.n_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file_name, names in split.filename_to_tensors.items():
        arrays = {name: _piece_array(backbone, pieces[name], dtype) for name in names}
        safetensors.numpy.save_file(arrays, folder / file_name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _piece_array(backbone: Mapping[str, Any], piece: _Piece, dtype: np.dtype) -> np.ndarray:
    array = np.asarray(backbone[piece.path])
    array = array if piece.layer is None else array[piece.layer]
    return np.ascontiguousarray(array.T if piece.transform == "transpose" else array, dtype)


def _replace_folder(part: pathlib.Path, path: pathlib.Path) -> None:
    """Renames `part` to `path`; what `path` held is put back if that fails, and removed if it succeeds."""
    if not path.exists() or not any(path.iterdir()):
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
