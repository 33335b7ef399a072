"""What a run starts from and what it leaves: the model that a recipe names, and the files of what was trained."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.experimental import multihost_utils

from allmem_jax.checkpoints import layout, tokenizer
from allmem_jax.checkpoints import load as load_lib
from allmem_jax.checkpoints import save as save_lib
from allmem_jax.checkpoints import start as start_lib
from allmem_jax.model import config as config_lib
from allmem_jax.model import lm, sharding
from allmem_jax.storage import files, stores
from train.data import stream
from train.loop import checkpoint, distributed, tiny
from train.recipe import FinetuneConfig


class Pretrained(NamedTuple):
    """What a run starts from.

    Attributes:
      config: of the student.
      backbone: all parameters but the memory's; None for random ones, made where they are to lie.
      memory: the memory's parameters; None likewise.
      tokenizer: of the texts.
      origin: `checkpoint.content_hash` of the backbone for a caller that trains on it repeatedly; "" takes it anew.
    """

    config: config_lib.ModelConfig
    backbone: Any
    memory: Any
    tokenizer: Any
    origin: str = ""


def load(config: FinetuneConfig) -> Pretrained:
    """The model that a recipe names, with a memory of its own seed unless the folder has one."""
    found = read(config)
    if found.memory:
        return found._replace(memory=weakened(config, found.config, found.memory))
    if found.backbone is None:
        if config.write_strength != 1:
            raise ValueError(f"write_strength={config.write_strength} needs a model with weights, not {config.model!r}")
        return found
    return found._replace(memory=new_memory(config, found.config, found.backbone, found.tokenizer))


def read(config: FinetuneConfig) -> Pretrained:
    """The model that a recipe names, with the memory that it has, or none."""
    if config.model == "tiny":
        fields = config.student(tiny.CONFIG, remembers=False)
        return Pretrained(fields, tiny.backbone(), lm.init_memory(fields, config.seed), tiny.ByteTokenizer())
    if config.model in config_lib.PRESETS and not Path(config.model).exists():
        found = tokenizer.load_tokenizer(config.tokenizer) if config.tokenizer else None
        if found is None:
            raise ValueError(
                f"tokenizer={config.tokenizer!r}: the preset {config.model} comes without one; name a folder or a .gguf"
                " file that has it"
            )
        return Pretrained(config.student(config_lib.preset(config.model), remembers=False), None, None, found)
    loaded, params, found = load_lib.load_with_tokenizer(config.model, dtype=config.backbone_dtype)
    backbone, memory = lm.split_params(params)
    return Pretrained(config.student(loaded, remembers=bool(memory)), backbone, memory, found)


def load_trained(config: FinetuneConfig) -> Pretrained:
    """`load` with the hash of the backbone, to train on repeatedly; ValueError where the weights are random."""
    found = load(config)
    if found.backbone is None:
        raise ValueError(f"model={config.model!r} has random weights; give a folder or file with trained ones")
    return identified(found)


def identified(found: Pretrained) -> Pretrained:
    """The same with its origin, where it has weights and none yet."""
    if found.backbone is None or found.origin:
        return found
    return found._replace(origin=checkpoint.content_hash(found.backbone))


def lineage(found: Pretrained) -> str:
    """What tells the parameters of a model from others, where its origin is known."""
    return f"{found.origin} {checkpoint.content_hash(found.memory)}"


def new_memory(config: FinetuneConfig, fields: config_lib.ModelConfig, backbone: Any, tokenizer: Any) -> lm.Params:
    """A memory that no training has seen, made as the recipe says, for a model of config `fields`."""
    if config.start == "random":
        return weakened(config, fields, lm.init_memory(fields, config.seed))
    documents = stream.load_documents(config.texts or config.mixture[0].texts, tokenizer, config.cache)
    longest = int(np.argmax(documents.lengths))
    tokens, _ = documents.take(longest, 0, start_lib.LENGTH)
    return weakened(config, fields, start_lib.from_attention(fields, backbone, tokens, config.seed))


def weakened(config: FinetuneConfig, fields: config_lib.ModelConfig, memory: lm.Params) -> lm.Params:
    """A memory that writes as strongly as the recipe says: its values, which are in nothing but writes, are scaled."""
    if config.write_strength == 1:
        return memory
    if fields.mixer != "allmem":
        raise ValueError(f"write_strength={config.write_strength} is for mixer=allmem; this memory is {fields.mixer!r}")
    own = memory["layers"]["memory"]
    return {"layers": {"memory": own | {"v_conv": {"kernel": own["v_conv"]["kernel"] * config.write_strength}}}}


@contextmanager
def host_memory() -> Iterator[None]:
    """Arrays made in here lie in the host's memory, so that no device holds a whole model beside its part."""
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX was told to use another platform alone
        yield
        return
    with jax.default_device(host):
        yield


def check_finite(backbone: lm.Params | None) -> None:
    """Raises a ValueError that names parameters with NaN or infinity."""
    if backbone is None:
        return
    finite = jax.jit(lambda tree: jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), tree))(backbone)
    bad = [sharding.path_string(path) for path, ok in jax.tree_util.tree_leaves_with_path(finite) if not ok]
    if bad:
        raise ValueError(f"the model has NaN or infinite weights in {', '.join(bad)}; fetch or convert it again")


def export(config: FinetuneConfig, pretrained: Pretrained, trained: lm.Params) -> None:
    """The memory's weights and the config into the output folder, and the whole model below it.

    `trained` is the memory, or all parameters. Every process calls it, and returns when the files are there.
    """
    if jax.process_count() > 1:
        trained = multihost_utils.process_allgather(trained, tiled=True)
    if distributed.main_process():
        backbone, memory = lm.split_params(trained)
        flat = flax.traverse_util.flatten_dict(memory, sep="/")
        files.write(stores.join(config.out, layout.ALLMEM_CONFIG), pretrained.config.to_json())
        if config.export and config.model != "tiny":
            params = lm.merge_params(backbone or pretrained.backbone, memory)
            folder = stores.join(config.out, "model")
            save_lib.save_pretrained(folder, pretrained.config, params, pretrained.tokenizer, overwrite=True)
        weights = {name: np.asarray(leaf, np.float32) for name, leaf in flat.items()}
        # Last: a run that has it is complete.
        files.write(stores.join(config.out, layout.ALLMEM_WEIGHTS), safetensors.numpy.save(weights))
    distributed.wait_for_all("exported")


def trained_memory(out: str | os.PathLike[str]) -> lm.Params:
    """The memory that a run wrote, {"layers": {"memory": ...}}."""
    flat = safetensors.numpy.load(stores.read(stores.join(out, layout.ALLMEM_WEIGHTS)))
    return flax.traverse_util.unflatten_dict({name: jnp.asarray(value) for name, value in flat.items()}, sep="/")
