"""What README.md and docs/ show is run as it is written: Python, commands, and the files and targets that they name.

MODEL and other words in capitals are replaced by tiny ones. Commands that only need a model are run, the others are
parsed by their own parser.
"""

import argparse
import functools
import importlib
import inspect
import io
import json
import pathlib
import re
import runpy
import shlex
import sys
import tomllib

import jax
import pytest
import tiny_folder
import tyro
from test_cli import LONGBENCH, parsed

from allmem_jax import cli
from allmem_jax.decoding import generation

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = "\n".join(page.read_text() for page in PAGES)
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
LINES = re.findall(r"^    ((?:allmem|python|pip|make) .*?)(?:  +#.*)?$", README, re.M)
INLINE = [" ".join(code.split()) for code in re.findall(r"`((?:allmem|python|make|pytest|[A-Z_]+=\S+) [^`]+)`", README)]
COMMANDS = sorted({*LINES, *INLINE})
RUN = ("chat", "convert", "cost", "generate", "info")  # what takes a second with a tiny model
# What a reader puts in the place of "...", by command.
REST = {"generate": ["the sea", "--max-tokens", "2"], "evaluate": ["FILE.txt"], "recall": ["FILE.txt"]}


def started(program: str) -> list[str]:
    """The commands whose first words are `program`."""
    return [command for command in COMMANDS if command.startswith(f"{program} ")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that is worked in, with a MODEL, a file and a data set."""
    tiny_folder.write(tmp_path / "MODEL")
    (tmp_path / "DATA").mkdir()
    (tmp_path / "DATA" / "trec.jsonl").write_text(json.dumps(LONGBENCH) + "\n")
    (tmp_path / "FILE.txt").write_text(tiny_folder.WORDS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_shows_python_and_commands():
    assert len(BLOCKS) >= 2 and len(started("allmem")) >= 9 and len(started("python -m train.finetune")) >= 2


def test_its_python_runs(folder, monkeypatch, capsys):
    """In order, in one process; the model file that a block names is a tiny model of that name."""
    continued, generate = [], generation.generate
    monkeypatch.setattr("allmem_jax.generate", lambda *a, **k: continued.append(generate(*a, **k)) or continued[-1])
    for name in set(re.findall(r'"([^"]*\.gguf)"', "".join(BLOCKS))):
        (folder / "MODEL").rename(folder / name)
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert continued and all(continued[0])
    assert len(capsys.readouterr().out) > 1


@pytest.mark.parametrize("command", [line for line in started("allmem") if "lm-eval" not in line])
def test_its_allmem_commands_run_or_parse(command, folder, monkeypatch, capsys):
    name, *arguments = shlex.split(command)[1:]
    place = arguments.index("...") if "..." in arguments else len(arguments)
    arguments[place : place + 1] = REST.get(name, []) if place < len(arguments) else []
    if name in RUN and arguments and not {"--memory", "--state"} & {*arguments}:  # which are not for a tiny model
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        assert cli.main([name, *arguments]) == 0
    elif arguments[-1:] and arguments[-1].startswith("--"):  # an option that is spoken of, without a value
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        assert arguments[-1] in capsys.readouterr().out
    else:
        assert parsed(monkeypatch, name, arguments)


class Parsed(BaseException):
    """Raised in the place of what a program does after it has read its arguments."""


@pytest.mark.parametrize("command", started("python"))
def test_its_programs_take_their_arguments(command, monkeypatch):
    """The program's own parser, from a checkout."""
    _, _, module, *arguments = shlex.split(command.replace("RECIPE", "smoke"))

    def after(parse):
        def stop(target, *args, **options):
            if inspect.isfunction(target):  # which tyro would call
                target = functools.wraps(target)(lambda *given, **named: given or named)
            raise Parsed(parse(target, *args, **options))

        return stop

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.setattr(tyro, "cli", after(tyro.cli))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", after(argparse.ArgumentParser.parse_args))
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(Parsed):
        runpy.run_module(module, run_name="__main__")


def test_its_extras_targets_and_tests_are_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for command in started("pip install"):
        for extras in re.findall(r"\.\[([\w,]+)\]", command):
            assert set(extras.split(",")) <= set(project["optional-dependencies"]), command
    for command in started("make"):
        assert command.split()[1] in targets, command
    for path in re.findall(r"\b(?:tests|configs|train|allmem_jax|pallas_kernels)/[\w/]+\.py", README):
        assert "RECIPE" in path or (ROOT / path).is_file(), path


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 600


def test_recall_is_the_same_wherever_it_is_told():
    """In the results, in the front page's picture, whose bars are as long, and on the released memory's card."""
    share = r"([01]\.\d\d)\*{0,2} \((\d+)"
    page = (ROOT / "docs/results.md").read_text()
    table = page[page.index("| tokens of prompt") :].split("\n\n")[0]
    told = [re.findall(share, line) for line in table.splitlines()[2:]]
    bars = (ROOT / "docs/images/recall.svg").read_text().split('class="head"')[1:]
    assert len(told) == 3 and [re.findall(share, part) for part in bars] == told
    widths = [int(width) for part in bars for width in re.findall(r'width="(\d+)"', part)]
    assert widths == [max(1, round(340 * float(found))) for row in told for found, _ in row]
    card = (ROOT / "configs/smollm2_memory.md").read_text()
    block = card[card.index("tokens of prompt") :].split("\n\n")[0]
    assert sorted(re.findall(share, block)) == sorted(pair for row in told for pair in row)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).is_file(), link


def test_pages_are_in_the_map():
    """And the interfaces' pages show all public names."""
    listed = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert page.relative_to(ROOT / "docs").as_posix() in listed
    for package in ("allmem_jax", "pallas_kernels"):
        shown = re.findall(rf"^::: {package}\.(\w+)$", (ROOT / "docs" / "api" / f"{package}.md").read_text(), re.M)
        assert sorted(shown) == sorted(importlib.import_module(package).__all__)
