"""Every subcommand in-process on a tiny random model, what it records, and what it says when something is wrong."""

import functools
import inspect
import io
import json
import pathlib
import shlex
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_folder
from tiny_folder import WORDS, tiny_tokenizer

import allmem_jax
from allmem_jax import cli
from allmem_jax.checkpoints import layout
from allmem_jax.checkpoints import load as load_lib
from allmem_jax.decoding import chat, generation
from allmem_jax.evaluation import cost, divergence_report
from allmem_jax.model import lm
from allmem_jax.reporting import sections


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny_folder.write(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def converted(plain):
    """The same with a fresh memory, converted by the command."""
    path = plain.parent / "converted"
    sizes = ["--window", "24", "--sinks", "2", "--chunk", "8", "--d-mem", "8"]
    assert cli.main(["convert", str(plain), str(path), *sizes]) == 0
    return path


@pytest.fixture(scope="module")
def book(plain):
    path = plain.parent / "book.txt"
    path.write_text(WORDS)
    return path


def fails(capsys, *arguments):
    """The one line that a failing command prints; it must exit with 2."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1 and "Traceback" not in lines[0]
    return lines[0]


def test_what_was_read_once_is_asked_as_if_read_again(converted, book, tmp_path, capsys):
    state, halves = tmp_path / "book.state", [tmp_path / "first.txt", tmp_path / "second.txt"]
    text = book.read_text()
    for half, part in zip(halves, (text[:500], text[500:]), strict=True):
        half.write_text(part)
    assert cli.main(["read", str(converted), str(halves[0]), "--out", str(state)]) == 0
    assert cli.main(["read", str(converted), str(halves[1]), "--state", str(state), "--out", str(state)]) == 0
    capsys.readouterr()
    assert cli.main(["ask", str(converted), str(state), "the ship", "--plain", "--max-tokens", "5"]) == 0
    config, params, tokenizer = allmem_jax.load_pretrained(converted)
    tokens = [id for part in (text[:500], text[500:], "the ship") for id in tokenizer.encode(part)]
    (answer,) = generation.generate(params, config, [tokens], max_tokens=5)
    assert capsys.readouterr().out == "".join(chat.decode_stream(tokenizer, answer, before=tokens)) + "\n"


def test_convert_writes_a_model_with_a_memory(converted, plain):
    config, params, tokenizer = allmem_jax.load_pretrained(converted)
    assert (config.window, config.sinks, config.chunk, config.mixer) == (24, 2, 8, "allmem")
    assert not np.any(params["layers"]["memory"]["alpha"])
    before = allmem_jax.load_pretrained(plain)[1]
    backbone = lm.split_params(params)[0]
    jax.tree.map(np.testing.assert_array_equal, backbone, before)
    assert tokenizer.encode("the sea") == tiny_tokenizer().encode("the sea")


def test_convert_needs_no_options(plain, tmp_path, capsys):
    """Its window and chunk are larger than the text that rates are fitted on."""
    out = tmp_path / "out"
    assert cli.main(["convert", str(plain), str(out)]) == 0
    config, params, _ = allmem_jax.load_pretrained(out)
    assert (config.window, config.chunk, config.read_out, config.delay) == (4096, 2048, "difference", True)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    tokens = np.arange(40)[None] % config.vocab_size
    logits = [lm.AllMemLM(config.replace(mixer=mixer)).apply({"params": params}, tokens) for mixer in ("allmem", "swa")]
    np.testing.assert_array_equal(*logits)


def test_convert_refuses_to_write_over(plain, converted, capsys):
    before = {path.name: path.read_bytes() for path in converted.iterdir()}
    assert "--overwrite" in fails(capsys, "convert", plain, converted)
    assert before == {path.name: path.read_bytes() for path in converted.iterdir()}


def test_generate_is_the_greedy_continuation(converted, capsys):
    assert cli.main(["generate", str(converted), "the whale", "--max-tokens", "9"]) == 0
    out = capsys.readouterr().out
    config, params, tokenizer = allmem_jax.load_pretrained(converted)
    ids = generation.generate(
        params, config, [tokenizer.encode("the whale")], max_tokens=9, stop_tokens=chat.stop_tokens(tokenizer)
    )[0]
    assert out == "the whale" + tokenizer.decode(ids) + "\n"


def test_an_untrained_memory_changes_nothing(plain, converted, capsys):
    outs = []
    window = ["--window", "24", "--sinks", "2"]
    for arguments in ([str(converted)], [str(plain), "--mixer", "swa", *window]):
        assert cli.main(["generate", *arguments, "--max-tokens", "40", WORDS[:60]]) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] and len(outs[0]) > 61


def test_generate_reads_standard_input_and_full_attention_is_the_default(plain, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the ship"))
    sampling = ["--temperature", "1", "--top-k", "5", "--seed", "1"]
    assert cli.main(["generate", str(plain), "-", "--max-tokens", "3", *sampling]) == 0
    assert capsys.readouterr().out.startswith("the ship")


def test_chat_reads_each_turn_once(converted, capsys, monkeypatch):
    read = []
    prefill = generation.prefill
    monkeypatch.setattr(generation, "prefill", lambda *a, **k: read.append(len(a[2][0])) or prefill(*a, **k))
    monkeypatch.setattr(sys, "stdin", io.StringIO("the whale?\nthe ship?\n\nnot read\n"))
    assert cli.main(["chat", str(converted), "--max-tokens", "5", "--temperature", "0", "--system", "a sea"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2
    tokenizer = tiny_tokenizer()
    turn = len(tokenizer.encode("<|im_end|>\n<|im_start|>user\nthe ship?<|im_end|>\n<|im_start|>assistant\n"))
    assert len(read) == 2 and read[0] > 12 and turn - 2 <= read[1] <= turn + 15  # the answer's five, in other tokens


def test_a_chat_goes_on_from_what_was_read(converted, plain, book, tmp_path, capsys, monkeypatch):
    state, torn = tmp_path / "book.state", tmp_path / "torn.state"
    assert cli.main(["read", str(converted), str(book), "--out", str(state)]) == 0
    before = state.read_bytes()
    settings = ["--max-tokens", "5", "--temperature", "0"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("the whale?\nthe ship?\n"))
    capsys.readouterr()
    assert cli.main(["chat", str(converted), "--state", str(state), *settings]) == 0
    answers = capsys.readouterr().out
    config, params, tokenizer = allmem_jax.load_pretrained(converted)
    _, start = generation.prefill(params, config, [tokenizer.encode(book.read_text())])
    messages = []
    for question in ("the whale?", "the ship?"):
        messages.append({"role": "user", "content": question})
        made = chat.complete(params, config, tokenizer, chat.render(tokenizer, messages), max_tokens=5, state=start)
        messages.append({"role": "assistant", "content": "".join(made)})
    assert answers == "".join(f"{message['content']}\n" for message in messages[1::2])
    assert state.read_bytes() == before
    torn.write_bytes(before[:-9])
    assert "torn.state is not a saved state" in fails(capsys, "chat", converted, "--state", torn)
    other = fails(capsys, "chat", converted, "--state", state, "--window", "16")
    assert "book.state is the state of another model: window is 24 there and 16 here" in other
    assert "mixer is allmem there and full here" in fails(capsys, "chat", plain, "--state", state)
    assert "absent" in fails(capsys, "chat", converted, "--state", tmp_path / "absent")


def test_evaluate_writes_the_report(converted, book, tmp_path, capsys):
    arguments = ["--length", "64", "--sequences", "2", "--batch", "2", "--out", str(tmp_path / "out")]
    assert cli.main(["evaluate", str(converted), str(book), *arguments]) == 0
    assert "book.txt: KL beyond the window" in capsys.readouterr().out
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = saved["sections"][0]["data"]["texts"]["book.txt"]
    assert rows["window + sinks"]["kl_beyond"] > 1e-6 > rows["window + sinks"]["kl_inside"]
    assert rows["converted"]["kl_beyond"] == pytest.approx(rows["window + sinks"]["kl_beyond"], rel=1e-4)
    assert (tmp_path / "out" / "index.html").exists()


def test_info_of_presets_and_folders(plain, converted, capsys):
    assert cli.main(["info", "qwen3-0.6b", "--context", "131072"]) == 0
    out = capsys.readouterr().out
    assert "65.58" in out and "9.9%" in out and "14336.0" in out
    for path in (plain, converted):
        assert cli.main(["info", str(path)]) == 0
    assert "window 24, sinks 2, chunk 8" in capsys.readouterr().out


def test_errors_are_one_line_with_the_fix(plain, converted, book, tmp_path, capsys):
    assert "empty" in fails(capsys, "generate", converted, "")
    assert "no such file or folder" in fails(capsys, "generate", tmp_path / "absent", "hello")
    assert "qwen3-0.6b" in fails(capsys, "info", "qwen3-0.6")
    assert "no such file" in fails(capsys, "info", "./absent.gguf")
    assert "temperature=-1" in fails(capsys, "generate", converted, "hello", "--temperature", "-1")
    assert "max_tokens=0" in fails(capsys, "generate", converted, "hello", "--max-tokens", "0")
    assert "window=0" in fails(capsys, "generate", converted, "hello", "--window", "0")
    assert "absent.txt" in fails(capsys, "evaluate", converted, book, tmp_path / "absent.txt")
    assert "fewer or shorter" in fails(capsys, "evaluate", converted, book, "--length", "4096")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "not UTF-8" in fails(capsys, "evaluate", converted, tmp_path / "latin.txt")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\x03\x00")
    fails(capsys, "generate", tmp_path / "bad.gguf", "hello")


def test_a_memory_of_another_config_is_refused(converted, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(converted, other)
    fields = json.loads((other / layout.ALLMEM_CONFIG).read_text())
    (other / layout.ALLMEM_CONFIG).write_text(json.dumps(fields | {"d_mem": 16}))
    assert cli.main(["generate", str(other), "hello"]) == 2
    assert "wrong shape" in capsys.readouterr().err


def test_bad_arguments_and_help_leave_with_their_codes(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["generate"])
    assert error.value.code == 2
    with pytest.raises(SystemExit) as error:
        cli.main(["evaluate", "--help"])
    assert error.value.code == 0
    assert "Example: allmem evaluate" in " ".join(capsys.readouterr().out.split())


def test_help_needs_no_transformers():
    code = "import sys\nfrom allmem_jax import cli\ntry:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
    code += "print([m for m in ('transformers', 'matplotlib', 'torch') if m in sys.modules], file=sys.stderr)"
    root = pathlib.Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stderr.strip().endswith("[]") and "convert" in done.stdout


def test_info_is_of_the_models_own_mixer(plain, tmp_path, capsys):
    """A folder with a delta memory, and what `--window` changes of it."""
    config = load_lib.read_config(plain).replace(mixer="delta", window=24, chunk=8)
    shutil.copytree(plain, tmp_path / "delta")
    (tmp_path / "delta" / layout.ALLMEM_CONFIG).write_text(config.to_json())
    (tmp_path / "delta" / layout.ALLMEM_WEIGHTS).touch()
    assert cli.main(["info", str(tmp_path / "delta"), "--dtype", "float32", "--window", "48"]) == 0
    out = capsys.readouterr().out
    heads, rows, columns = config.linear_state_shape
    assert f"memory delta {heads} x {rows} x {columns}" in out and "window 48" in out and "chunk" not in out
    size = cost.state_bytes(config.replace(window=48), 131072)["delta"] / 2**20
    assert f"converted      {size:>12.1f}" in out


def test_a_window_that_nothing_uses_is_refused(plain, capsys):
    for size in ("--window", "--sinks", "--chunk"):
        line = fails(capsys, "generate", plain, "hello", size, "16")
        assert f"{size} 16" in line and "--mixer swa" in line
    assert "--mixer swa" in fails(capsys, "chat", plain, "--window", "16", "--mixer", "full")


def test_an_untrained_memory_is_said_to_be_one(plain, capsys):
    sizes = ["--window", "24", "--sinks", "2", "--chunk", "8"]
    assert cli.main(["generate", str(plain), "the", "--mixer", "allmem", "--max-tokens", "0", *sizes]) == 2
    assert "untrained" in capsys.readouterr().err


def test_stop_strings_end_what_is_shown(converted, capsys):
    def shown(*stops: str) -> str:
        assert cli.main(["generate", str(converted), "the whale", *stops, "--max-tokens", "9"]) == 0
        return capsys.readouterr().out

    whole = shown().removesuffix("\n")
    stop = whole[len("the whale") + 3 :][:2]
    assert shown("--stop", stop, "--stop", "@@") == shown("--stop", "@@", stop) == whole[: whole.index(stop, 9)] + "\n"
    assert "--stop is empty" in fails(capsys, "generate", converted, "x", "--stop", "")


def test_thinking_and_chat_templates(converted, tmp_path, capsys, monkeypatch):
    assert "add --chat" in fails(capsys, "generate", converted, "hi", "--thinking", "on")
    assert "no enable_thinking" in fails(capsys, "chat", converted, "--thinking", "off")
    seen = []

    def conversation(*_, **given):
        seen.append(given)
        raise ValueError("not made")

    with monkeypatch.context() as patch:
        patch.setattr(chat, "Conversation", conversation)
        fails(capsys, "generate", converted, "hi", "--chat", "--thinking", "off", "--stop", "a")
    assert [(given["stop"], given["thinking"]) for given in seen] == [(("a",), False)]
    other = tmp_path / "strict"
    shutil.copytree(converted, other)
    for template, message in (("{{ raise_exception('no system role') }}", "no system role"), ("{% for %}", "Syntax")):
        (other / "chat_template.jinja").write_text(template)
        assert message in fails(capsys, "chat", other, "--system", "Be brief.")
        assert message in fails(capsys, "generate", other, "hi", "--chat")


def test_a_chat_with_full_attention_has_all_the_room_it_needs(plain, capsys):
    assert cli.main(["generate", str(plain), "the whale", "--chat", "--mixer", "full", "--max-tokens", "3"]) == 0


@pytest.mark.parametrize(
    "arguments,ordered",
    [
        (["M", "-x is what?"], ["M", "--", "-x is what?"]),
        (["M", "-x=1"], ["M", "--", "-x=1"]),
        (["M", "--what is it?", "--seed", "1"], ["M", "--seed", "1", "--", "--what is it?"]),
        (["M", "x", "--stop", "- a"], ["M", "x", "--stop", "- a"]),
        (["M", "--stop=- a", "x"], ["M", "--stop=- a", "x"]),
        (["M", "--seed", "1", "--", "-x y"], ["M", "--seed", "1", "--", "-x y"]),
    ],
)
def test_a_prompt_that_begins_with_a_dash_is_a_prompt(arguments, ordered, monkeypatch):
    assert cli._prompt_last(["generate", *arguments]) == ["generate", *ordered]
    expected = next(word for word in arguments if "x" in word or "what" in word)
    assert parsed(monkeypatch, "generate", arguments)["prompt"] == expected


@pytest.mark.parametrize("prompt", ["-5 + 3 =", "--- begin ---", "-", "-1", "- a list", "-x=1 and y"])
def test_prompts_with_dashes_and_signs(prompt, monkeypatch):
    assert parsed(monkeypatch, "generate", ["M", prompt, "--seed", "2"])["prompt"] == prompt


def parsed(monkeypatch, name: str, arguments: list[str]) -> dict:
    """What a command is called with, by its parameters' names."""
    seen: list[dict] = []
    with monkeypatch.context() as patch:
        called = functools.wraps(getattr(cli, name))(lambda *args, **given: seen.append((args, given)))
        patch.setattr(cli, name, called)
        assert cli.main([name, *arguments]) == 0
    (args, given), signature = seen[0], inspect.signature(getattr(cli, name))
    bound = signature.bind(*args, **given)
    bound.apply_defaults()
    return dict(bound.arguments)


def test_recorded_commands_are_what_was_given(converted, book, tmp_path, monkeypatch, capsys):
    """Each, parsed again, is the same call; in a folder whose name a shell would split."""

    def measure(*_, command, **__):
        return sections.Section("distance", "Distance", command, data={"texts": {}})

    monkeypatch.setattr(divergence_report, "measure", measure)
    out = tmp_path / "of all"
    arguments = ["--length", "64", "--sequences", "1", "--batch", "2", "--window", "16", "--dtype", "bfloat16"]
    given = [str(converted), str(book), *arguments, "--mixer", "swa", "--out", str(out)]
    assert cli.main(["evaluate", *given]) == 0
    recorded = {section["command"] for section in json.loads((out / "report.json").read_text())["sections"]}
    assert [shlex.split(line)[:2] for line in recorded] == [["allmem", "evaluate"]]
    again = parsed(monkeypatch, "evaluate", shlex.split(recorded.pop())[2:])
    assert again == parsed(monkeypatch, "evaluate", given)

    given = ["qwen3-0.6b", str(converted), "--context", "5000", "--windows", "64", "128", "--out", str(out)]
    assert cli.main(["cost", *given]) == 0
    recorded = json.loads((out / "cost.json").read_text())["command"]
    assert parsed(monkeypatch, "cost", shlex.split(recorded)[2:]) == parsed(monkeypatch, "cost", given)
    capsys.readouterr()


def test_text_that_is_not_utf8_is_refused(converted, capsys, monkeypatch):
    lone = "caf\udce9"  # how Python keeps such a byte of an argument, or of standard input in the C locale
    assert "the prompt is not UTF-8" in fails(capsys, "generate", converted, lone)
    assert "the system message is not UTF-8" in fails(capsys, "chat", converted, "--system", lone)
    for command in (["generate", converted, "-"], ["chat", converted]):
        for errors in ("strict", "surrogateescape"):
            stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors=errors)
            monkeypatch.setattr(sys, "stdin", stdin)
            assert "not UTF-8" in fails(capsys, *command)


def test_an_ascii_terminal_gets_what_it_can_show(converted, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert cli.main(["generate", str(converted), "the \u9be8", "--max-tokens", "1"]) == 0
    sys.stdout.flush()
    assert raw.getvalue().startswith(b"the \\u9be8")


def test_a_reader_that_leaves_and_ctrl_c_end_quietly(converted, monkeypatch, capsys):
    for error, code in ((BrokenPipeError, 141), (KeyboardInterrupt, 130)):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", sys.stdout)  # which the command may drop
            patch.setattr(cli.terminal, "print_stream", lambda _, error=error: (_ for _ in ()).throw(error()))
            assert cli.main(["generate", str(converted), "the", "--max-tokens", "1"]) == code
        assert "error" not in capsys.readouterr().err


COMMANDS = {
    "convert": "{model} {out} --window 16 --sinks 2 --chunk 8",
    "generate": "{model} hello --max-tokens 2",
    "chat": "{model} --max-tokens 2",
    "evaluate": "{model} {book} --length 64 --sequences 1 --out {out}",
    "recall": "{model} {book} --samples 1 --out {out}",
    "report": "{model} {book} --out {out}",
    "info": "{model}",
    "cost": "{model} --out {out}",
    "longbench": "{model} {data} --out {out}",
}


def fails_cleanly(capsys, tmp_path, name, options="", **paths):
    """A command that must fail: one line, exit code 2, and nothing in the folder that is not its input."""
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / "trec.jsonl").write_text(json.dumps(LONGBENCH) + "\n")
    paths = {"out": tmp_path / "out", "data": tmp_path / "data"} | paths
    before = sorted(tmp_path.rglob("*"))
    line = fails(capsys, name, *shlex.split(f"{COMMANDS[name]} {options}".format(**paths)))
    assert sorted(tmp_path.rglob("*")) == before
    return line


LONGBENCH = {
    "input": "q",
    "context": "c",
    "answers": ["a"],
    "all_classes": ["a", "b"],
    "length": 1,
    "_id": "1",
    "dataset": "trec",
    "language": "en",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_what_is_no_model(name, plain, book, tmp_path, capsys):
    def damaged(contents: str) -> pathlib.Path:
        folder = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        shutil.copytree(plain, folder)
        (folder / "config.json").write_text(contents)
        return folder

    wrong = [tmp_path / "absent", book, tmp_path / "empty", damaged("{"), damaged("[]"), damaged('{"vocab_size": "x"}')]
    (tmp_path / "empty").mkdir()
    for model_path in wrong:
        fails_cleanly(capsys, tmp_path, name, model=model_path, book=book)


@pytest.mark.parametrize("name", [name for name, line in COMMANDS.items() if "{out}" in line])
def test_every_command_refuses_a_file_as_its_folder(name, converted, book, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        fails_cleanly(capsys, tmp_path, name, model=converted, book=book, out=out)


@pytest.mark.parametrize(
    "name,options",
    [
        *(("convert", f"--{name} 0") for name in ("window", "chunk", "d-mem", "n-mem")),
        *(("generate", words) for words in ("--window 0", "--top-p 2", "--top-k -1", "--temperature -1")),
        *(("generate", words) for words in ("--max-tokens 0", "--max-tokens -3", "--sinks -1")),
        *(("chat", words) for words in ("--window 0", "--top-p 0", "--max-tokens 0")),
        *(("evaluate", f"--{name} 0") for name in ("length", "sequences", "batch", "window")),
        *(("recall", words) for words in ("--samples 0", "--batch 0", "--lengths 0", "--tasks nothing")),
        *(("report", words) for words in ("--samples 0", "--length 0", "--sequences 0", "--include {book}")),
        *(("info", words) for words in ("--context 0", "--window 0", "--n-mem 0")),
        *(("cost", words) for words in ("--context 0", "--windows 0", "--windows")),
        *(("longbench", words) for words in ("--limit 0", "--batch 0", "--max-length 0", "--tasks nothing")),
    ],
)
def test_every_command_refuses_wrong_numbers(name, options, converted, book, tmp_path, capsys):
    fails_cleanly(capsys, tmp_path, name, options, model=converted, book=book)
