"""The report: one page that fetches nothing, and `allmem report`, which resumes, survives failures and includes."""

import dataclasses
import json
import re
import shlex
from html import unescape

import pytest
import tiny_folder
from test_cli import parsed

from allmem_jax import cli
from allmem_jax.evaluation import cost, divergence_report, full_report, latency, longbench, recall_report
from allmem_jax.reporting import page as page_lib
from allmem_jax.reporting import sections

PLOT = sections.Plot("a $ b", "tokens", "nats", {"x_1 & y": ((1.0, 2.0), (3.0, None)), "z": ((1.0, 2.0), (0.5, 0.1))})
SECTION = sections.Section(
    "one",
    "First <b>",
    "allmem <x> & y",
    ("Found <i>it</i>.", "And more."),
    (sections.Table("cap <", ("name", "value", "said"), (("<script>", "1.5 ± 0.2", "line\nline"), ("b", "-", "2 >"))),),
    (PLOT,),
    {"raw": [1, None]},
)
PARTS = full_report.PARTS
QUICK = ("--skip", "distance", "answers")  # those that compile the model


class Outside(RuntimeError):
    pass


def outside(html):
    """What a page would fetch: attributes and style rules that name anything but itself or its own data."""
    named = re.findall(r"""(?:src|href|srcset|data|action)\s*=\s*["']([^"']*)""", html)
    return [url for url in named if not url.startswith(("#", "data:image/png;base64,"))] + re.findall(
        r"@import|url\(|<link|<script|<iframe|<object", html
    )


@pytest.mark.core
def test_a_page_is_one_escaped_file(tmp_path):
    two = dataclasses.replace(SECTION, name="two", title="Second", plots=(), text=())
    page = page_lib.write(tmp_path, page_lib.Report("A & B", (SECTION, two), ("A <note>.",), failed=("two",)))
    html = page.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "one.png", "report.json"]
    assert not outside(html) and html.count("data:image/png;base64,") == 1
    for text in (
        "A &amp; B",
        "A &lt;note&gt;.",
        "First &lt;b&gt;",
        "Found &lt;i&gt;it",
        "&lt;script&gt;",
        "cap &lt;",
        "allmem &lt;x&gt; &amp; y",
    ):
        assert text in html
    assert html.index('href="#one"') < html.index('href="#two"') < html.index('id="one"') < html.index('id="two"')
    assert html.count('class="failed"') == 2 and "Content-Security-Policy" in html
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["sections"][0]["data"] == {"raw": [1, None]} and saved["failed"] == ["two"]


@pytest.mark.core
def test_columns_of_words_are_set_as_words():
    page = page_lib.page(page_lib.Report("t", (dataclasses.replace(SECTION, plots=()),)), {})
    assert page.count('class="words"') == 2 * 3 and "<td>1.5 ± 0.2</td>" in page
    assert '<td class="words">line\nline</td>' in page


@pytest.mark.core
def test_pictures_and_their_absence():
    logarithmic = dataclasses.replace(PLOT, log_x=True, log_y=True, mark_x=1.5)
    picture = page_lib.draw(dataclasses.replace(SECTION, plots=(PLOT, logarithmic, PLOT)))
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 10_000
    with pytest.raises(ValueError, match="'one' has no plots"):
        page_lib.draw(dataclasses.replace(SECTION, plots=()))


@pytest.mark.core
@pytest.mark.parametrize("name", ["", "../out", "a b", ".hidden", "a/b"])
def test_names_that_are_no_file_names(name, tmp_path):
    with pytest.raises(ValueError, match="names a file"):
        page_lib.write(tmp_path, page_lib.Report("t", (dataclasses.replace(SECTION, name=name),)))
    with pytest.raises(ValueError, match="two sections are named 'one'"):
        page_lib.write(tmp_path, page_lib.Report("t", (SECTION, SECTION)))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    plain = tiny_folder.write(tmp_path_factory.mktemp("models") / "plain")
    path = plain.parent / "converted <1>"
    sizes = ["--window", "24", "--sinks", "2", "--chunk", "8", "--d-mem", "8"]
    assert cli.main(["convert", str(plain), str(path), *sizes]) == 0
    (plain.parent / "book.txt").write_text(tiny_folder.WORDS)
    return path


@pytest.fixture
def calls(monkeypatch):
    """What was measured, by name. All but the distance is made up here, and has its own tests."""
    called = []

    def counted(name, function):
        return lambda *args, **kwargs: called.append(name) or function(*args, **kwargs)

    monkeypatch.setattr(divergence_report, "measure", counted("distance", divergence_report.measure))
    for name, module in (("answers", recall_report), ("cost", cost), ("latency", latency)):
        monkeypatch.setattr(module, "section", counted(name, lambda *_, **__: SECTION))
    return called


def run(folder, out, *more):
    arguments = [str(folder), str(folder.parent / "book.txt"), "--out", str(out), "--length", "64", *map(str, more)]
    return cli.main(["report", *arguments, "--sequences", "1"])


def names(out):
    return [section["name"] for section in json.loads((out / "report.json").read_text())["sections"]]


@pytest.mark.slow
def test_every_part_is_shown_and_a_second_run_measures_nothing(folder, tmp_path, calls, capsys, monkeypatch):
    assert run(folder, tmp_path) == 0
    assert calls == list(PARTS) and names(tmp_path) == ["summary", *PARTS]
    page = (tmp_path / "index.html").read_text()
    assert not outside(page) and "converted &lt;1&gt;" in page
    saved = json.loads((tmp_path / "report.json").read_text())
    for section in saved["sections"][1:]:
        assert section["command"] and section["command"] in unescape(page)
        assert [section["title"], section["text"][0]] in saved["sections"][0]["tables"][0]["rows"]
    monkeypatch.setattr(cli.options, "load_model", lambda *_: pytest.fail("a complete report loads no model"))
    assert run(folder, tmp_path, "--skip", "cost") == 0
    assert len(calls) == 4 and names(tmp_path) == ["summary", "distance", "answers", "latency"]
    assert capsys.readouterr().err.count("reused from") == 3


def test_what_a_changed_setting_decides_is_measured_again(folder, tmp_path, calls):
    assert run(folder, tmp_path, *QUICK) == 0
    config = folder / "allmem_config.json"
    config.write_text(config.read_text() + "\n")
    assert run(folder, tmp_path, *QUICK) == 0
    assert calls == ["cost", "latency"] * 2


def test_a_part_that_fails_is_shown_and_the_rest_goes_on(folder, tmp_path, calls, capsys, monkeypatch):
    def broken(*_, **__):
        raise Outside("no <room>\nleft")

    monkeypatch.setattr(cost, "section", broken)
    assert run(folder, tmp_path, *QUICK) == 1
    assert names(tmp_path) == ["summary", "cost", "latency"] and calls == ["latency"]
    html = (tmp_path / "index.html").read_text()
    assert "This part failed: Outside: no &lt;room&gt; left" in html and 'class="failed"' in html
    assert len([line for line in capsys.readouterr().err.splitlines() if "cost failed: Outside" in line]) == 1
    monkeypatch.undo()
    monkeypatch.setattr(latency, "section", lambda *_: pytest.fail("is there already"))
    assert run(folder, tmp_path, *QUICK) == 0


def test_an_interrupt_loses_nothing_that_is_finished(folder, tmp_path, calls, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(latency, "section", interrupted)
        assert run(folder, tmp_path, *QUICK) == 130
    assert run(folder, tmp_path, *QUICK) == 0
    assert calls == ["cost", "latency"]


def test_a_report_records_how_it_was_made(folder, tmp_path, calls, monkeypatch):
    """The whole page's command, parsed again, is the same call; those of its parts are commands with the same sizes."""
    more = ["--skip", *PARTS, "--dtype", "bfloat16", "--samples", "3", "--prompt-length", "48"]
    assert run(folder, tmp_path, *more) == 0
    recorded = json.loads((tmp_path / "report.json").read_text())["sections"][0]["command"]
    given = [str(folder), str(folder.parent / "book.txt"), "--out", str(tmp_path), "--length", "64", *more]
    expected = parsed(monkeypatch, "report", [*given, "--sequences", "1"])
    assert parsed(monkeypatch, "report", shlex.split(recorded)[2:]) == expected

    settings = full_report.Settings(folder, (folder.parent / "book.txt",), length=64, sequences=1, dtype="bfloat16")
    config = full_report.read_config(folder)
    parts = full_report.parts(full_report.Given(settings, folder, config, {}, lambda: pytest.fail("nothing is loaded")))
    made = {part.name: parsed(monkeypatch, *split_command(part.command)) for part in parts}
    assert made["distance"]["mixing"].dtype == made["answers"]["mixing"].dtype == "bfloat16"
    assert (made["distance"]["length"], made["distance"]["sequences"]) == (64, 1)
    assert made["cost"]["windows"] == (24,) and made["latency"]["measure"]


def split_command(command: str) -> tuple[str, list[str]]:
    """The name of an `allmem` command and its arguments."""
    _, name, *arguments = shlex.split(command)
    return name, arguments


def test_sections_of_other_programs_are_included(folder, tmp_path, calls):
    sections.save(tmp_path / "grid.json", dataclasses.replace(SECTION, name="grid", title="Recall"))
    assert run(folder, tmp_path / "out", "--skip", *PARTS, "--include", tmp_path / "grid.json") == 0
    assert names(tmp_path / "out") == ["summary", "grid"] and not calls
    assert "Recall" in (tmp_path / "out" / "index.html").read_text()


def test_errors_come_before_anything_runs(folder, tmp_path, calls, capsys):
    (tmp_path / "bad.json").write_text("[1, 2]")
    sections.save(tmp_path / "cost.json", dataclasses.replace(SECTION, name="cost"))
    sections.save(tmp_path / "up.json", dataclasses.replace(SECTION, name="../up"))
    (tmp_path / "file").write_text("")

    def fails(*arguments, folder=folder):
        assert run(folder, tmp_path / "out", *arguments) == 2
        return capsys.readouterr().err

    assert "bad.json is not a section of a report" in fails("--include", tmp_path / "bad.json")
    assert "absent.json" in fails("--include", tmp_path / "absent.json")
    assert "two sections are named 'cost'" in fails("--include", tmp_path / "cost.json")
    assert "'../up'" in fails("--include", tmp_path / "up.json")
    assert "allmem convert" in fails(folder=folder.parent / "plain")
    assert run(folder, tmp_path / "file") == 2
    assert not calls and not (tmp_path / "out").exists()


def test_longbench_is_scored_where_there_are_files(folder, tmp_path, calls, monkeypatch):
    line = {
        "context": tiny_folder.WORDS[:200],
        "input": "who?",
        "answers": ["the whale"],
        "length": 40,
        "_id": "1",
        "dataset": "hotpotqa",
        "language": "en",
        "all_classes": None,
    }
    data = tmp_path / "data"
    data.mkdir()
    (data / "hotpotqa.jsonl").write_text(json.dumps(line) + "\n")
    ran = []

    def fake(plan, params, tokenizer, variants, out, progress):
        ran.append((plan.counts, [variant.name for variant in variants], out.name))

    monkeypatch.setattr(longbench, "run", fake)
    monkeypatch.setattr(longbench, "section", lambda _, command: dataclasses.replace(SECTION, command=command))
    asked = ["--skip", *PARTS, "--longbench", data, "--samples", "1"]
    for _ in range(2):
        assert run(folder, tmp_path / "out", *asked) == 0
        assert names(tmp_path / "out") == ["summary", "longbench"] and not calls
    assert ran == [((1,), ["full", "swa", "allmem", "write_off"], "longbench")]
    assert "allmem longbench" in (tmp_path / "out" / "index.html").read_text()
    assert run(folder, tmp_path / "other", "--longbench", tmp_path / "absent") == 2 and not calls


def test_what_does_not_fit_the_window_is_left_out(folder, tmp_path, calls, monkeypatch):
    asked = []
    monkeypatch.setattr(recall_report, "section", lambda settings, *_, **__: asked.append(settings) or SECTION)
    skip = [name for name in PARTS if name != "answers"]
    assert run(folder, tmp_path, "--skip", *skip, "--prompt-length", "200", "--samples", "3") == 0
    (settings,) = asked
    assert (settings.tasks, settings.lengths, settings.samples) == (("needle",), (200,), 3)
    saved = json.loads((tmp_path / "report.json").read_text())["sections"][1]
    assert [text for text in saved["text"] if "Left out: length=24 leaves no room for 'short_needle'" in text]
    assert run(folder, tmp_path, "--skip", *skip, "--prompt-length", "20") == 1
    assert "no question fits" in (tmp_path / "index.html").read_text()
