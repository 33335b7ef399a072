"""How TPU kernels that work on heads hold tokens [B, L, H, D]: a head's in rows or in columns, L filled with zeros.

Axes: B batch, L tokens, H heads, D channels of a head.
"""

import jax.numpy as jnp


def rows(x, multiple):
    """[B, L, H, D] -> [B, H, L, D], L filled to a multiple of `multiple`."""
    return padded(jnp.swapaxes(x, 1, 2), 2, multiple)


def columns(x, multiple):
    """[B, L, H, D] -> [B, H, D, L], L filled to a multiple of `multiple`."""
    return padded(x.transpose(0, 2, 3, 1), 3, multiple)


def from_rows(x, length):
    """The way back from `rows`, to `length` tokens."""
    return jnp.swapaxes(x, 1, 2)[:, :length]


def from_columns(x, length):
    """The way back from `columns`, to `length` tokens."""
    return x[..., :length].transpose(0, 3, 1, 2)


def padded(x, axis, multiple):
    """Appends zeros until `axis` is a multiple of `multiple`."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = 0, -x.shape[axis] % multiple
    return jnp.pad(x, padding)
