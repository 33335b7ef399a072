"""`ttt_memory`: signature, checks, gradient rule and choice of backend.

Axes: B batch, L tokens, N memory heads, D head dim, H hidden.
"""

import functools
import importlib

import jax
import jax.numpy as jnp

from pallas_kernels import backends
from pallas_kernels.ttt import pallas_tpu, reference, xla
from pallas_kernels.ttt.types import FastWeights, MemoryState, init_memory_state

READ_OUTS = ("full", "difference")


def ttt_memory(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lr: jax.Array,
    momentum: jax.Array,
    init: FastWeights,
    state: MemoryState | None = None,
    *,
    chunk_size: int,
    valid: jax.Array | None = None,
    reset: jax.Array | None = None,
    read_out: str = "full",
    implementation: str | None = None,
) -> tuple[jax.Array, MemoryState]:
    """Reads and trains one memory per head, chunk by chunk (AllMem, arXiv 2602.13680).

    Every token t reads out_t = f(W, q_t) = down (SiLU(gate q_t) * (up q_t)) + q_t with the weights of its chunk's
    start, and adds lr_t * dL_t/dW, L_t = -<f(W', k_t), v_t>, to a pending gradient G; W' is W with every row rescaled
    to its norm in `init`. The token that completes a chunk updates: M <- mu M - G, W <- W' + M, with mu the chunk's
    mean momentum.

    One call over L tokens equals any split of it into calls that hand the state on, down to single tokens.
    Differentiable once (reverse mode) in q, k, v, lr, momentum, init and the float leaves of state, also through
    the returned state.

    Args:
      q, k, v: [B, L, N, D], floating, one dtype. Matmuls take this dtype and accumulate in float32.
      lr: [B, L, N, 3] learning rates of gate, up and down.
      momentum: [B, L, N], in [0, 1].
      init: initial weights without a batch axis; also where documents start and what row norms are held to.
      state: where the rows stand, each at its own place in its chunk; None means `init_memory_state(init, B)`.
      chunk_size: tokens per update; a Python int.
      valid: bool [B, L]; a false token writes nothing, is not counted, and its output is zero.
      reset: bool [B, L]; before a true token, valid or not, the row's state goes back to that of `init_memory_state`.
      read_out: "full" reads f(W, q_t), as above; "difference" reads f(W, q_t) - f(init, q_t), which is zero until
        something was written. Nothing else depends on it.
      implementation: None for the best on the platform that the code is lowered for; or "xla", "pallas" (TPU),
        "triton" (NVIDIA GPUs), "reference".

    Returns:
      Outputs [B, L, N, D] in q's dtype, and the state after the last token, float32.

    Raises:
      ValueError, TypeError: an argument that does not fit, by name.
      NotImplementedError: a named backend that cannot serve, with the reason; it is never replaced by another.
    """
    _check(q, k, v, lr, momentum, init, state, chunk_size, valid, reset)
    if read_out not in READ_OUTS:
        raise ValueError(f"ttt_memory: read_out={read_out!r} is not one of {READ_OUTS}")
    difference = read_out == "difference"
    serving = backends.serving("ttt_memory", implementation, q, pallas_tpu.why_not(q.dtype))
    aligned = state is None
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    state = init_memory_state(init, q.shape[0]) if state is None else state
    state = jax.tree.map(lambda x: x.astype(dtype), state)._replace(count=state.count.astype(jnp.int32))
    if implementation == "reference":
        valid = jnp.ones(q.shape[:2], bool) if valid is None else valid
        reset = jnp.zeros(q.shape[:2], bool) if reset is None else reset
        sizes = dict(chunk_size=chunk_size, difference=difference)
        return reference.ttt_memory(q, k, v, lr, momentum, init, state, valid=valid, reset=reset, **sizes)
    found = {name: _triton() if name == "triton" else {"xla": _xla, "pallas": _pallas}[name] for name in serving}
    functions = {name: functools.partial(function, chunk_size, aligned, difference) for name, function in found.items()}
    return backends.run(implementation, functions, (q, k, v, lr, momentum), init, state, valid, reset)


_differentiable = functools.partial(backends.with_gradient, fixed=3, constants=2)
_xla = _differentiable(xla.forward, xla.backward)
_pallas = _differentiable(
    pallas_tpu.forward, pallas_tpu.backward, value=functools.partial(pallas_tpu.forward, save=False)
)


@functools.cache
def _triton():
    module = importlib.import_module("pallas_kernels.ttt.triton_gpu")  # which imports triton
    return _differentiable(module.forward, module.backward)


def _check(q, k, v, lr, momentum, init, state, chunk_size, valid, reset):
    """Raises where the arguments do not fit together."""
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"ttt_memory: chunk_size={chunk_size!r} must be a Python int of at least 1")
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"ttt_memory: q has shape {q.shape}; it must be [B, L, N, D] with no empty axis")
    batch, length, heads, dim = q.shape
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_float(name, x)
        _check_shape(name, x, q.shape)
        if x.dtype != q.dtype:
            raise TypeError(f"ttt_memory: {name} is {x.dtype} and q is {q.dtype}; cast them to one dtype")
    for name, x, last in (("lr", lr, (3,)), ("momentum", momentum, ())):
        _check_float(name, x)
        _check_shape(name, x, (batch, length, heads, *last))
    if not isinstance(init, FastWeights):
        raise TypeError(f"ttt_memory: init is {type(init).__name__}; pass a FastWeights(gate, up, down)")
    hidden = init.gate.shape[-2] if init.gate.ndim == 3 else -1
    shapes = {"gate": (heads, hidden, dim), "up": (heads, hidden, dim), "down": (heads, dim, hidden)}
    for name, shape in shapes.items():
        _check_float(f"init.{name}", getattr(init, name))
        _check_shape(f"init.{name}", getattr(init, name), shape)
    if state is not None:
        for part in ("weights", "velocity", "pending"):
            for name, shape in shapes.items():
                _check_shape(f"state.{part}.{name}", getattr(getattr(state, part), name), (batch, *shape))
        _check_shape("state.momentum_sum", state.momentum_sum, (batch, heads))
        _check_shape("state.count", state.count, (batch,))
    for name, x in (("valid", valid), ("reset", reset)):
        if x is not None:
            _check_shape(name, x, (batch, length))
            if x.dtype != jnp.bool_:
                raise TypeError(f"ttt_memory: {name} is {x.dtype}; it must be bool, e.g. {name}.astype(bool)")


def _check_float(name, x):
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"ttt_memory: {name} is {x.dtype}; it must be floating point, e.g. {name}.astype('float32')")


def _check_shape(name, x, shape):
    if x.shape != shape:
        raise ValueError(f"ttt_memory: {name} has shape {x.shape}; with this q and init it must be {shape}")
