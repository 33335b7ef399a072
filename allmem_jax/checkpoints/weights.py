"""The tensors of files as parameters: each in its place, layers stacked, and held against the model's own shapes.

Paths are those of the parameter tree joined by "/".
"""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from allmem_jax.checkpoints import families
from allmem_jax.model import config as config_lib
from allmem_jax.model import lm

MEMORY = "layers/memory/"  # what the paths of a memory begin with
Shapes = Mapping[str, tuple[int, ...]]


class Stored(NamedTuple):
    """A tensor in a file: its name and shape there, and how to read it."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@functools.cache
def param_shapes(config: config_lib.ModelConfig) -> Shapes:
    """Path and shape of every parameter, those of a memory too where the mixer has one."""
    return flat_shapes(jax.eval_shape(lambda: lm.init_params(config)))


def memory_shapes(config: config_lib.ModelConfig) -> Shapes:
    """The same of the memory alone, by the paths under `layers/memory`."""
    shapes = param_shapes(config.replace(mixer=config.memory_mixer))
    return {path.removeprefix(MEMORY): shape for path, shape in shapes.items() if path.startswith(MEMORY)}


def flat_shapes(params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Path and shape of the leaves of a tree."""
    return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items()}


def slices(config: config_lib.ModelConfig, path: str) -> Sequence[int | None]:
    """The layers that a parameter is stored by, one tensor each; None alone where it is stored whole."""
    return range(config.n_layers) if path.startswith("layers/") else (None,)


def backbone(
    source: pathlib.Path, config: config_lib.ModelConfig, stored: list[Stored], rules: tuple[families.Rule, ...]
) -> dict[str, Any]:
    """The backbone's parameters, of the config's dtype.

    Raises:
      ValueError: tensors that do not fit the config, all in one error; NaN or infinite ones; or an output head that
        contradicts a tied embedding.
    """
    shapes = param_shapes(config.replace(mixer="full"))
    slots: dict[tuple[str, int | None], tuple[Stored, str]] = {}
    problems: dict[str, list[str]] = {"unused": [], "matched twice": [], "wrong shape": []}
    head: Stored | None = None
    for tensor in stored:
        if families.IGNORED.fullmatch(tensor.name):
            continue
        path, layer, transform = families.to_path(rules, tensor.name) or ("", None, "")
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
    places = [(path, layer) for path in shapes for layer in slices(config, path)]
    problems["missing"] = [_file_name(rules, *place) for place in places if place not in slots]
    _raise_problems(source, problems)
    params = _fill(source, config, shapes, slots)
    if head is not None:
        _check_tied(source, head, params["embed/embedding"])
    return flax.traverse_util.unflatten_dict(params, sep="/")


def _file_name(rules: tuple[families.Rule, ...], path: str, layer: int | None) -> str:
    try:
        return families.to_name(rules, path, layer)[0]
    except KeyError:
        return f"{path} (which no rule of this file format names)"


def _fill(
    source: pathlib.Path,
    config: config_lib.ModelConfig,
    shapes: Shapes,
    slots: Mapping[tuple[str, int | None], tuple[Stored, str]],
) -> dict[str, jax.Array]:
    """Reads one parameter after another, so that no more than one is held twice."""
    params, broken = {}, []
    for path, shape in shapes.items():
        target = np.empty(shape, jnp.dtype(config.dtype))
        for layer in slices(config, path):
            tensor, transform = slots[path, layer]
            array = tensor.read()
            if not np.isfinite(array).all():
                broken.append(tensor.name)
            target[... if layer is None else layer] = families.to_param(array, transform, config.head_dim)
        params[path] = jnp.asarray(target)
    _raise_broken(source, broken)
    return params


def _check_tied(source: pathlib.Path, head: Stored, embedding: jax.Array) -> None:
    if head.shape != embedding.shape or not np.array_equal(head.read().astype(embedding.dtype), np.asarray(embedding)):
        raise ValueError(
            f"{source}: {head.name} differs from the embedding although config.json says tie_word_embeddings; "
            "set tie_word_embeddings to false there if the head is meant to be its own"
        )


def memory(source: pathlib.Path, config: config_lib.ModelConfig, stored: list[Stored]) -> dict[str, Any]:
    """The tree under `layers/memory`, float32; errors as above."""
    found = {tensor.name.removeprefix(MEMORY): tensor for tensor in stored}
    check(source, {path: tensor.shape for path, tensor in found.items()}, memory_shapes(config))
    arrays = {path: tensor.read().astype(np.float32) for path, tensor in found.items()}
    _raise_broken(source, [path for path, array in arrays.items() if not np.isfinite(array).all()])
    return jax.tree.map(jnp.asarray, flax.traverse_util.unflatten_dict(arrays, sep="/"))


def check(source: pathlib.Path | str, found: Shapes, wanted: Shapes) -> None:
    """Holds shapes against each other; ValueError that names all misfits."""
    problems = {
        "unused": sorted(set(found) - set(wanted)),
        "missing": sorted(set(wanted) - set(found)),
        "wrong shape": [
            f"{path} is {found[path]}, the config wants {shape}"
            for path, shape in wanted.items()
            if path in found and found[path] != shape
        ],
    }
    _raise_problems(source, problems)


def _raise_problems(source: pathlib.Path | str, problems: Mapping[str, list[str]]) -> None:
    lines = [f"  {kind}: {item.removeprefix(MEMORY)}" for kind, items in problems.items() for item in items]
    if lines:
        raise ValueError(f"{source}: {len(lines)} tensors do not fit the config:\n" + "\n".join(lines))


def _raise_broken(source: pathlib.Path, names: list[str]) -> None:
    if names:
        raise ValueError(f"{source}: NaN or infinite weights in {', '.join(names)}")
