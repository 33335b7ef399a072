"""Every kernel through the compilers of its devices, which run on any machine: `make test-aot` installs them."""

import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from allmem_jax.decoding import generation
from allmem_jax.model import config as config_lib
from allmem_jax.model import lm, sharding
from allmem_jax.model import state as state_lib
from pallas_kernels import tpu_kind
from pallas_kernels.tools import compiling, topology
from train.loop import optimizer as optimizer_lib
from train.loop import plan, steps
from train.recipe import FinetuneConfig

pytestmark = pytest.mark.aot
DTYPES = ("bfloat16", "float32")
LENGTH = 8192


def has(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False


needs_tpu = pytest.mark.skipif(not has("libtpu"), reason="needs libtpu: make test-aot")
needs_gpu = pytest.mark.skipif(
    not (has("jax_plugins.xla_cuda13") and has("jax_triton")), reason="needs the compiler for GPUs: make test-aot"
)
NAMES = [
    *(pytest.param(name, marks=needs_tpu) for name in topology.SMALLEST),
    pytest.param("h100", marks=needs_gpu),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "dim,chunk,masks,read_out",
    [(32, 512, False, "full"), (64, 2048, True, "full"), (128, 1024, False, "difference"), (256, 4096, False, "full")]
    + [(256, 4096, True, "difference")],
)
def test_memory_compiles(name, dim, dtype, chunk, masks, read_out):
    text = compiling.memory(name, dim, dtype, LENGTH, chunk, masks=masks, read_out=read_out).as_text()
    calls = ("triton_kernel_call",) if name == "h100" else ("ttt_memory_forward", "ttt_memory_backward")
    assert all(call in text for call in calls)


@needs_tpu
@pytest.mark.parametrize("name", topology.SMALLEST)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "dim,groups,kv_heads,slots,batch,length",
    [(32, 1, 8, 300, 8, 16), (64, 3, 3, 1153, 2, 256), (128, 2, 8, 4224, 1, 1000), (256, 4, 2, 640, 8, 64)],
)
def test_prefill_compiles(name, dim, groups, kv_heads, slots, batch, length, dtype):
    sizes = {"groups": groups, "kv_heads": kv_heads, "batch": batch, "length": length}
    assert "swa_prefill" in compiling.prefill(name, dim, dtype, slots, **sizes).as_text()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim,groups,documents", [(32, 1, False), (64, 3, True), (128, 2, False), (256, 4, False)])
def test_attention_compiles(name, dim, groups, documents, dtype):
    text = compiling.attention(name, dim, dtype, LENGTH, groups=groups, documents=documents).as_text()
    calls = ("triton_kernel_call",) if name == "h100" else ("swa_forward", "swa_gradient")
    assert all(call in text for call in calls)


@needs_tpu
@pytest.mark.parametrize("name", topology.SMALLEST)
@pytest.mark.parametrize("dtype,length", [("bfloat16", 16384), ("float32", 8192), ("bfloat16", 32768)])
def test_attention_of_long_rows_compiles(name, dtype, length):
    """Up to the longest whose keys' gradients lie in VMEM, and beyond."""
    text = compiling.attention(name, 128, dtype, length).as_text()
    assert ("swa_key_gradient" in text) == (length == 32768) and ("swa_gradient" in text) == (length < 32768)


@needs_tpu
@pytest.mark.parametrize("name", topology.SMALLEST)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim,length,rows", [(32, 8192, True), (64, 200, False), (128, 8192, True), (256, 4096, True)])
def test_rope_compiles(name, dim, length, rows, dtype):
    text = compiling.rope(name, dim, dtype, length, rows=rows).as_text()
    assert "norm_rope_forward_kernel" in text and "norm_rope_backward_kernel" in text


@needs_tpu
@pytest.mark.parametrize("name", topology.SMALLEST)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,dim,length,packed", [(3, 64, 8192, True), (8, 64, 200, False), (16, 128, 8192, False)])
def test_conv_compiles(name, heads, dim, length, packed, dtype):
    text = compiling.conv(name, heads, dim, dtype, length, documents=packed).as_text()
    assert "conv_norm_forward_kernel" in text and "conv_norm_backward_kernel" in text


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "dim,groups,kv_heads,slots,batch",
    [(32, 1, 8, 300, 8), (64, 3, 3, 1153, 2), (128, 2, 8, 4224, 1), (256, 4, 2, 640, 8)],
)
def test_decode_compiles(name, dim, groups, kv_heads, slots, batch, dtype):
    sizes = {"groups": groups, "kv_heads": kv_heads, "batch": batch}
    text = compiling.decode(name, dim, dtype, slots, **sizes).as_text()
    assert ("triton_kernel_call" if name == "h100" else "swa_decode") in text


@needs_tpu
@pytest.mark.parametrize("name,kind", [("v5e", "v5e"), ("v5p", "v5p"), ("v6e", "v6e"), ("tpu7x", "7x")])
def test_tiles_are_those_of_the_device_that_is_compiled_for(name, kind):
    found = []

    def function(x):
        found.append(tpu_kind.traced_for())
        return 2 * x

    compiling.for_one_device(name, function, jax.ShapeDtypeStruct((8, 128), jnp.float32))
    assert set(found) == {kind}


@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_of_qwen3_compiles(name):
    devices = len(topology.devices(name))
    mesh = topology.mesh(name, (1, devices, 1, 1), sharding.AXES)
    config = config_lib.preset("qwen3-0.6b").replace(dtype="bfloat16", chunk=1024, window=1024, sinks=64)
    rows = devices

    def place(tree):
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, sharding.tree_shardings(tree, mesh)
        )

    params = jax.eval_shape(lm.AllMemLM(config).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    backbone, memory = lm.split_params(params)
    optimizer = optimizer_lib.make(lambda count: 1e-4, (0.9, 0.95), 0.0, 1.0)
    state = place(jax.eval_shape(lambda tree: steps.init_state(tree, optimizer), memory))
    place_row = lambda *shape, dtype: jax.ShapeDtypeStruct(  # noqa: E731
        shape, dtype, sharding=sharding.batch_sharding(mesh)
    )
    tokens = place_row(rows, 4096, dtype=jnp.int32)
    batch = steps.Batch(tokens, tokens, place_row(rows, 4096, dtype=bool), tokens)
    key = jax.eval_shape(lambda: jax.random.key(0))
    size = jax.ShapeDtypeStruct((), jnp.int32)

    def step(state, backbone, batch, window, sinks, key):
        hidden = steps.teacher_hidden(backbone, config, batch)
        return steps.train_step(
            state, backbone, batch, hidden, window, sinks, key, config=config, loss=steps.Loss(), optimizer=optimizer
        )

    with jax.set_mesh(mesh):
        compiled = jax.jit(step, donate_argnums=0).lower(state, place(backbone), batch, size, size, key).compile()
    assert compiled.as_text().count("triton_kernel_call" if name == "h100" else "tpu_custom_call") >= 5
    assert name == "h100" or all(f"{op}_backward_kernel" in compiled.as_text() for op in ("norm_rope", "conv_norm"))
    assert compiled.memory_analysis().temp_size_in_bytes < 12 * 2**30


@needs_tpu
def test_a_decode_step_copies_no_state():
    """8 rows of Qwen3-0.6B, whose states are 5 GiB: caches and fast weights are read and written where they lie."""
    config = config_lib.preset("qwen3-0.6b").replace(
        mixer="allmem", window=4096, sinks=4, dtype="bfloat16", read_out="difference", delay=True
    )
    everywhere = NamedSharding(topology.mesh("v5e"), PartitionSpec())
    rows = 8

    def arguments():
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), lm.random_params(config))
        state = state_lib.init_state(config, rows)
        return params, jnp.zeros((rows, config.vocab_size)), state, jnp.zeros(rows, bool), jax.random.key(0)

    def step(params, *rest):
        return generation.decode_step.__wrapped__(params, config, *rest, generation.GREEDY)

    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), jax.eval_shape(arguments)
    )
    compiled = jax.jit(step, donate_argnums=2).lower(*shapes).compile()
    assert "swa_decode" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.01 * state_lib.state_bytes(config, rows)


LONG = [
    pytest.param("h100", (1, 1, 1, 1), 1, 24576, marks=needs_gpu),
    pytest.param("v5p:4x4x4", (1, 8, 1, 8), 8, 131072, marks=needs_tpu),
]


@pytest.mark.parametrize(("name", "shape", "rows", "length"), LONG)
def test_long_distillation_of_qwen3_fits(name, shape, rows, length):
    """The step as it is trained, teacher and student: it fits, and nowhere are there logits of a sequence."""
    recipe = FinetuneConfig(
        model="qwen3-1.7b",
        out="unused",
        batch=rows,
        seq_length=length,
        window=(512, 8192),
        sinks=(0, 256),
        chunk=(512,),
        dtype="bfloat16",
        backbone_dtype="bfloat16",
        mesh=shape,
    )
    config = plan.planned_config(recipe)
    found = plan.compile_step(recipe, config, topology.mesh(name, shape, sharding.AXES))
    assert found.peak < plan.DEVICES[name.split(":")[0]][1]
    shapes = (tuple(map(int, dims.split(","))) for dims in re.findall(r"\b(?:f32|bf16)\[([\d,]+)\]", found.text))
    largest = max(math.prod(shape) // config.vocab_size for shape in shapes if config.vocab_size in shape)
    assert largest <= config.d_model  # the embedding's; a quarter of the row's tokens have a loss
    if name != "h100":  # whose compiler does not say
        assert {"attention", "memory", "mlp", "loss", "optimizer"} <= {*found.estimate.products, *found.estimate.rest}
        assert found.estimate.kernels["ttt_memory_backward"] == config.n_layers
