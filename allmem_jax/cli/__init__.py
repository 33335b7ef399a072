"""The `allmem` command, a file a command: help is quick, as what a command needs is imported when it runs.

convert    adds a memory to a model; generate and chat use one; push uploads one
read, ask  a text read once, and questions about it; serve does all of this over HTTP
evaluate, recall, longbench, report   measure a converted model
info, cost   what models cost, without their weights
lm_eval    the command of lm-evaluation-harness
options    what several commands are told alike; terminal is what a user reads and writes
"""

import io
import itertools
import sys
import warnings
from collections.abc import Sequence

import tyro

from allmem_jax.cli import terminal
from allmem_jax.cli.ask import ask
from allmem_jax.cli.chat import chat
from allmem_jax.cli.convert import convert
from allmem_jax.cli.cost import cost
from allmem_jax.cli.evaluate import evaluate
from allmem_jax.cli.generate import generate
from allmem_jax.cli.info import info
from allmem_jax.cli.lm_eval import lm_eval
from allmem_jax.cli.longbench import longbench
from allmem_jax.cli.push import push
from allmem_jax.cli.read import read
from allmem_jax.cli.recall import recall
from allmem_jax.cli.report import report
from allmem_jax.cli.serve import serve

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, 2 after an expected failure, or what the command says."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["lm-eval"]:
        return lm_eval(arguments[1:])
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII terminal gets all that it can show
    app = tyro.extras.SubcommandApp()
    writing, measuring = (convert, push, generate, chat, read, ask, serve), (evaluate, recall, report, longbench)
    for command in (*writing, *measuring, info, cost):
        app.command(command)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: terminal.say(f"warning: {message}")
        try:
            code = app.cli(
                prog="allmem",
                description="Language models with a constant-size state. `allmem lm-eval ARGUMENTS` is the command of "
                "lm-evaluation-harness, which knows them as --model allmem.",
                args=_prompt_last(arguments) if arguments[:1] == ["generate"] else arguments,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
        except BrokenPipeError:  # whoever read our output has left
            sys.stdout = None
            return 141
        except UnicodeDecodeError as error:
            terminal.say(f"error: standard input is not UTF-8 text: byte {error.start} cannot be decoded")
            return 2
        except (ValueError, OSError, NotImplementedError) as error:
            terminal.say(f"error: {error}")
            return 2
        except KeyboardInterrupt:
            return 130
    return code or 0


def _prompt_last(arguments: list[str]) -> list[str]:
    """Puts a prompt that begins with a dash last, after --, where it is no option: those have two dashes and no space.

    What follows an option stays where it is, as it may be its value.
    """
    for place, (before, word) in enumerate(itertools.pairwise(arguments), 1):
        option = word == "-h" or (word.startswith("--") and " " not in word.partition("=")[0])
        if word.startswith("-") and not option and not before.startswith("-") and "--" not in arguments:
            return [*arguments[:place], *arguments[place + 1 :], "--", word]
    return arguments
