"""A memory trained in stages: `python -m train.curriculum configs/RECIPE.py [--field value ...]`.

A recipe file with `stages` beside its `config` names, for each stage, the fields in which it differs: short rows and
short windows first, where much of the loss is on what only the memory can know, then longer ones. Every stage is a
whole run (`train.finetune`) that goes on from the memory of the one before:

    OUT/stage-1/, OUT/stage-2/, ...    their checkpoints, metrics and results
    OUT/memory.safetensors             the last one's memory by itself, int8, with the text of --card
                                       (`allmem convert MODEL FOLDER --memory OUT/memory.safetensors`)

A stage may also name `average`, (NUMBER, SHARE): its memory is then averaged, weight by weight, with that of an earlier
stage, which gets that share. What a short stage teaches is then kept for the most part, at a smaller price.

The same command goes on wherever it was stopped.
"""

import dataclasses
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from allmem_jax.checkpoints import memory_file
from allmem_jax.model import lm
from allmem_jax.storage import jit_cache, stores
from train import errors, finetune
from train.loop import distributed, models
from train.recipe import FinetuneConfig, parse, recipe_fields

Stage = Mapping[str, Any]  # fields of FinetuneConfig, and `average`


@dataclasses.dataclass(frozen=True)
class Command(distributed.Processes, FinetuneConfig):
    """What all stages share; what a stage sets itself comes before it."""

    card: str = ""
    """A text file, the model card that the memory's file carries."""


def run(config: FinetuneConfig, stages: Sequence[Stage], card: str = "") -> str | os.PathLike[str]:
    """All stages, going on where an earlier call stopped. Returns the path of the memory's file.

    Args:
      config: what they share; `out` is the folder of all of them.
      stages: for each the fields that it sets.
      card: what is to be said of the memory.

    Raises:
      ValueError: a stage cannot work; nothing has been trained then.
    """
    recipes = make_recipes(config, stages)
    current = models.load_trained(recipes[0])
    origin = current.origin
    for number, recipe in enumerate(recipes):
        if number:
            before = learned(recipes, stages, number)
            current = current._replace(memory=models.weakened(recipe, current.config, before))
            origin = models.lineage(current)
        current = current._replace(config=recipe.student(current.config, remembers=True))
        finetune.run(recipe, current._replace(origin=origin))
    current = current._replace(memory=learned(recipes, stages, len(stages)))
    path = stores.join(config.out, "memory.safetensors")
    if distributed.main_process():
        memory_file.save(path, current.config, current.memory, card)
    distributed.wait_for_all("the memory is written")
    return path


def learned(recipes: Sequence[FinetuneConfig], stages: Sequence[Stage], number: int) -> lm.Params:
    """The memory after stage `number`, counted from 1, which has run."""
    memory = models.trained_memory(recipes[number - 1].out)
    if "average" not in stages[number - 1]:
        return memory
    earlier, share = stages[number - 1]["average"]
    return jax.tree.map(lambda old, new: share * old + (1 - share) * new, learned(recipes, stages, earlier), memory)


def make_recipes(config: FinetuneConfig, stages: Sequence[Stage]) -> list[FinetuneConfig]:
    """The recipe of each stage, checked; ValueError names the stage that cannot work."""
    if not stages:
        raise ValueError("there are no stages: the recipe file must define them, each a dict of fields")
    recipes = []
    for number, stage in enumerate(stages, 1):
        try:
            fields = {name: value for name, value in stage.items() if name != "average"}
            if unknown := sorted(set(fields) - {field.name for field in dataclasses.fields(FinetuneConfig)}):
                raise ValueError(f"no recipe has {' or '.join(unknown)}")
            if "average" in stage:
                earlier, share = stage["average"]
                if not (1 <= earlier < number and 0 < share < 1):
                    raise ValueError(
                        f"average={earlier, share} must be an earlier stage's number and a share between 0 and 1"
                    )
            out = os.fspath(stores.join(config.out, f"stage-{number}")) if config.out else ""
            recipes.append(dataclasses.replace(config, **fields, out=out, export=False))
            recipes[-1].check()
        except ValueError as error:
            raise ValueError(f"stage {number}: {error}") from None
    return recipes


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: a recipe with stages, then any field to set otherwise."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with errors.one_line():
        command = parse(Command, "train.curriculum", __doc__ or "", arguments)
        if not arguments or arguments[0].startswith("-"):
            raise ValueError("no recipe is named: give a file with `config` and `stages` before all options")
        stages = runpy.run_path(arguments[0]).get("stages", ())
        card = stores.read(command.card).decode() if command.card else ""
        jit_cache.keep()
        distributed.join(command)
        path = run(FinetuneConfig(**recipe_fields(command)), stages, card)
        if distributed.main_process():
            print(path)


if __name__ == "__main__":
    main()
