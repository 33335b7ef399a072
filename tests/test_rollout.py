"""A toy answers prompts: the same file however often it is stopped, refusals before any work, rounds of learning."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pytest
from array_record.python import array_record_module
from pyarrow import parquet

from allmem_jax.decoding import chat, generation
from allmem_jax.model import lm
from allmem_jax.storage import stores
from tests import compiling
from train import finetune, on_policy, rollout
from train.data import documents
from train.data import prompts as prompts_lib
from train.loop import checkpoint, models, tiny
from train.recipe import FinetuneConfig

ROOT = pathlib.Path(__file__).parents[1]
SETTINGS = rollout.Settings(batch=4, max_tokens=12, temperature=8.0, max_prompt=100, piece=16)
RECORDS = [{"prompt": "abc " * (number * 7 % 11 + 1)} for number in range(9)]
RECORDS.append({"messages": [{"role": role, "content": "well"} for role in ("user", "assistant", "user")]})
QUICK = {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_disable_most_optimizations": True}
CONFIG = tiny.CONFIG.replace(window=32, sinks=3)  # as the recipe below has it: both share their programs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The prompts, and a compilation cache that the runs of this file share; compiling takes longest here."""
    folder = tmp_path_factory.mktemp("rollout")
    (folder / "prompts.jsonl").write_text("\n\n".join(map(json.dumps, RECORDS)))
    settings = QUICK | {"jax_compilation_cache_dir": str(folder / "compiled")}
    old = {name: getattr(jax.config, name, False) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield folder
    for name, value in old.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def student():
    memory = lm.init_memory(CONFIG)
    alpha = jnp.full_like(memory["layers"]["memory"]["alpha"], 0.3)
    memory = {"layers": {"memory": memory["layers"]["memory"] | {"alpha": alpha}}}
    tokenizer = tiny.ByteTokenizer()
    params = lm.merge_params(tiny.backbone(), memory)
    return rollout.Student(CONFIG, params, tokenizer, rollout.stop_tokens(tokenizer, CONFIG))


@pytest.fixture(scope="module")
def prompts(folder, student):
    return prompts_lib.read(str(folder / "prompts.jsonl"), student.tokenizer, 100)


@pytest.fixture(scope="module")
def answers(folder, student, prompts):
    """The file of a run that was never stopped, and how many programs it compiled."""
    before = generation.prefill_piece._cache_size(), generation.decode_step._cache_size()
    path = rollout.run(SETTINGS, student, prompts, folder / "answers.jsonl", seed=3, share=(0, 1))
    after = generation.prefill_piece._cache_size(), generation.decode_step._cache_size()
    return path, (after[0] - before[0], after[1] - before[1])


def test_every_prompt_is_answered_and_training_reads_the_answers(answers, prompts, folder):
    path, compiled = answers
    assert compiled == (1, 1)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    ids = [line["id"] for line in lines]
    assert sorted(ids) == list(range(10))
    batches = [ids[start : start + 4] for start in range(0, 10, 4)]
    assert batches == [sorted(batch) for batch in batches]
    lengths = [[len(prompts[index].tokens) for index in batch] for batch in batches]
    assert all(min(longer) >= max(shorter) for longer, shorter in zip(lengths, lengths[1:], strict=False))
    for line in lines:
        assert line["messages"][:-1] == prompts[line["id"]].messages and line["messages"][-1]["role"] == "assistant"
        assert line["finished"] or line["tokens"] == 12
    assert len({line["messages"][-1]["content"] for line in lines}) == 10
    read = documents.load_documents([path], tiny.ByteTokenizer(), folder / "tokens")
    for line, document in zip(lines, read, strict=True):
        spoken = [turn["content"] + "\n" for turn in line["messages"] if turn["role"] == "assistant"]
        assert document.response.sum() == len("".join(spoken).encode())
        assert document.tokens[: len(prompts[line["id"]].tokens)].tolist() == prompts[line["id"]].tokens


def test_what_a_kill_leaves_is_completed_to_the_same_file(answers, student, prompts, tmp_path):
    whole = answers[0].read_bytes()
    lines = whole.splitlines(keepends=True)
    ends = np.cumsum([len(line) for line in lines])
    for left in (0, ends[0] - 9, ends[1], ends[3], ends[5] + 20, ends[7] - 1, ends[8], ends[9]):
        path = tmp_path / "answers.jsonl"
        path.write_bytes(whole[:left])
        shutil.copy(f"{answers[0]}.settings.json", f"{path}.settings.json")
        rollout.run(SETTINGS, student, prompts, path, seed=3, share=(0, 1))
        assert path.read_bytes() == whole


def test_answers_in_a_store_go_on_too(answers, student, folder, store, monkeypatch):
    stores.write(f"{store}/prompts.jsonl", (folder / "prompts.jsonl").read_bytes())
    asked = prompts_lib.read(f"{store}/prompts.jsonl", student.tokenizer, 100)
    out, answer, batches = f"{store}/answers.jsonl", rollout._answer, []

    def stops(*given):
        assert len(batches) < 2, "stopped"
        batches.append(answer(*given))
        return batches[-1]

    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="stopped"):
        patch.setattr(rollout, "_answer", stops)
        rollout.run(SETTINGS, student, asked, out, seed=3, share=(0, 1))
    assert len(stores.read(out).splitlines()) == 8
    assert rollout.run(SETTINGS, student, asked, out, seed=3, share=(0, 1)) == out
    assert stores.read(out) == answers[0].read_bytes()
    with pytest.raises(ValueError, match="was begun with other settings: seed is 3 there and 4 here"):
        rollout.run(SETTINGS, student, asked, out, seed=4, share=(0, 1))


def test_processes_share_the_batches(answers, student, prompts, tmp_path):
    parts = [
        rollout.run(SETTINGS, student, prompts, tmp_path / "answers.jsonl", seed=3, share=(index, 2))
        for index in range(2)
    ]
    assert [path.name for path in parts] == ["answers.part-0-of-2.jsonl", "answers.part-1-of-2.jsonl"]
    lines = [path.read_text().splitlines() for path in parts]
    assert lines[0][:4] + lines[1] + lines[0][4:] == answers[0].read_text().splitlines()
    with pytest.raises(ValueError, match="10 prompts in batches of batch=4 are 3 batches for 4 processes"):
        rollout.run(SETTINGS, student, prompts, tmp_path / "answers.jsonl", seed=3, share=(0, 4))
    with pytest.raises(ValueError, match="processes is 2 there and 3 here"):
        rollout.run(SETTINGS, student, prompts, tmp_path / "answers.jsonl", seed=3, share=(0, 3))


def test_other_settings_are_refused(answers, student, prompts):
    def run(settings=SETTINGS, student=student, prompts=prompts, seed=3):
        rollout.run(settings, student, prompts, answers[0], seed=seed, share=(0, 1))

    before = answers[0].read_bytes()
    with pytest.raises(ValueError, match="temperature is 8.0 there and 1.0 here. Give those, or another --out"):
        run(dataclasses.replace(SETTINGS, temperature=1.0))
    with pytest.raises(ValueError, match=r"config.window is 32 there and 8 here; seed is 3 there and 4 here"):
        run(student=student._replace(config=student.config.replace(window=8)), seed=4)
    with pytest.raises(ValueError, match="other settings: params is"):
        run(student=student._replace(params=jax.tree.map(lambda x: x + 1, student.params)))
    with pytest.raises(ValueError, match="other settings: prompts is"):
        run(prompts=prompts[1:])
    with pytest.raises(ValueError, match=r"other settings: stops is \[10\] there and \[10, 11\] here"):
        run(student=student._replace(stops=[10, 11]))
    assert answers[0].read_bytes() == before


def test_finished_is_what_a_stop_token_ended(student, prompts, monkeypatch):
    """By either of two stop tokens, at once, as the last token that is allowed, or not at all."""
    drawn = np.array([[97, 10, 98], [11, 98, 98], [97, 98, 99], [97, 98, 11]]).T
    monkeypatch.setattr(generation, "prefill", lambda *_, **__: (None, None))
    monkeypatch.setattr(generation, "stream", lambda *_, **__: ((tokens, None, None, None) for tokens in drawn))
    settings = dataclasses.replace(SETTINGS, max_tokens=3)
    lines = rollout._answer(settings, student._replace(stops=[10, 11]), prompts[:4], None, 0)
    assert [line["finished"] for line in lines] == [True, True, False, True]
    assert [line["messages"][-1]["content"] for line in lines] == ["a", "", "abc", "ab"]
    assert [line["tokens"] for line in lines] == [1, 0, 3, 2]


def test_stop_tokens_are_those_of_tokenizer_and_model(monkeypatch):
    monkeypatch.setattr(chat, "stop_tokens", lambda *arguments: list(arguments))
    assert rollout.stop_tokens("tokenizer", CONFIG) == ["tokenizer", CONFIG]
    assert rollout.stop_tokens(tiny.ByteTokenizer(), CONFIG) == [ord("\n")]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"prompt": " "}', 'jsonl:2 has neither a non-empty "prompt"'),
        ('{"messages": []}', "jsonl:2 must end with a turn of the user that is not empty"),
        ('{"text": "a"}', 'jsonl:2 has neither a non-empty "prompt"'),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "must end with a turn of the user.* ends with"),
        ('{"messages": [{"role": "user"}]}', 'needs a "role" and a "content"'),
        ('{"messages": [{"content": "b"}, {"role": "user", "content": "a"}]}', 'needs a "role" and a "content"'),
        (json.dumps({"prompt": "a" * 200}), r"has \d+ tokens and max_prompt=100"),
        ('{"prompt": "a"', "jsonl:2 is not JSON"),
    ],
)
def test_prompts_that_cannot_be_answered(record, message, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "fine"}\n' + record)
    with pytest.raises(ValueError, match=message):
        prompts_lib.read(str(tmp_path / "prompts.jsonl"), tiny.ByteTokenizer(), 100)


def test_prompts_of_other_files(prompts, tmp_path):
    rows = [{"prompt": None, "messages": None} | record for record in RECORDS]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "prompts.parquet")
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "prompts.arrayrecord"), "group_size:1")
    for record in RECORDS:
        writer.write(json.dumps(record).encode())
    writer.close()
    for file in tmp_path.iterdir():
        assert prompts_lib.read(str(file), tiny.ByteTokenizer(), 100) == prompts
    (tmp_path / "prompts.txt").write_text("a")
    with pytest.raises(ValueError, match="must be a .jsonl, .json, .parquet, .arrayrecord file"):
        prompts_lib.read(str(tmp_path / "prompts.txt"), tiny.ByteTokenizer(), 100)


@pytest.mark.slow
def test_four_devices_give_the_same_answers(answers, folder, tmp_path):
    program = (
        "import sys; sys.path.insert(0, 'tests')\nimport pathlib\nimport test_rollout as t\n"
        "student = t.student.__wrapped__()\n"
        f"prompts = t.prompts_lib.read({str(folder / 'prompts.jsonl')!r}, student.tokenizer, 100)\n"
        f"t.rollout.run(t.SETTINGS, student, prompts, pathlib.Path({str(tmp_path / 'answers.jsonl')!r}), seed=3, "
        "share=(0, 1))\nprint(t.generation.decode_step._cache_size(), t.generation.prefill_piece._cache_size())"
    )
    env = {**os.environ, "XLA_FLAGS": compiling.on_devices(4), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=env, check=True, stdout=subprocess.PIPE, text=True, timeout=300
    )
    assert done.stdout.split() == ["1", "2"]  # the first piece's logits are not over the devices yet
    assert (tmp_path / "answers.jsonl").read_bytes() == answers[0].read_bytes()


@pytest.fixture(scope="module")
def recipe(folder):
    return FinetuneConfig(
        model="tiny",
        out=str(folder / "whole"),
        cache=str(folder / "cache"),
        steps=2,
        batch=2,
        seq_length=64,
        window=(12, 32),
        sinks=(0, 3),
        chunk=(8,),
        d_mem=8,
        positions=0.5,
        learning_rate=1e-2,
        warmup=1,
        checkpoint_every=1,
    )


@pytest.fixture(scope="module")
def hashed():
    """What the rounds of `whole` took a hash of."""
    return []


@pytest.fixture(scope="module")
def whole(recipe, folder, hashed):
    take = checkpoint.content_hash
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "content_hash", lambda tree: hashed.append(tree) or take(tree))
        return on_policy.run(recipe, str(folder / "prompts.jsonl"), 2, SETTINGS)


def test_each_round_learns_on_its_own_answers(whole, recipe, hashed):
    assert ["embed" in tree for tree in hashed] == [True, False, False]  # the backbone once, the memory each round
    said = [(whole / f"round-{number}/answers.jsonl").read_text().splitlines() for number in (1, 2)]
    assert [sorted(json.loads(line)["id"] for line in lines) for lines in said] == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]
    memories = [models.trained_memory(whole / name) for name in ("round-1", "round-2", "")]
    jax.tree.map(np.testing.assert_array_equal, memories[1], memories[2])
    alphas = [np.abs(memory["layers"]["memory"]["alpha"]).max() for memory in memories]
    assert 0 < alphas[0] < alphas[1]  # the second went on from the first
    settings = json.loads((whole / "round-2/answers.jsonl.settings.json").read_text())
    assert settings["seed"] == recipe.seed + 2 and settings["config"]["window"] == 32


def test_rounds_go_on_where_they_stopped(whole, recipe, folder, monkeypatch):
    config = dataclasses.replace(recipe, out=str(folder / "stopped"))
    answer, train = rollout._answer, finetune.run
    for name, module, work, number in (("_answer", rollout, answer, 3), ("run", finetune, train, 2)):
        calls = []

        def once_too_often(*arguments, calls=calls, work=work, number=number):
            calls.append(1)
            if len(calls) == number:
                raise KeyboardInterrupt
            return work(*arguments)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, once_too_often)
            on_policy.run(config, str(folder / "prompts.jsonl"), 2, SETTINGS)
        assert not (folder / "stopped/allmem.safetensors").exists()
    on_policy.run(config, str(folder / "prompts.jsonl"), 2, SETTINGS)
    got, want = models.trained_memory(folder / "stopped"), models.trained_memory(whole)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_trained_memory_answers_by_command(whole, folder, capsys, error_of):
    out = folder / "command.jsonl"
    arguments = ["--model", "tiny", "--memory", str(whole), "--prompts", str(folder / "prompts.jsonl")]
    small = ["--batch", "4", "--max-tokens", "12", "--temperature", "8", "--max-prompt", "100", "--piece", "16"]
    rollout.main([*arguments, "--out", str(out), *small])
    assert capsys.readouterr().out.strip() == str(out)
    assert out.read_text().count("\n") == 10
    other = error_of(rollout.main, [*arguments, "--out", str(out), *small, "--window", "8"])
    assert "config.window is 32 there and 8 here" in other
    assert "model is not set: give --model" in error_of(rollout.main, [])
    asked = ["--model", "tiny", "--prompts", "p", "--out", "o.jsonl"]
    assert "window: tiny has no memory" in error_of(rollout.main, [*asked, "--window", "8"])
    assert "memory='nowhere' has no allmem_config.json" in error_of(rollout.main, [*asked, "--memory", "nowhere"])


def test_rounds_that_cannot_be(recipe, folder, error_of):
    config = dataclasses.replace(recipe, out=str(folder / "never"))
    with pytest.raises(ValueError, match="rounds=11 must be from 1 to the number of prompts, 10"):
        on_policy.run(config, str(folder / "prompts.jsonl"), 11, SETTINGS)
    with pytest.raises(ValueError, match="objective='pretrain'"):
        on_policy.run(dataclasses.replace(config, objective="pretrain"), str(folder / "prompts.jsonl"), 1, SETTINGS)
    assert "prompts is not set" in error_of(on_policy.main, ["--model", "tiny", "--out", str(folder / "never")])
    assert not (folder / "never").exists()
