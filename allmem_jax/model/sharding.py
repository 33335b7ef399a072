"""Where arrays live on a mesh of devices: a table of regular expressions over parameter paths.

Axes of the mesh:

    data     rows of the batch; parameters are copied
    fsdp     rows of the batch; parameters are split
    tensor   heads, hidden channels and vocabulary
    context  tokens of a row

Parameters carry no annotations: a path such as "layers/mlp/up_proj/kernel" decides. Optimiser states hold the same
paths behind a prefix, so the same table places them.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor", "context")

# The first expression found in the path wins. Leaves under "layers" are stacked: their first axis is the layer.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embed/embedding$", PartitionSpec("tensor", "fsdp")),
    (r"lm_head/kernel$", PartitionSpec("fsdp", "tensor")),
    (r"memory/(lr|momentum|gate|b|c|dt|beta|decay)_proj/kernel$", PartitionSpec(None, "fsdp", None)),
    (r"memory/fast_(gate|up|down)$", PartitionSpec(None, "tensor", None, None)),
    (r"memory/[qkvx]_conv/kernel$", PartitionSpec(None, None, "tensor")),
    (r"(o|down|out)_proj/kernel$", PartitionSpec(None, "tensor", "fsdp")),
    (r"_proj/kernel$", PartitionSpec(None, "fsdp", "tensor")),
    (r"", PartitionSpec()),
)


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, context: int = 1) -> Mesh:
    """A mesh with the four named axes over all devices of all processes; -1 on one axis takes what the others leave.

    A mesh of 1 x 1 x 1 x 1 is the first device, even of several, unless there are several processes.

    Raises:
      ValueError: the product of the sizes is not the number of devices that JAX sees.
    """
    devices = jax.devices()
    shape = mesh_shape((data, fsdp, tensor, context), len(devices), one_of_many=jax.process_count() == 1)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[: math.prod(shape)])


def mesh_shape(sizes: tuple[int, int, int, int], devices: int, *, one_of_many: bool = False) -> tuple[int, ...]:
    """`sizes` with a -1 replaced by what fits `devices`; ValueError where nothing does.

    Args:
      sizes: of `AXES`.
      devices: how many there are.
      one_of_many: let 1 x 1 x 1 x 1 stand for one device of several.
    """
    rest = math.prod(size for size in sizes if size != -1)
    shape = tuple(devices // rest if size == -1 and rest > 0 else size for size in sizes)
    needed = math.prod(shape)
    if sizes.count(-1) > 1 or min(shape) < 1 or (needed != devices and not (needed == 1 and one_of_many)):
        named = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ValueError(
            f"mesh {named} needs {needed if needed > 0 else rest} devices and there are {devices}; "
            "-1 on one axis takes what the others leave"
        )
    return shape


def path_string(path: tuple[Any, ...]) -> str:
    """A key path of `jax.tree_util` as "layers/mlp/up_proj/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def spec_for(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The spec of one array: the first rule that matches, without the axes that do not divide its dimensions."""
    rule = next(spec for pattern, spec in RULES if re.search(pattern, path))
    if len(rule) > len(shape):
        return PartitionSpec()
    fitted = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(rule, shape, strict=False)]
    return PartitionSpec(*fitted)


def tree_shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A tree of `NamedSharding` for parameters or an optimiser state; leaves may come from `jax.eval_shape`."""

    def leaf_sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, spec_for(path_string(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def place(tree: Any, mesh: Mesh) -> Any:
    """The arrays of `tree` put where `tree_shardings` says. Every process passes the whole value of each array."""
    shardings = tree_shardings(tree, mesh)
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def own_parts(value: Any, where: NamedSharding) -> jax.Array:  # device_put would compare whole values first
        value = np.asarray(value)
        return jax.make_array_from_callback(value.shape, where, lambda index: value[index])

    return jax.tree.map(own_parts, tree, shardings)


def batch_sharding(mesh: Mesh | AbstractMesh, *, tokens: bool = True) -> NamedSharding:
    """Rows over `data` and `fsdp`, tokens over `context` (arrays [B, L], or [B] with tokens=False)."""
    rows = ("data", "fsdp")
    return NamedSharding(mesh, PartitionSpec(rows, "context") if tokens else PartitionSpec(rows))


def axis_size(*axes: str) -> int:
    """How many devices lie along these axes of the mesh that `jax.set_mesh` named; 1 without one."""
    mesh = _current_mesh()
    return 1 if mesh is None else math.prod(mesh.shape.get(axis, 1) for axis in axes)


def over_tokens(x: jax.Array, *, heads: bool = False) -> jax.Array:
    """Says that x [B, L, ...] has rows over `data` and `fsdp` and tokens over `context`, as far as these divide them.

    It holds outside the mixers, and keeps the compiler from other choices. Without a mesh it says nothing. With `heads`
    it leaves open where those, on the third axis, lie; else the rest of x is whole on every device.
    """
    mesh = _current_mesh()
    if mesh is None:
        return x
    rows, tokens = _dividing(mesh, ("data", "fsdp"), x.shape[0]), _dividing(mesh, ("context",), x.shape[1])
    rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 2 if heads else 0)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(rows or None, tokens or None, *rest))


def whole_rows(table: jax.Array) -> jax.Array:
    """Says that no row of an embedding [V, d] is split: tokens that lie over `fsdp` look up whole rows."""
    mesh = _current_mesh()
    if mesh is None or mesh.size == 1:
        return table
    return jax.lax.with_sharding_constraint(table, PartitionSpec(_dividing(mesh, ("tensor",), table.shape[0]) or None))


def _current_mesh() -> AbstractMesh | None:
    """The mesh of `jax.set_mesh` where it has our axes and the compiler splits the work, else None."""
    mesh = jax.sharding.get_abstract_mesh()
    ours = not mesh.empty and set(mesh.axis_names) <= set(AXES) and AxisType.Manual not in mesh.axis_types
    return mesh if ours else None


def over_rows_and_heads(
    function: Callable[..., Any], arguments: tuple[Any, ...], where: tuple[Any, ...], result: Any, rows: int, heads: int
) -> Any:
    """Calls a function whose rows and heads do not know of each other on every device's own rows and heads.

    The compiler cannot split a kernel: left to it, a kernel fails on a TPU and gathers all its arguments on a GPU. So
    where `jax.set_mesh` has named devices, the call is split here: rows over `data` and `fsdp`, heads over `tensor` and
    `context`, as far as these divide them. Tokens that lie on several devices are exchanged for heads before the call.

    Args:
      function: of `arguments`.
      arguments: pytrees of arrays, or None.
      where: for each argument a PartitionSpec, or a pytree prefix of them, in which the names "rows" and "heads" stand
        for the axes of the mesh.
      result: the same for what the function returns.
      rows, heads: the numbers to be divided; of several numbers of heads, one that divides all.
    """
    mesh = _current_mesh()
    if mesh is None:
        return function(*arguments)
    axes = {"rows": _dividing(mesh, ("data", "fsdp"), rows), "heads": _dividing(mesh, ("tensor", "context"), heads)}

    def named(specs: Any) -> Any:
        return jax.tree.map(
            lambda spec: PartitionSpec(*(axes.get(name) for name in spec)),
            specs,
            is_leaf=lambda x: isinstance(x, PartitionSpec),
        )

    split = jax.shard_map(function, mesh=mesh, in_specs=named(where), out_specs=named(result), check_vma=False)
    return split(*arguments)


def _dividing(mesh: AbstractMesh, axes: tuple[str, ...], number: int) -> tuple[str, ...]:
    """The axes of the mesh, from the first, whose sizes together divide `number`."""
    taken: tuple[str, ...] = ()
    for axis in axes:
        size = mesh.shape.get(axis, 1)
        if size > 1 and number % size == 0:
            taken, number = (*taken, axis), number // size
    return taken
