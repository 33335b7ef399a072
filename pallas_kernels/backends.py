"""Which implementation of a kernel runs."""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax

from pallas_kernels import triton_call

BACKENDS = ("xla", "pallas", "triton", "reference")
SHORTEST_FOR_KERNELS = 16  # tokens; below, a kernel's blocks are mostly padding
ATTENTION = "attention"  # what attention found, to policies of `jax.checkpoint`: dear to compute, cheap to keep


def serving(
    op: str, implementation: str | None, q: jax.Array, pallas: str | None, worth: Collection[str] | None = None
) -> tuple[str, ...]:
    """Returns the backends to offer: the one that is named, or for None all that are worth it.

    Args:
      op: name of the kernel, for messages.
      implementation: one of `BACKENDS`, or None for the best.
      q: [B, L, heads, D], of the call; [B, heads, D] where `worth` is given.
      pallas: why the TPU kernels cannot serve the call, or None.
      worth: kernels that are faster than plain JAX here; None means all of them for rows that are not short.

    Raises:
      NotImplementedError: the backend is known but cannot serve this call. A named backend is never replaced.
      ValueError: the name is unknown.
    """
    if implementation not in (None, *BACKENDS):
        raise ValueError(f"{op}: implementation={implementation!r} is unknown; use None or one of {BACKENDS}")
    triton = triton_call.unavailable() or triton_call.unsupported(q.shape[-1], q.dtype)
    reasons = {"pallas": pallas, "triton": triton}
    if implementation is None:
        if worth is None:
            worth = reasons if q.shape[1] >= SHORTEST_FOR_KERNELS else ()
        return ("xla", *(name for name in worth if reasons[name] is None))
    if (reason := reasons.get(implementation)) is not None:
        raise NotImplementedError(
            f"{op}: implementation={implementation!r} cannot serve: {reason}; use 'xla', or None for the best"
        )
    return (implementation,)


def with_gradient(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    *,
    value: Callable[..., Any] | None = None,
    fixed: int,
    constants: int,
) -> Callable[..., Any]:
    """Returns a function whose gradient is `backward`.

    Args:
      forward: (*fixed, *arrays) -> (result, residuals).
      backward: (*fixed, residuals, cotangents) -> the cotangents of all arrays but the last `constants`.
      value: (*fixed, *arrays) -> (result, anything), for calls that are not differentiated; None means `forward`.
      fixed: number of leading arguments that are static.
      constants: number of trailing arguments without a gradient.
    """
    static = tuple(range(fixed))
    jit = functools.partial(jax.jit, static_argnums=static)  # a kernel is traced once for each shape, whoever calls it
    forward, backward, value = jit(forward), jit(backward), jit(value or forward)

    @functools.partial(jax.custom_vjp, nondiff_argnums=static)
    def function(*arguments):
        return value(*arguments)[0]

    function.defvjp(forward, lambda *arguments: (*backward(*arguments), *(None,) * constants))
    return function


def with_gradient_of(
    plain: Callable[..., Any], function: Callable[..., Any], *, fixed: int, floats: int, constants: int
) -> Callable[..., Any]:
    """Returns `function` with the gradient of `plain`, which computes the same.

    Args:
      plain, function: (*fixed, *arrays) -> result.
      fixed: number of leading arguments that are static.
      floats, constants: number of arrays with a gradient, and of those without one, which come last.
    """

    def forward(*arguments):
        return function(*arguments), arguments[fixed:]

    def backward(*arguments):
        *static, arrays, d_out = arguments
        constant = arrays[floats:]
        return jax.vjp(lambda *x: plain(*static, *x, *constant), *arrays[:floats])[1](d_out)

    return with_gradient(forward, backward, fixed=fixed, constants=constants)


def run(implementation: str | None, functions: Mapping[str, Callable[..., Any]], *operands: Any) -> Any:
    """Calls what `implementation` names, or for None the best for the platform that the code is lowered for.

    Args:
      implementation: None, "xla", "pallas" or "triton".
      functions: what can serve, by those names; "xla" is one unless another was named.
      operands: pytrees of arrays.
    """
    if implementation == "pallas" and not _interpreting():
        try:
            return jax.lax.platform_dependent(*operands, tpu=functions["pallas"])
        except NotImplementedError as error:  # outside jit; inside, the compiler says it later
            platform = jax.default_backend()
            raise NotImplementedError(
                f"implementation='pallas' needs a TPU and this runs on {platform}; to interpret its kernels there, "
                "call it under jax.experimental.pallas.tpu.force_tpu_interpret_mode()"
            ) from error
    if implementation is not None:
        return functions[implementation](*operands)
    best = {
        platform: functions[name] for platform, name in (("tpu", "pallas"), ("cuda", "triton")) if name in functions
    }
    return (
        jax.lax.platform_dependent(*operands, default=functions["xla"], **best) if best else functions["xla"](*operands)
    )


def run_without_triton(
    op: str,
    implementation: str | None,
    x: jax.Array,
    pallas: str | None,
    functions: Mapping[str, Callable[..., Any]],
    *operands: Any,
    worth: bool = True,
) -> Any:
    """`run` for what has kernels for TPUs alone.

    Args:
      op, implementation, x, pallas: as in `serving`.
      functions: "reference", "xla" and "pallas".
      operands: of the functions.
      worth: whether there is enough to do for a kernel, if rows are not short.
    """
    if implementation == "triton":
        raise NotImplementedError(f"{op}: there are no Triton kernels, as XLA fuses it on GPUs; use None")
    best = ("pallas",) if worth and x.shape[1] >= SHORTEST_FOR_KERNELS else ()
    names = serving(op, implementation, x, pallas, best)
    return run(implementation, {name: functions[name] for name in names}, *operands)


def _interpreting() -> bool:
    """Whether the caller stands in `pltpu.force_tpu_interpret_mode`, which JAX does not say in public."""
    setting = getattr(jax._src.config, "pallas_tpu_interpret_mode_context_manager", None)
    return setting is not None and setting.value is not None
