"""Recall in a converted model: one sentence somewhere in a novel, asked for after it has left the window.

    python -m train.needle score --model CONVERTED                       # how many words a model recalls
    python -m train.needle train --out out/needle                        # teach it, beside its writing-off control
    python -m train.needle train --steps 2000 --batch 32 --seq_length 512 --dtype bfloat16     # on one GPU, to the end

"The secret word of NAME is WORD. Remember it." stands at a random place of a book, and the row ends with "Question:
What is the secret word of NAME? Answer: The secret word of NAME is". A model is right when WORD is its most likely
next token of all. The loss is on that token alone, and the sentence is never within the window of the question.

    L tokens of a row    V vocabulary
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
import tyro

from allmem_jax import config as config_lib
from allmem_jax import convert, files, functional, model, prompts, stores
from train import books, errors, fetch, finetune
from train.recipe import FinetuneConfig

Mixer = Literal["memory", "write_off", "swa", "full"]


class Rows:
    """Random access to rows with a needle, each a function of the seed and its index alone.

    Args:
      documents: token ids of books.
      tokenizer: of the model.
      length: L.
      window: the sentence ends at least so many tokens before the row does.
      count: number of rows.
      seed: of everything drawn.
    """

    def __init__(
        self, documents: Sequence[np.ndarray], tokenizer: Any, length: int, *, window: int, count: int, seed: int
    ):
        self._tokenizer, self._length, self._window, self._count, self._seed = tokenizer, length, window, count, seed
        self._documents = [document for document in documents if len(document) > length]
        if not self._documents:
            raise ValueError(f"no book is longer than seq_length={length} tokens; give longer texts")
        self._names = {ids[0]: word for word in prompts.WORDS if len(ids := self._encode(f" {word}")) == 1}
        self.words = list(self._names)
        if len(self.words) < 2:
            raise ValueError("the tokenizer has fewer than two of the words as single tokens")

    def __len__(self) -> int:
        return self._count

    def content_hash(self) -> str:
        """sha256 of the books and of what decides on the rows."""
        digest = hashlib.sha256(repr((self._length, self._window, self._count, self._seed, self.words)).encode())
        for document in self._documents:
            digest.update(document.tobytes())
        return digest.hexdigest()

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """tokens, targets, segment_ids int32 [L] and mask bool [L], true at the last position only."""
        rng = np.random.Generator(np.random.Philox(key=[self._seed, index]))
        name, word = prompts.NAMES[rng.integers(len(prompts.NAMES))], self.words[rng.integers(len(self.words))]
        needle = self._encode(prompts.needle(name, self._names[word]))
        question = self._encode("\n" + prompts.plain_question(*prompts.needle_question(name)))
        filler = self._length - len(needle) - len(question)
        latest = self._length - self._window - len(needle)  # the sentence begins here at the latest
        if latest < 1:
            raise ValueError(
                f"seq_length={self._length} leaves no room for the sentence ({len(needle)} tokens) before the window "
                f"({self._window}): lengthen the rows"
            )
        book = self._documents[rng.integers(len(self._documents))]
        start = rng.integers(len(book) - filler + 1)
        text = book[start : start + filler].tolist()
        at = int(rng.integers(1, min(latest, filler) + 1))
        tokens = np.asarray([*text[:at], *needle, *text[at:], *question], np.int32)
        mask = np.arange(self._length) == self._length - 1
        targets = np.append(tokens[1:], np.int32(word))
        return {"tokens": tokens, "targets": targets, "segment_ids": np.ones_like(tokens), "mask": mask}


@dataclasses.dataclass(frozen=True)
class Score:
    """Counts how many needles a model recalls, on books that no demo trains on."""

    model: str = ""
    """A converted folder, a Hugging Face folder or a .gguf file; the fetched SmolLM2-135M-Instruct if not set."""
    mixers: tuple[Mixer, ...] = ("full", "swa", "memory", "write_off")
    """What to score: the original, windowed attention, the model's memory, and that with its writing off."""
    samples: int = 32
    """Rows."""
    seq_length: int = 256
    """Tokens of a row."""
    window: int = 48
    """Of the windowed mixers."""
    sinks: int = 4
    """Of the windowed mixers."""
    chunk: int = 32
    """Tokens between two updates of the memory."""
    seed: int = 1000
    """Of the rows."""
    batch: int = 8
    """Rows at a time."""


@dataclasses.dataclass(frozen=True)
class Train(FinetuneConfig):
    """Teaches recall: the memory and, with the same steps, its writing-off control; then scores both."""

    out: str = "out/needle"
    steps: int = 60
    batch: int = 8
    seq_length: int = 96
    window: tuple[int, int] = (48, 48)
    sinks: tuple[int, int] = (4, 4)
    chunk: tuple[int, ...] = (32,)
    positions: float = 1e-6
    warmup: int = 10
    log_every: int = 5
    export: bool = False
    controls: bool = True
    """Train the control too."""
    samples: int = 64
    """Rows of the final score."""


def documents(chosen: Sequence[books.Book], tokenizer: Any) -> list[np.ndarray]:
    """Token ids of books."""
    return [np.asarray(tokenizer.encode(book.text, add_special_tokens=False), np.int32) for book in chosen]


def variant(config: config_lib.ModelConfig, mixer: Mixer) -> config_lib.ModelConfig:
    """The config that scores as `mixer`; the memory is the one that the config has, or AllMem's."""
    if mixer in ("swa", "full"):
        return config.replace(mixer=mixer)
    config = config.replace(mixer=config.memory_mixer)
    return config if mixer == "memory" else config.replace(write=False)


def recall(
    config: config_lib.ModelConfig, params: model.Params, rows: Rows, samples: int, batch: int
) -> dict[str, float]:
    """Share of rows whose word is the most likely token of all, and among the words; mean loss in nats."""
    words = jnp.asarray(rows.words)

    @jax.jit
    def judge(params: model.Params, tokens: jax.Array, answers: jax.Array) -> tuple[jax.Array, ...]:
        hidden: Any = model.AllMemLM(config).apply({"params": params}, tokens, return_hidden=True)
        logits = functional.logits(hidden[:, -1], model.head_kernel(params, config))
        best = words[jnp.argmax(logits[:, words], axis=-1)]
        nats = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, answers[:, None], axis=-1)[:, 0]
        return jnp.argmax(logits, axis=-1) == answers, best == answers, nats

    found: list[tuple[np.ndarray, ...]] = []
    for first in tqdm.tqdm(range(0, samples, batch), desc=f"recall, {config.mixer}", disable=None, leave=False):
        part = [rows[first + i] for i in range(batch)]
        tokens, answers = np.stack([row["tokens"] for row in part]), np.stack([row["targets"][-1] for row in part])
        found.append(tuple(np.asarray(value) for value in judge(params, tokens, answers)))
    exact, among, nats = (np.concatenate(column)[:samples] for column in zip(*found, strict=True))
    return {"accuracy": float(exact.mean()), "among_words": float(among.mean()), "nats": float(nats.mean())}


def score(settings: Score) -> dict[str, dict[str, float]]:
    """Scores every mixer and prints the table."""
    path = settings.model or str(fetch.fetch("smollm2"))
    fields = dict(window=settings.window, sinks=settings.sinks, chunk=settings.chunk)
    loaded, params, tokenizer = convert.load_pretrained(path)
    config = loaded.replace(**fields)
    if "memory" not in params["layers"]:
        params = model.merge_params(params, model.init_memory(config))
    rows = Rows(documents(books.heldout_books(), tokenizer), tokenizer, settings.seq_length,
                window=settings.window, count=settings.samples, seed=settings.seed)  # fmt: skip
    results: dict[str, dict[str, float]] = {
        mixer: recall(variant(config, mixer), params, rows, settings.samples, settings.batch)
        for mixer in settings.mixers
    }
    _print(results, len(rows.words))
    return results


def train(settings: Train) -> dict[str, dict[str, float]]:
    """Trains, scores and writes OUT/recall.json."""
    settings = settings if settings.model else dataclasses.replace(settings, model=str(fetch.fetch("smollm2")))
    pretrained = finetune.load(settings)
    tokenizer = pretrained.tokenizer
    limits = dict(window=settings.window[1], seed=settings.seed)
    rows = Rows(documents(books.train_books(), tokenizer), tokenizer, settings.seq_length,
                count=settings.steps * settings.batch, **limits)  # fmt: skip
    held = Rows(documents(books.heldout_books(), tokenizer), tokenizer, settings.seq_length,
                count=settings.samples, window=settings.window[1], seed=settings.seed + 1000)  # fmt: skip
    results: dict[str, dict[str, float]] = {}
    for mixer in ("full", "swa"):
        results[mixer] = recall(
            variant(pretrained.config, mixer), pretrained.backbone, held, settings.samples, settings.batch
        )
    for write in (True, False) if settings.controls else (True,):
        name = "memory" if write else "write_off"
        part = dataclasses.replace(settings, write=write, out=f"{settings.out}/{name}")
        config = pretrained.config.replace(write=write)
        finetune.run(part, pretrained._replace(config=config), rows)
        params = model.merge_params(pretrained.backbone, finetune.trained_memory(part.out))
        results[name] = recall(config, params, held, settings.samples, settings.batch)
    files.write(stores.join(settings.out, "recall.json"), json.dumps(results, indent=2))
    _print(results, len(held.words))
    return results


def _print(results: dict[str, dict[str, float]], words: int) -> None:
    print(f"{'mixer':<10} {'accuracy':>9} {'among words':>12} {'nats':>7}    (chance among words {1 / words:.3f})")
    for name, row in results.items():
        print(f"{name:<10} {row['accuracy']:>9.3f} {row['among_words']:>12.3f} {row['nats']:>7.3f}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    commands: Any = Annotated[Score, tyro.conf.subcommand("score")] | Annotated[Train, tyro.conf.subcommand("train")]
    with errors.one_line(fetch.FetchError):
        chosen = tyro.cli(commands, prog="python -m train.needle", description=__doc__, args=arguments)
        if isinstance(chosen, Score):
            score(chosen)
        else:
            train(chosen)


if __name__ == "__main__":
    main()
