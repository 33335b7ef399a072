"""Distillation on what the student writes itself: `python -m train.on_policy RECIPE --prompts P [--field value ...]`.

Each round, the student with the memory so far answers its share of the prompts (`train.rollout`), and that memory
learns on these answers what the original gives there (`train.finetune`, packed, loss on the answers alone):

    OUT/round-1/answers.jsonl    what the student of the round before said; round 1 starts from the model's memory
    OUT/round-1/                 a whole run of the recipe on it: `steps` are those of a round
    OUT/allmem.safetensors, allmem_config.json, model/    of the last round

Every stage finds what it has done already, so the same command goes on wherever it was stopped. All rounds train with
the same programs: with JAX_COMPILATION_CACHE_DIR set, those after the first compile nothing anew.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax

from allmem_jax.model import lm, sharding
from allmem_jax.storage import jit_cache, stores
from train import errors, finetune
from train import rollout as rollout_lib
from train.data import prompts as prompts_lib
from train.loop import distributed, models
from train.recipe import FinetuneConfig, parse, recipe_fields


@dataclasses.dataclass(frozen=True)
class Command(distributed.Processes, FinetuneConfig):
    """A recipe for each round, whose texts are the answers."""

    prompts: str = ""
    """A .jsonl, .parquet or .arrayrecord file of {"prompt": TEXT} or {"messages": [...]} that ends with the user."""
    rounds: int = 4
    """How often to answer and learn. The prompts are dealt out to the rounds."""
    rollout: rollout_lib.Settings = rollout_lib.Settings()
    """How the answers are drawn."""


def run(
    config: FinetuneConfig,
    prompts: str,
    rounds: int,
    settings: rollout_lib.Settings,
) -> Path:
    """All rounds, going on where an earlier call stopped. Returns the output folder.

    Args:
      config: the recipe of a round; its texts, mixture, pack and response_only are set here.
      prompts: a file of them.
      rounds: at least 1, and no more than there are prompts.
      settings: of the answers.

    Raises:
      ValueError: a field or a prompt cannot work, before anything is generated.
    """
    settings.check()
    out = stores.local_only(config.out, "out")
    one = dataclasses.replace(config, texts=(), mixture=(), pack=True, response_only=True, export=False)
    one.check()
    one.check_mesh(tuple(sharding.make_mesh(*one.mesh).shape.values()))
    if config.objective != "distill":
        raise ValueError(f"objective={config.objective!r}: a student's own answers are for objective='distill'")
    current = models.load_trained(one)
    asked = prompts_lib.read(prompts, current.tokenizer, settings.max_prompt)
    if not 1 <= rounds <= len(asked):
        raise ValueError(f"rounds={rounds} must be from 1 to the number of prompts, {len(asked)}")
    for number in range(1, rounds + 1):
        folder = out / f"round-{number}"
        texts = _answers(settings, current, asked[number - 1 :: rounds], folder, config.seed + number)
        finetune.run(dataclasses.replace(one, texts=texts, out=str(folder), seed=config.seed + number), current)
        current = current._replace(memory=models.trained_memory(folder))
    models.export(config, current, current.memory)
    return out


def _answers(
    settings: rollout_lib.Settings,
    current: models.Pretrained,
    prompts: Sequence[prompts_lib.Prompt],
    folder: Path,
    seed: int,
) -> tuple[str, ...]:
    """The files of the round's answers, those of all processes, written as far as they are not there."""
    params = lm.merge_params(current.backbone, current.memory)
    stops = rollout_lib.stop_tokens(current.tokenizer, current.config)
    student = rollout_lib.Student(current.config, params, current.tokenizer, stops, models.lineage(current))
    share, path = (jax.process_index(), jax.process_count()), folder / "answers.jsonl"
    rollout_lib.run(settings, student, prompts, path, seed=seed, share=share)
    distributed.wait_for_all(f"{path} is written")
    return tuple(str(rollout_lib.part_name(path, index, share[1])) for index in range(share[1]))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: a recipe, then any field to set otherwise."""
    with errors.one_line():
        command = parse(Command, "train.on_policy", __doc__ or "", arguments)
        if not command.prompts:
            raise ValueError("prompts is not set: give --prompts FILE")
        jit_cache.keep()
        distributed.join(command)
        print(run(FinetuneConfig(**recipe_fields(command)), command.prompts, command.rounds, command.rollout))


if __name__ == "__main__":
    main()
