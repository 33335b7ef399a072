"""What a released memory can do, on texts that it was not trained on: what the demo leads with.

Facts are told in the midst of a text and asked for when they have left the window, of the converted model and of its
controls (`allmem_jax.evaluation.recall`). And a text is read once, the state after it is written to a file, and
questions about the text are answered from the file alone.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from allmem_jax.checkpoints import load as load_lib
from allmem_jax.checkpoints import tokenizer as tokenizer_lib
from allmem_jax.decoding import chat as text_lib
from allmem_jax.decoding import generation
from allmem_jax.evaluation import divergence, haystacks, questions, recall
from allmem_jax.model import config as config_lib
from allmem_jax.model import lm, state
from allmem_jax.reporting import sections
from train.loop import models

TOLD = (("Clara", "violin"), ("Walter", "copper"), ("Ruth", "castle"))  # names and what is said of them
ANSWER = 8  # tokens
NAME = "read_once"


def load(path: str, memory: str, window: int) -> models.Pretrained:
    """A pretrained model with a trained memory, see `load_pretrained`."""
    config, params, tokenizer = load_lib.load_pretrained(path, memory=memory, window=window)
    return models.Pretrained(config, *lm.split_params(params), tokenizer)


def ask(released: models.Pretrained, texts: Mapping[str, str], settings: recall.Settings) -> list[recall.Result]:
    """`recall.measure` of all that `recall.variants` has but writing off, which is windowed attention itself."""
    params = lm.merge_params(released.backbone, released.memory)
    _, variants = recall.variants(released.config, params)
    asked = [variant for variant in variants if variant.name != divergence.WRITE_OFF]
    return recall.measure(settings, released.backbone, released.tokenizer, texts, asked)


def read_once(released: models.Pretrained, text: str, length: int, path: pathlib.Path) -> dict[str, Any]:
    """Reads a text in which `TOLD` is said, and asks for it from the state that it wrote.

    Args:
      released: the model.
      text: at least `length` tokens of prose.
      length: tokens to read.
      path: of the state's file.

    Returns:
      "rows": question, what was told, and the answer of the original, of windowed attention and of the converted model;
      "tokens" read and "bytes" of the file.
    """
    tokens = _story(released.tokenizer, text, length)
    full = generation.full_as_windowed(released.config, len(tokens) + 64)
    entrants = {
        divergence.ORIGINAL: (full, released.backbone),
        divergence.SWA: (released.config.replace(mixer="swa"), released.backbone),
        divergence.CONVERTED: (released.config, lm.merge_params(released.backbone, released.memory)),
    }
    answers = {
        name: _answers(params, config, released.tokenizer, tokens, path) for name, (config, params) in entrants.items()
    }
    rows = [
        (questions.needle_question(name)[0], word, *(answers[entrant][number] for entrant in entrants))
        for number, (name, word) in enumerate(TOLD)
    ]
    return {"rows": rows, "variants": list(entrants), "tokens": len(tokens), "bytes": path.stat().st_size}


def _story(tokenizer: Any, text: str, length: int) -> list[int]:
    """Tokens of a text with the facts in its first third."""
    head = tokenizer_lib.encode_prompt(tokenizer, "")
    encode = lambda part: list(tokenizer.encode(part, add_special_tokens=False, verbose=False))  # noqa: E731
    told = [encode(questions.paragraph(questions.needle(name, word))) for name, word in TOLD]
    room = length - len(head) - sum(map(len, told))
    body = encode(text)[:room]
    if len(body) < room:
        raise ValueError(f"the text has {len(body)} tokens, and {room} are to be read: give a longer one")
    places = np.linspace(0.05, 0.33, len(told)) * room
    return [*head, *haystacks.weave(body, [*zip(places.astype(int).tolist(), told, strict=True)])[0]]


def _answers(
    params: lm.Params, config: config_lib.ModelConfig, tokenizer: Any, tokens: Sequence[int], path: pathlib.Path
) -> list[str]:
    """Reads tokens, keeps the state in a file, and answers each question from there."""
    params = lm.unstack(params, dtype=config.dtype)
    start = generation.with_room(config, None, 1, len(tokens))[1]
    _, after = generation.prefill(params, config, [tokens], state=start)
    state.save_state(path, config, after)
    found = []
    for name, _ in TOLD:
        question = "\n" + questions.plain_question(*questions.needle_question(name))
        ids = tokenizer.encode(question, add_special_tokens=False)
        (answer,) = generation.generate(
            params,
            config,
            [ids],
            max_tokens=ANSWER,
            state=state.load_state(path, config),
            piece=32,
            stop_tokens=text_lib.stop_tokens(tokenizer, config),
        )
        found.append(str(tokenizer.decode(answer, skip_special_tokens=True)).strip().split("\n")[0])
    return found


def describe(found: Mapping[str, Any], title: str, config: config_lib.ModelConfig) -> sections.Section:
    """The section that shows what `read_once` found."""
    text = (
        f"{found['tokens']:,} tokens of {title} were read once, with three facts told in their first third; attention "
        f"sees the last {config.window} tokens. The state after them, a file of {found['bytes'] / 2**20:.1f} MiB "
        "however much was read, was loaded anew for every question.",
    )
    header = ("question", "what the text told", *found["variants"])
    table = sections.Table("Answers", header, tuple(map(tuple, found["rows"])))
    return sections.Section(NAME, "A text read once, and asked later", "", text, (table,))
