"""Matrix products that take operands in the compute dtype and accumulate in float32, forward and backward.

JAX's own transpose of such a product multiplies the cotangent, which arrives in float32, by an operand that it widens
to float32: two float32 products, for which TPUs and GPUs need several passes or slower units.
"""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

FEW = 64  # rows


def einsum(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`jnp.einsum` of two operands in x's dtype, accumulated in float32 (float64 for float64).

    In the backward pass the cotangent is rounded to x's dtype, and both products accumulate in float32 again. Gradients
    have the dtypes of x and y: that of a wider y, such as a float32 parameter, is what was accumulated. Products of
    float32 operands are exact, as are their gradients. Differentiable in reverse mode where x is narrower than float32.

    Args:
      spec: "ab,bc->ac", without an ellipsis; every index of an operand is one of the other operand or of the result.
      x: any floating dtype.
      y: cast to x's dtype.
    """
    if jnp.finfo(x.dtype).bits >= 32:
        return _product(spec, x, y.astype(x.dtype))
    return _narrow(spec, y.dtype, x, y)


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`einsum` of x [..., in] and a kernel [in, out], [..., out].

    A single narrow row is multiplied twice: XLA on CPUs has no fast product of one, and takes ten times as long.
    """
    rows = "abcdefgh"[: x.ndim - 1]
    spec = f"{rows}i,io->{rows}o"
    if x.size == x.shape[-1] and x.ndim > 1 and jnp.finfo(x.dtype).bits < 32:
        return einsum(spec, jnp.concatenate([x, x]), kernel)[:1]
    return einsum(spec, x, kernel)


def turned(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`einsum` of x [..., in] and a kernel [out, in], [..., out], for CPUs.

    XLA packs the right side of a product anew each time, which for few rows takes longer than the product itself. So
    the rows stand right of the kernel. Where the processor does not multiply bfloat16 itself, both are widened, as
    bfloat16 products of few rows then take three times as long; where it does, a single row is one of two.
    """
    rows = x.reshape(-1, x.shape[-1])
    count = len(rows)
    if count > FEW:
        return einsum("ri,oi->ro", rows, kernel).reshape(*x.shape[:-1], -1)
    kernel = kernel.astype(x.dtype)
    if x.dtype != jnp.bfloat16 or not multiplies_bfloat16():
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        kernel, rows = kernel.astype(dtype), rows.astype(dtype)
    elif count == 1:
        rows = jnp.concatenate([rows, rows])
    y = _product("oi,ri->or", kernel, rows)
    y = jax.lax.optimization_barrier(y)  # or XLA makes it the other product again
    return y[:, :count].T.reshape(*x.shape[:-1], -1)


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this machine's processor has instructions for products of bfloat16, as far as Linux on x86 tells."""
    info = pathlib.Path("/proc/cpuinfo")
    flags = info.read_text(errors="replace").split() if info.is_file() else []
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


_turned = jax.jit(turned)  # traced once a shape


class Unstacked(NamedTuple):
    """One kernel of several equal ones that are arrays of their own, [out, in] each, by its number.

    A loop over layers then reads its kernel where it lies, which of stacked ones XLA on CPUs copies.
    """

    kernels: tuple[jax.Array, ...]
    number: jax.Array | int

    def product(self, x: jax.Array) -> jax.Array:
        """x [..., in] times that kernel, [..., out], as `turned`."""
        return jax.lax.switch(self.number, [functools.partial(_turned, kernel=one) for one in self.kernels], x)


def in_turn(x: jax.Array, kernels: tuple[jax.Array, ...]) -> jax.Array:
    """x [..., in] times each of several equal kernels [out, in], one after the other, [..., all that comes out]."""
    each = jax.lax.map(lambda number: Unstacked(kernels, number).product(x), jnp.arange(len(kernels)))
    return jnp.moveaxis(each, 0, -2).reshape(*x.shape[:-1], -1)


def tiles(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """The product of two matrices inside a TPU kernel, such as "ab,cb->ac", in float32 and exact for float32 inputs."""
    (a, b), out = spec.split("->")[0].split(","), spec.split("->")[1]
    (shared,) = set(a) & set(b) - set(out)
    dimensions = (((a.index(shared),), (b.index(shared),)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    exact = jnp.finfo(x.dtype).bits >= 32
    return jnp.einsum(
        spec,
        x,
        y,
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _narrow(spec: str, y_dtype: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return _product(spec, x, y.astype(x.dtype))


def _forward(spec: str, y_dtype: Any, x: Any, y: Any) -> tuple[jax.Array, Any]:
    """Keeps of each operand what the other's gradient needs, and nothing where the other is a constant."""
    narrow = y.value.astype(x.value.dtype)
    kept = (x.value if y.perturbed else None, narrow if x.perturbed else None)
    return _product(spec, x.value, narrow), kept


def _backward(spec: str, y_dtype: Any, kept: Any, cotangent: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
    x, y = kept
    operands, result = spec.split("->")
    of_x, of_y = operands.split(",")
    d_x = d_y = None
    if y is not None:
        d_x = _product(f"{result},{of_y}->{of_x}", cotangent.astype(y.dtype), y).astype(y.dtype)
    if x is not None:
        d_y = _product(f"{of_x},{result}->{of_y}", x, cotangent.astype(x.dtype)).astype(y_dtype)
    return d_x, d_y


_narrow.defvjp(_forward, _backward, symbolic_zeros=True)
