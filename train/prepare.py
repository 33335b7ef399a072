"""Makes the tokens of a recipe's texts beforehand: `python -m train.prepare configs/RECIPE.py [--field value ...]`.

Takes the arguments of train.finetune. Files are tokenised by several processes, and what the cache folder has already
is left as it is; training then finds all tokens there, on every host that sees the folder.
"""

import multiprocessing
import os
from collections.abc import Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import tqdm

from allmem_jax.checkpoints import tokenizer as tokenizer_lib
from allmem_jax.storage import stores
from train import errors
from train.data import documents, encode, records
from train.loop import tiny
from train.recipe import FinetuneConfig, parse

_worker: dict[str, Any] = {}  # of a process: the tokenizer and its edges, which are sent once


def prepare(
    paths: Sequence[str], tokenizer: encode.Tokenizer, cache: Path, processes: int, *, end_of_text: bool = True
) -> int:
    """Tokenises the files that the cache lacks; `end_of_text` as in `documents.load_documents`.

    Returns:
      How many there were.

    Raises:
      ValueError: a file or a record that cannot be used; files that are done stay done.
    """
    files, ends = records.find(paths), encode.edges(tokenizer, end_of_text)
    named = documents.digests(files, tokenizer, ends)
    missing = {digest: file for file, digest in named if documents.open_shard(file, digest, cache) is None}
    if not missing:
        return 0
    largest_first = sorted(missing.items(), key=lambda item: (-item[1].stat().st_size, item[0]))
    total = sum(file.stat().st_size for file in missing.values())
    with (
        futures.ProcessPoolExecutor(
            min(processes, len(missing)), multiprocessing.get_context("spawn"), _start, (tokenizer, ends)
        ) as pool,
        tqdm.tqdm(total=total, unit="B", unit_scale=True, desc="tokens", disable=None) as bar,
    ):
        sizes = {pool.submit(_tokenise, file, digest, cache): file.stat().st_size for digest, file in largest_first}
        try:
            for done in futures.as_completed(sizes):
                done.result()
                bar.update(sizes[done])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return len(missing)


def _start(tokenizer: encode.Tokenizer, ends: encode.Edges) -> None:
    _worker.update(tokenizer=tokenizer, ends=ends)


def _tokenise(file: Path, digest: str, cache: Path) -> None:
    documents.tokenise(file, digest, _worker["tokenizer"], _worker["ends"], cache, quiet=True)


def texts(recipe: FinetuneConfig) -> list[str]:
    """All texts that a run of a recipe reads: `texts` or those of its `mixture`, and `eval_texts`."""
    trained = [text for part in recipe.mixture for text in part.texts] if recipe.mixed else recipe.texts
    return [*trained, *recipe.eval_texts]


def load_tokenizer(recipe: FinetuneConfig) -> Any:
    """The tokenizer of a recipe, without its model."""
    path = recipe.tokenizer or recipe.model
    tokenizer: Any = tiny.ByteTokenizer() if path == "tiny" else tokenizer_lib.load_tokenizer(path)
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer, which the texts need; add its tokenizer.json")
    return tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    with errors.one_line():
        recipe = parse(FinetuneConfig, "train.prepare", __doc__ or "", arguments)
        if not recipe.model or not (paths := texts(recipe)):
            raise ValueError("the recipe names no model, or no texts: give both --model and --texts")
        cache = stores.local_only(recipe.cache, "cache")
        tokenizer = load_tokenizer(recipe)
        made = prepare(paths, tokenizer, cache, os.cpu_count() or 1, end_of_text=recipe.end_of_text)
        found = documents.load_documents(paths, tokenizer, cache, end_of_text=recipe.end_of_text)
        print(f"{len(found)} documents, {found.lengths.sum()} tokens in {cache}; {made} files tokenised now")


if __name__ == "__main__":
    main()
