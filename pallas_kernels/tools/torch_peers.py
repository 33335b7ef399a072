"""What a user of torch would run in our kernels' place, for torch.compile: measured beside them, used by nothing else.

Axes: B batch, L tokens, N heads of the memory, R = B N, T tokens of a chunk, D head dim, H hidden.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.attention import flex_attention

EPSILON = 1e-12  # added to squared row norms


def remember(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lr: torch.Tensor,
    momentum: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    *,
    chunk_size: int,
) -> torch.Tensor:
    """`pallas_kernels.ttt_memory` in the form of LaCT's code (arXiv 2505.23884): a loop over chunks, a few `bmm` each.

    Args:
      q, k, v: [B, L, N, D], L a multiple of the chunk.
      lr: [B, L, N, 3].
      momentum: [B, L, N].
      gate, up, down: [N, H, D], [N, H, D], [N, D, H] float32, as in `FastWeights`.
      chunk_size: T.

    Returns:
      What the tokens read, [B, L, N, D].
    """
    batch, length, heads, dim = q.shape
    rows = lambda x: x.transpose(1, 2).reshape(batch * heads, length, -1)  # noqa: E731
    parts = [x.split(chunk_size, dim=1) for x in map(rows, (q, k, v, lr, momentum[..., None]))]
    start = [w.repeat(batch, 1, 1) for w in (gate, up, down)]
    norms = [_norm(w) for w in start]
    weights, velocity = start, [torch.zeros_like(w) for w in start]
    out = []
    for q, k, v, lr, momentum in zip(*parts, strict=True):
        out.append(_read(q, *(w.to(q.dtype) for w in weights)))
        weights = [w * (norm / _norm(w)) for w, norm in zip(weights, norms, strict=True)]
        gradients = _write(k, v, lr, *(w.to(k.dtype) for w in weights))
        mu = momentum.float().mean(dim=1, keepdim=True)
        velocity = [mu * m + g for m, g in zip(velocity, gradients, strict=True)]
        weights = [w + m for w, m in zip(weights, velocity, strict=True)]
    return torch.cat(out, dim=1).reshape(batch, heads, length, dim).transpose(1, 2)


def _norm(w: torch.Tensor) -> torch.Tensor:
    return torch.sqrt(torch.sum(w * w, dim=-1, keepdim=True) + EPSILON)


def _read(q: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """f(W, q): [R, T, D] from weights [R, H, D], [R, H, D], [R, D, H]."""
    hidden = torch.nn.functional.silu(q @ gate.mT) * (q @ up.mT)
    return hidden @ down.mT + q


def _write(
    k: torch.Tensor, v: torch.Tensor, lr: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """What a chunk adds to the velocity of each weight, float32: sum_t lr_t d<f(W, k_t), v_t>/dW."""
    lr = lr.float()
    before, above, back = ((x @ w).float() for x, w in ((k, gate.mT), (k, up.mT), (v, down)))
    sigmoid = torch.sigmoid(before)
    silu = before * sigmoid
    d_gate = lr[..., 0:1] * back * above * (sigmoid + silu * (1 - sigmoid))
    d_up = lr[..., 1:2] * back * silu
    hidden = lr[..., 2:3] * silu * above
    pairs = ((d_gate.to(k.dtype), k), (d_up.to(k.dtype), k), (v, hidden.to(k.dtype)))
    return tuple((a.mT @ b).float() for a, b in pairs)


def memory_runs(
    inputs: Sequence[Any], chunk_size: int, device: str, compiled: bool = True
) -> dict[str, Callable[[], Any]]:
    """{"forward", "forward + backward"} of `remember` on the inputs of `ttt_memory`; they wait for the end.

    Args:
      inputs: q, k, v, lr, momentum, and the initial weights, as JAX arrays.
      chunk_size: tokens of a chunk.
      device: "cpu" or "cuda".
      compiled: by torch.compile.
    """
    *tokens, init = inputs
    given = [_tensor(x, device) for x in (*tokens, *init)]
    call: Any = functools.partial(remember, chunk_size=chunk_size)
    call = torch.compile(call) if compiled else call

    def forward() -> torch.Tensor:
        with torch.no_grad():
            out = call(*given)
        _wait(device)
        return out

    wanted = [x.clone().requires_grad_() for x in given]

    def both() -> tuple[torch.Tensor, ...]:
        gradients = torch.autograd.grad(call(*wanted).float().sum(), wanted)
        _wait(device)
        return gradients

    return {"forward": forward, "forward + backward": both}


def _tensor(x: Any, device: str) -> torch.Tensor:
    """A JAX array as a tensor; by way of float32, which holds all of bfloat16."""
    found = torch.from_numpy(np.array(x, np.float32))
    return found.to(device, torch.bfloat16 if x.dtype == "bfloat16" else torch.float32)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def attention_runs(
    shape: tuple[int, int, int, int], length: int, window: int, sinks: int
) -> dict[str, Callable[[], Any]]:
    """{"forward", "forward + backward"} of FlexAttention with a window and sinks on a GPU; they wait for the end.

    Args:
      shape: (B, heads of queries, heads of keys, dimension).
      length: tokens.
      window, sinks: of the mask.
    """
    batch, heads, kv_heads, dim = shape
    make = lambda h: torch.randn(batch, h, length, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)  # noqa: E731
    q, k, v = make(heads), make(kv_heads), make(kv_heads)

    def visible(b, h, i, j):
        return (j <= i) & ((i - j < window) | (j < sinks))

    compiled: Any = {"device": "cuda", "_compile": True}  # or it forms [L, L]
    mask = flex_attention.create_block_mask(visible, None, None, length, length, **compiled)
    attend = torch.compile(lambda: flex_attention.flex_attention(q, k, v, block_mask=mask, enable_gqa=True))

    def forward() -> None:
        attend()
        _wait("cuda")

    def both() -> None:
        attend().sum().backward()
        _wait("cuda")

    return {"forward": forward, "forward + backward": both}
