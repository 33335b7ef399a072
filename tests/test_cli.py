"""Every subcommand in-process on a tiny random model, what it says when something is wrong, and streamed text."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_folder
from tiny_folder import WORDS, tiny_tokenizer

from allmem_jax import cli, generation, model, text
from allmem_jax import convert as convert_lib


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


def test_convert_writes_a_model_with_a_memory(converted, plain):
    config, params, tokenizer = convert_lib.load_pretrained(converted)
    assert (config.window, config.sinks, config.chunk, config.mixer) == (24, 2, 8, "allmem")
    assert not np.any(params["layers"]["memory"]["alpha"])
    before = convert_lib.load_pretrained(plain)[1]
    backbone = model.split_params(params)[0]
    jax.tree.map(np.testing.assert_array_equal, backbone, before)
    assert tokenizer.encode("the sea") == tiny_tokenizer().encode("the sea")


def test_convert_refuses_to_write_over(plain, converted, capsys):
    before = {path.name: path.read_bytes() for path in converted.iterdir()}
    assert "--overwrite" in fails(capsys, "convert", plain, converted)
    assert before == {path.name: path.read_bytes() for path in converted.iterdir()}


def test_generate_is_the_greedy_continuation(converted, capsys):
    assert cli.main(["generate", str(converted), "the whale", "--max-tokens", "9"]) == 0
    out = capsys.readouterr().out
    config, params, tokenizer = convert_lib.load_pretrained(converted)
    ids = generation.generate(
        params, config, [tokenizer.encode("the whale")], max_tokens=9, stop_tokens=text.stop_tokens(tokenizer)
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
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("the ship"))
    sampling = ["--temperature", "1", "--top-k", "5", "--seed", "1"]
    assert cli.main(["generate", str(plain), "-", "--max-tokens", "3", *sampling]) == 0
    assert capsys.readouterr().out.startswith("the ship")


def test_chat_reads_each_turn_once(converted, capsys, monkeypatch):
    import io

    read = []
    prefill = generation.prefill
    monkeypatch.setattr(generation, "prefill", lambda *a, **k: read.append(len(a[2][0])) or prefill(*a, **k))
    monkeypatch.setattr(sys, "stdin", io.StringIO("the whale?\nthe ship?\n\nnot read\n"))
    assert cli.main(["chat", str(converted), "--max-tokens", "5", "--temperature", "0", "--system", "a sea"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2
    tokenizer = tiny_tokenizer()
    turn = len(tokenizer.encode("<|im_end|>\n<|im_start|>user\nthe ship?<|im_end|>\n<|im_start|>assistant\n"))
    assert len(read) == 2 and read[0] > 12 and turn - 2 <= read[1] <= turn


def test_a_conversation_equals_reading_all_its_tokens_at_once(converted, monkeypatch):
    config, params, tokenizer = convert_lib.load_pretrained(converted)
    read, stops = [], text.stop_tokens(tokenizer)
    prefill = generation.prefill
    monkeypatch.setattr(generation, "prefill", lambda *a, **k: read.append(list(a[2][0])) or prefill(*a, **k))
    talk = text.Conversation(params, config, tokenizer, max_tokens=6)
    answers = ["".join(talk.reply(message)) for message in ("the whale?", "and the sea?")]
    monkeypatch.undo()
    assert [m["content"] for m in talk.messages[1::2]] == answers
    first, second = read
    said = generation.generate(params, config, [first], max_tokens=6)[0]
    ends = [place for place, token in enumerate(said) if token in stops]
    said = said[: ends[0] + 1] if ends else said
    whole = generation.generate(params, config, [first + said + second], max_tokens=6, stop_tokens=stops)[0]
    assert answers[1] == tokenizer.decode(whole, skip_special_tokens=True)


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
    import shutil

    other = tmp_path / "other"
    shutil.copytree(converted, other)
    fields = json.loads((other / convert_lib.ALLMEM_CONFIG).read_text())
    (other / convert_lib.ALLMEM_CONFIG).write_text(json.dumps(fields | {"d_mem": 16}))
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


@pytest.mark.parametrize("sample", ["naïve café — 鯨 🐋!", " leading space", "the sea"])
def test_streamed_text_is_the_text(sample):
    tokenizer = tiny_tokenizer()
    pieces = list(text.decode_stream(tokenizer, iter(tokenizer.encode(sample))))
    assert "".join(pieces) == sample
    assert not any("\ufffd" in piece for piece in pieces)


def test_broken_characters_come_out_in_the_end():
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("鯨")[:1] + tokenizer.encode(" sea")
    assert "".join(text.decode_stream(tokenizer, ids)).endswith(" sea")
    assert "".join(text.decode_stream(tokenizer, ids[:1])) == "\ufffd"


def test_stop_tokens_end_turns_and_texts():
    tokenizer = tiny_tokenizer()
    assert tokenizer.convert_ids_to_tokens(text.stop_tokens(tokenizer)) == ["<|endoftext|>", "<|im_end|>"]
