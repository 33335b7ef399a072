"""The Triton kernels, run by Triton's interpreter on the CPU, against the portable backend and the dense reference."""

import functools
import os
import subprocess
import sys
import threading
import types as python_types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # read where kernels are decorated, Triton's own among them
pytest.importorskip("torch", reason="Triton's interpreter works on torch tensors")
pytest.importorskip("triton", reason="needs triton: pip install triton")

import torch
import triton.language as tl
from triton.runtime import interpreter

from pallas_kernels import triton_call
from pallas_kernels.swa import decode_triton
from pallas_kernels.swa import reference as swa_reference
from pallas_kernels.swa import triton_gpu as swa_triton
from pallas_kernels.ttt import reference as ttt_reference
from pallas_kernels.ttt import triton_gpu as ttt_triton
from pallas_kernels.ttt import types, xla

TOLERANCE = {np.float32: 1e-5, jnp.dtype("bfloat16").type: 1e-2}
CALL = triton_call.call
ONE_AT_A_TIME = threading.Lock()  # the interpreter patches triton.language while it runs


def relative(a, b, least=0.0):
    """Norm of the difference over the norm of b, or over `least` where b is smaller."""
    a, b = (np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(t)]) for t in (a, b))
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), least, 1e-30)


def to_torch(x):
    x = np.array(x)
    return torch.tensor(x.view(np.int16)).view(torch.bfloat16) if x.dtype == jnp.bfloat16 else torch.tensor(x)


def to_numpy(x):
    return x.view(torch.int16).numpy().view(jnp.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Sends every kernel call of a traced program to the interpreter."""

    def call(kernel, *arrays, out, grid, tile, **constants):
        def launch(*arrays):
            inputs = [to_torch(x) for x in arrays]
            outputs = [to_torch(np.full(o.shape, 7, o.dtype)) for o in out]  # kernels must fill all of it
            with ONE_AT_A_TIME:
                kernel[grid](*inputs, *outputs, **constants)
            return [to_numpy(x) for x in outputs]

        return jax.pure_callback(launch, list(out), *arrays)

    plain = interpreter.InterpreterBuilder.create_dot

    def widen(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self, a, b, *rest):  # the interpreter keeps bfloat16 as integers and would multiply those
        return plain(self, widen(a), widen(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(triton_call, "call", call)


def small(rows, columns):
    return triton_call.Tile(rows, columns, 4, 1)


def attention(blocks, scale, q, k, v, window, sinks, segments, cotangent):
    """Returns out and the gradients of q, k and v."""
    out, residuals = swa_triton.forward(blocks, scale, q, k, v, window, sinks, segments)
    return out, *swa_triton.backward(blocks, scale, residuals, cotangent)


PACKED = np.stack([np.repeat([0, 1, 2, 3], [3, 30, 1, 41]), np.repeat([4, 1, 2, 0], [20, 17, 29, 9])])


@pytest.mark.parametrize(
    "packed,window,sinks,blocks",
    [
        (False, 1, 0, (32, 16)),
        (True, 1, 3, (16, 32)),
        (True, 20, 0, (32, 16)),
        (False, 24, 5, (16, 32)),
        (True, 33, 40, (32, 16)),
        (False, 500, 2, (16, 16)),
        (True, 500, 2, (16, 32)),
    ],
)
def test_attention_matches_reference(packed, window, sinks, blocks):
    check_attention(jnp.float32, packed, window, sinks, blocks, heads=(3, 1), dim=16)


@pytest.mark.parametrize(
    "dtype,heads,dim", [(jnp.float32, (5, 5), 12), (jnp.bfloat16, (6, 2), 8), (jnp.bfloat16, (2, 1), 64)]
)
def test_attention_of_other_heads(dtype, heads, dim):
    check_attention(dtype, True, 21, 2, (16, 16), heads, dim)


def check_attention(dtype, packed, window, sinks, blocks, heads, dim):
    rng = np.random.default_rng(0)
    length = PACKED.shape[1]
    q, k, v, cotangent = (
        jnp.asarray(rng.normal(size=(2, length, h, dim)), dtype) for h in (heads[0], heads[1], heads[1], heads[0])
    )
    segments = jnp.asarray(PACKED, jnp.int32) if packed else None
    tiles = swa_triton.Tiles(small(*blocks), small(*blocks), small(*blocks))
    run = jax.jit(attention, static_argnums=(0, 1))
    bound = (jnp.int32(min(window, length)), jnp.int32(min(sinks, length)))
    got = run(tiles, 0.3, q, k, v, *bound, segments, cotangent)

    def dense(q, k, v):
        return swa_reference.swa_attention(q, k, v, window=window, sinks=sinks, segment_ids=segments, scale=0.3)

    out, pullback = jax.vjp(dense, *(x.astype(jnp.float32) for x in (q, k, v)))
    want = out, *pullback(cotangent.astype(jnp.float32))
    least = 0.1 * np.linalg.norm(out)
    for name, a, b in zip(("out", "q", "k", "v"), got, want, strict=True):
        assert a.dtype == dtype
        assert relative(a, b, least) < TOLERANCE[jnp.dtype(dtype).type], name


@pytest.mark.parametrize(
    "dtype,sink_slots,count,heads,dim,window,sinks",
    [
        (jnp.float32, 0, 13, (2, 2), 8, 13, 0),
        (jnp.float32, 3, 141, (3, 1), 16, 26, 2),
        (jnp.float32, 5, 270, (4, 1), 12, 300, 5),
        (jnp.bfloat16, 4, 333, (6, 2), 64, 90, 4),
        (jnp.bfloat16, 1, 100, (2, 1), 32, 1, 1),
    ],
)
def test_decode_matches_reference(dtype, sink_slots, count, heads, dim, window, sinks):
    rng = np.random.default_rng(0)
    position = jnp.asarray([0, 1, count // 2, count, 2 * count + 7], jnp.int32)
    rows = len(position)
    shapes = ((rows, heads[0], dim), *[(rows, heads[1], dim)] * 2, *[(3, rows, count, heads[1], dim)] * 2)
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    limits = position, jnp.int32(window), jnp.int32(sinks)
    got = jax.jit(decode_triton.decode, static_argnums=(0, 1))(sink_slots, 0.3, *arrays, *limits, jnp.int32(1))
    wide = [x.astype(jnp.float32) for x in arrays]
    want = swa_reference.swa_decode(sink_slots, 0.3, *wide[:3], *(x[1] for x in wide[3:]), *limits)
    assert got.dtype == dtype
    assert relative(got, want) < TOLERANCE[jnp.dtype(dtype).type]


def test_small_batches_are_cut_into_parts():
    for heads, count, block in ((1, 4224, 64), (8, 4224, 64), (256, 4224, 64), (1, 100, 64), (8, 131200, 128)):
        parts = decode_triton.parts_of(heads, count, block)
        assert 1 <= parts <= decode_triton.MOST_PARTS and (parts == 1 or count // parts >= 2 * block)
        assert parts == 1 or heads * parts < 2 * decode_triton.PROGRAMS


def make_weights(rng, *lead, hidden, dim):
    shapes = ((hidden, dim), (hidden, dim), (dim, hidden))
    return types.FastWeights(*(jnp.asarray(rng.normal(size=(*lead, *s)) / dim**0.5, jnp.float32) for s in shapes))


def tiles(rows, columns):
    return ttt_triton.Tiles(*[small(rows, columns)] * 4)


@pytest.mark.parametrize(
    "dtype,tokens,hidden,dim,blocks",
    [
        (jnp.float32, 37, 12, 8, (16, 16)),
        (jnp.float32, 96, 64, 32, (16, 32)),
        (jnp.bfloat16, 37, 48, 12, (16, 32)),
        (jnp.bfloat16, 5, 128, 64, (32, 64)),
    ],
)
def test_memory_kernels_match_plain_jax(dtype, tokens, hidden, dim, blocks):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 3, tokens, dim)), dtype) for _ in range(3))
    lr = jnp.asarray(rng.uniform(0.01, 0.3, (2, 3, tokens, 3)), jnp.float32)
    w = make_weights(rng, 2, 3, hidden=hidden, dim=dim)
    check_kernel(rng, functools.partial(ttt_triton.read_tokens, tiles(*blocks)), xla.apply, (w, q))
    check_kernel(rng, functools.partial(ttt_triton.write_tokens, tiles(*blocks)), xla._gradient, (w, k, v, lr))


def check_kernel(rng, kernel, plain, arguments):
    """Compares a kernel's result and gradients with those of plain JAX in float32."""

    def widened(x):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), x)

    @jax.jit
    def run(arguments, cotangent):
        got, pullback = jax.vjp(kernel, *arguments)
        return got, *pullback(cotangent)

    want, pullback = jax.vjp(plain, *widened(arguments))
    dtype = arguments[1].dtype
    shapes = jax.eval_shape(kernel, *arguments)
    cotangent = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
    for part, (a, b) in enumerate(zip(run(arguments, cotangent), (want, *pullback(widened(cotangent))), strict=True)):
        assert relative(a, b) < TOLERANCE[dtype.type], (plain.__name__, part)


@pytest.mark.slow
@pytest.mark.parametrize("given,difference", [(False, False), (True, False), (True, True)])
def test_memory_matches_reference(given, difference):
    rng = np.random.default_rng(0)
    batch, length, heads, dim, hidden, chunk = 2, 21, 2, 8, 12, 8
    q, k, v = (jnp.asarray(rng.normal(size=(batch, length, heads, dim)), jnp.float32) for _ in range(3))
    lr = jnp.asarray(rng.uniform(0.01, 0.3, (batch, length, heads, 3)), jnp.float32)
    momentum = jnp.asarray(rng.uniform(0, 1, (batch, length, heads)), jnp.float32)
    init = make_weights(rng, heads, hidden=hidden, dim=dim)
    state, marks = types.init_memory_state(init, batch), (None, None)
    if given:
        floats = (make_weights(rng, batch, heads, hidden=hidden, dim=dim) for _ in range(3))
        count = jnp.asarray([0, 5], jnp.int32)
        state = types.MemoryState(*floats, 0.3 * count[:, None] * jnp.ones((batch, heads)), count)
        marks = jnp.asarray(rng.random((batch, length)) < 0.8), jnp.asarray(rng.random((batch, length)) < 0.1)
    tokens = (q, k, v, lr, momentum)

    def dense(tokens, init, floats):
        valid, reset = marks if given else (jnp.ones((batch, length), bool), jnp.zeros((batch, length), bool))
        start = types.MemoryState(*floats, state.count)
        options = dict(chunk_size=chunk, valid=valid, reset=reset, difference=difference)
        out, end = ttt_reference.ttt_memory(*tokens, init, start, **options)
        return out, tuple(end[:4])

    @jax.jit
    def expected(arguments, cotangent):
        result, pullback = jax.vjp(dense, *arguments)
        return result, *pullback(cotangent)

    arguments = (tokens, init, tuple(state[:4]))
    shapes = jax.eval_shape(dense, *arguments)
    cotangent = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
    want = expected(arguments, cotangent)

    @jax.jit
    def run(tokens, init, state, marks, cotangent):
        (out, end), residuals = ttt_triton.forward(chunk, not given, difference, tokens, init, state, *marks)
        d_end = types.MemoryState(*cotangent[1], None)
        cotangents = cotangent[0], d_end
        d_tokens, d_init, d_state = ttt_triton.backward(chunk, not given, difference, residuals, cotangents)
        return (out, tuple(end[:4])), d_tokens, d_init, tuple(d_state[:4])

    got = run(tokens, init, state, marks, cotangent)
    for name, a, b in zip(("result", "tokens", "init", "state"), got, want, strict=True):
        assert relative(a, b) < 1e-5, name


@pytest.mark.parametrize("outputs", ["out_shape", "out_type"])
def test_call_speaks_to_both_generations_of_jax_triton(monkeypatch, outputs):
    scope: dict = {}
    exec(
        f"def triton_call(*arrays, kernel, {outputs}, grid, **rest): return arrays, kernel, {outputs}, grid, rest",
        scope,
    )
    module = python_types.ModuleType("jax_triton")
    module.triton_call = scope["triton_call"]
    monkeypatch.setitem(sys.modules, "jax_triton", module)
    monkeypatch.setattr(triton_call, "_jax_triton", triton_call._jax_triton.__wrapped__)
    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    got = CALL("kernel", 1, 2, out=[shape], grid=(4,), tile=triton_call.Tile(16, 32, 4, 2), SIZE=7)
    options = {"num_warps": 4, "num_stages": 2, "compute_capability": None, "SIZE": 7}
    if outputs == "out_type":
        options["backend_options"] = {"ptx_version": triton_call.PTX_VERSION}
    assert got == ((1, 2), "kernel", [shape], (4,), options)


def test_failed_import_leaves_the_environment_alone(monkeypatch, tmp_path):
    lines = ("import os", "os.environ['TRITON_CACHE_DIR'] = ''", "raise ImportError('requires JAX with GPU support')")
    (tmp_path / "jax_triton.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "jax_triton", raising=False)
    monkeypatch.setattr(triton_call, "_jax_triton", triton_call._jax_triton.__wrapped__)
    for value in (None, "/somewhere"):
        monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
        if value is not None:
            monkeypatch.setenv("TRITON_CACHE_DIR", value)
        assert "requires JAX with GPU support" in triton_call.unavailable.__wrapped__()
        assert os.environ.get("TRITON_CACHE_DIR") == value


def test_tiles_that_cannot_be_are_named():
    for values, message in (((48, 64, 4, 2), "rows=48"), ((64, 8, 4, 2), "columns=8"), ((64, 64, 3, 2), "warps=3")):
        with pytest.raises(ValueError, match=message):
            triton_call.Tile(*values)
    with pytest.raises(ValueError, match="stages=0"):
        triton_call.Tile(64, 64, 4, 0)
    with pytest.raises(NotImplementedError, match="float64"):
        swa_triton.choose_blocks(64, np.float64)
    with pytest.raises(NotImplementedError, match="512"):
        ttt_triton.choose_tiles(512, jnp.bfloat16)


COMPILE = """
import jax, jax.numpy as jnp, triton
from triton.backends.compiler import GPUTarget
from pallas_kernels import triton_call
from pallas_kernels.swa import triton_gpu as swa
from pallas_kernels.ttt import triton_gpu as ttt, types

names = {"bfloat16": "*bf16", "float32": "*fp32", "int32": "*i32"}

def call(kernel, *arrays, out, grid, tile, **constants):
    pointers = dict(zip(kernel.arg_names, [names[x.dtype.name] for x in (*arrays, *out)]))
    source = triton.compiler.ASTSource(
        kernel, {**pointers, **dict.fromkeys(constants, "constexpr")}, constants,
        {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))},
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(kernel.__name__, compiled.metadata.shared, "wgmma" in compiled.asm["ptx"])
    return [jnp.zeros(x.shape, x.dtype) for x in out]

def attention(q, k, segments):
    tiles = swa.choose_blocks(64, q.dtype)
    out, residuals = swa.forward(tiles, 0.1, q, k, k, jnp.int32(9), jnp.int32(1), segments)
    return swa.backward(tiles, 0.1, residuals, out)

def memory(q, lr, w):
    tiles = ttt.choose_tiles(64, q.dtype)
    jax.vjp(lambda *x: ttt.read_tokens(tiles, *x), w, q)[1](q.astype(jnp.float32))
    jax.vjp(lambda *x: ttt.write_tokens(tiles, *x), w, q, q, lr)[1](w)

triton_call.call = call
array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
jax.eval_shape(attention, array(1, 512, 4, 64), array(1, 512, 2, 64), array(1, 512, dtype=jnp.int32))
shapes = ((128, 64), (128, 64), (64, 128))
weights = types.FastWeights(*(array(1, 2, *shape, dtype=jnp.float32) for shape in shapes))
jax.eval_shape(memory, array(1, 2, 512, 64), array(1, 2, 512, 3, dtype=jnp.float32), weights)
"""


@pytest.mark.slow
def test_kernels_compile_for_an_h100(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    kernels = [line.split() for line in done.stdout.splitlines()]
    assert len(kernels) == 7
    for name, shared, tensor_cores in kernels:
        assert int(shared) <= 232448, name
        assert tensor_cores == "True", name
