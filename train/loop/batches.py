"""Rows of a recipe's texts, on their way to the devices."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from allmem_jax.model import sharding
from allmem_jax.storage import stores
from train.data import lessons
from train.data import stream as stream_lib
from train.loop import models, steps
from train.recipe import FinetuneConfig


def read_rows(config: FinetuneConfig, pretrained: models.Pretrained, texts: Sequence[str]) -> stream_lib.Source:
    """Rows of the texts, or where there are none of the recipe's mixture, whose tokens the model must know."""
    if not texts and not config.mixture:
        raise ValueError("there is nothing to train on: give --texts FILE_OR_FOLDER ...")
    align, cache = max(config.chunk) if config.packed else None, stores.local_only(config.cache, "cache")
    rows: Any
    if texts:
        documents = stream_lib.load_documents(texts, pretrained.tokenizer, cache, end_of_text=config.end_of_text)
        if config.lessons and texts == config.texts:
            options: Any = dict(share=config.lessons, kinds=config.kinds, seed=config.seed)
            rows = lessons.Lessons(documents, pretrained.tokenizer, config.seq_length, **options)
        else:
            rows = stream_lib.Rows(documents, config.seq_length, align=align, response_only=config.response_only)
    else:
        rows = stream_lib.Mixture(
            config.mixture, config.seq_length, pretrained.tokenizer, cache, align=align, end_of_text=config.end_of_text
        )
    stream_lib.check_tokenizer(pretrained.config.vocab_size, rows.largest_token())
    return rows


def stream(config: FinetuneConfig, rows: stream_lib.Source, mesh: Mesh, seed: int) -> stream_lib.Stream:
    """This process's part of one batch after the other, in an order that the seed decides."""
    return stream_lib.Stream(rows, config.batch, seed=seed, local=own_rows(mesh, config.batch))


@functools.cache
def own_rows(mesh: Mesh, batch: int) -> list[int]:
    """The rows of a batch of which this process holds some tokens, in their order."""
    places = sharding.batch_sharding(mesh, tokens=False).addressable_devices_indices_map((batch,))
    return sorted({row for index in places.values() if index for row in range(*index[0].indices(batch))})


def place(config: FinetuneConfig, arrays: dict[str, np.ndarray], mesh: Mesh) -> steps.Batch:
    """This process's rows, as `stream` gives them, as its part of global arrays."""
    where = sharding.batch_sharding(mesh)

    def one(local: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(config.batch)
            at = own_rows(mesh, config.batch).index(first)
            return local[at : at + last - first, index[1]]

        return jax.make_array_from_callback((config.batch, *local.shape[1:]), where, part)

    names = ["tokens", "targets", "mask", *["segment_ids"] * config.packed, *["answers"] * ("answers" in arrays)]
    rows = {name: arrays[name] for name in names}
    return steps.Batch(**(jax.device_put(rows, where) if jax.process_count() == 1 else jax.tree.map(one, rows)))
