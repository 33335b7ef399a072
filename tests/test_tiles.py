"""Sizes of the TPU kernels' tiles, by the chip that a program is traced for."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import tpu_kind
from pallas_kernels.swa import tpu_visits
from pallas_kernels.ttt import pallas_tpu as ttt_tpu

pytestmark = pytest.mark.core
KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "7x"}


def on(kind):
    """A context in which programs are traced for a device that is not there."""
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device))


@pytest.mark.parametrize("kind,name", KINDS.items())
def test_the_chip_of_the_mesh_decides(kind, name):
    found = []
    with on(kind):
        jax.jit(lambda: found.append(tpu_kind.traced_for())).lower()
        assert ttt_tpu.choose_tiles() is ttt_tpu.TILES[name]
    assert found == [name]
    assert name in tpu_visits.TILES


@pytest.mark.skipif(jax.default_backend() == "tpu", reason="the chip is known here")
def test_an_unknown_device_gets_the_default():
    for context in (on("cpu"), on("TPU v99")):
        with context:
            assert tpu_kind.traced_for() is None
            assert ttt_tpu.choose_tiles() == ttt_tpu.Tiles()
    assert ttt_tpu.choose_tiles() == ttt_tpu.Tiles()


def test_attention_blocks_come_from_the_table(monkeypatch):
    monkeypatch.setitem(tpu_visits.TILES, "v6e", tpu_visits.Tiles(columns=512, keys=1024))
    q, k = (jax.ShapeDtypeStruct((1, 4096, heads, 64), jnp.bfloat16) for heads in (4, 2))
    traced = jnp.int32(1), jnp.int32(0)
    with on("TPU v6 lite"):
        blocks = tpu_visits.choose_blocks(q, k, *traced)
    assert (blocks.query, blocks.key) == (256, 1024)
    blocks = tpu_visits.choose_blocks(q, k, 4096, 0)
    assert (blocks.query * 2, blocks.key) == (tpu_visits.Tiles().columns, tpu_visits.Tiles().keys)


@pytest.mark.parametrize(
    "module,field,value", [(tpu_visits, "columns", 384), (tpu_visits, "keys", 2048), (ttt_tpu, "forward", 40)]
)
def test_tiles_that_cannot_be_are_named(module, field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        module.Tiles(**{field: value})
