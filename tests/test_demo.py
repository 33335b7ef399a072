"""The demo's chain and the comparison table on a tiny random model and made-up books."""

import dataclasses
import json
import os
import pathlib
import shlex

import numpy as np
import pytest
import tiny_folder
import tyro

import allmem_jax
from allmem_jax.checkpoints import memory_file
from allmem_jax.evaluation import divergence, recall
from allmem_jax.model import lm, state
from allmem_jax.reporting import kept, sections
from train import fetch, finetune
from train.data import books
from train.experiments import compare, demo, evidence, reading, recall_grid
from train.loop import models
from train.recipe import read_recipe

RECIPE = """
from train.recipe import FinetuneConfig
config = FinetuneConfig(model="set by the demo", out="set by the demo", cache={cache!r}, steps=3, batch=2,
    seq_length=64, window=(16, 16), sinks=(2, 2), chunk=(8,), d_mem=8, warmup=1, checkpoint_every=2)
"""


@pytest.fixture
def setting(tmp_path, monkeypatch):
    """Nothing is fetched: a tiny model and books of random words."""
    folder = tiny_folder.write(tmp_path / "tiny")
    words = np.random.default_rng(0).choice(tiny_folder.WORDS.split(" "), (4, 800))
    texts = [books.Book(f"Book {i}", ("prose", "poem")[i % 2], " ".join(row)) for i, row in enumerate(words)]
    monkeypatch.setattr(fetch, "fetch", lambda name: folder)
    monkeypatch.setattr(books, "train_books", lambda: texts[:2])
    monkeypatch.setattr(books, "heldout_books", lambda: texts[2:])
    (tmp_path / "recipe.py").write_text(RECIPE.format(cache=str(tmp_path / "cache")))
    loaded, _, _ = allmem_jax.load_pretrained(folder)
    config = loaded.replace(mixer="allmem", window=16, sinks=2, chunk=8, d_mem=8, read_out="difference", alpha_init=0.1)
    memory_file.save(tmp_path / "memory.safetensors", config, lm.init_memory(config))
    return demo.DemoConfig(
        recipe=str(tmp_path / "recipe.py"),
        out=tmp_path / "out",
        length=96,
        passage=40,
        memory=str(tmp_path / "memory.safetensors"),
        window=16,
        told=224,
        asked=2,
        read=300,
        sample_tokens=4,
    )


@pytest.mark.slow
def test_the_chain_and_its_second_run(setting, capsys, monkeypatch):
    monkeypatch.setattr(demo, "write_samples", lambda *_: [["Why?", "Because."], ["One", "two"]])  # see test_cli
    page = demo.run(setting)
    out = capsys.readouterr().out
    assert str(page) in out and "reused" not in out
    saved = json.loads((setting.out / "report.json").read_text())
    answers, read, distance, training, writing, _ = saved["sections"]
    asked = {result["variant"]: len(result["examples"]) for result in answers["data"]["results"]}
    assert asked == {divergence.ORIGINAL: 2, divergence.SWA: 2, recall.OTHER: 2, divergence.CONVERTED: 2}
    assert [row[1] for row in read["tables"][0]["rows"]] == [word for _, word in reading.TOLD]
    assert {len(row) for row in read["tables"][0]["rows"]} == {5}
    rows = distance["data"]["texts"]["Book 2 (prose)"]
    assert list(rows) == [divergence.ORIGINAL, divergence.SWA, demo.BEFORE, divergence.CONVERTED, divergence.WRITE_OFF]
    assert rows[demo.BEFORE]["kl_beyond"] == pytest.approx(rows[divergence.SWA]["kl_beyond"], rel=1e-4)
    assert rows[divergence.CONVERTED]["kl_beyond"] != pytest.approx(rows[divergence.SWA]["kl_beyond"], rel=1e-6)
    assert [len(steps) for steps in training["data"].values()] == [3] and len(writing["tables"][0]["rows"]) == 2
    assert "differen" in page.read_text() and "another document" in page.read_text()
    (folder,) = (setting.out / "runs").glob("*/memory/model")
    config, params, _ = allmem_jax.load_pretrained(folder)
    assert (config.window, config.chunk) == (16, 8) and np.any(params["layers"]["memory"]["alpha"])

    monkeypatch.setattr(models, "load", lambda recipe: pytest.fail("a complete run loads no model"))
    os.remove(page)
    demo.run(setting)
    assert capsys.readouterr().out.count("reused") == 6 and page.exists()

    monkeypatch.setattr(demo, "load_model", lambda recipe: None)
    monkeypatch.setattr(finetune, "run", lambda *_: pytest.fail("another question trains nothing"))
    asked = dataclasses.replace(setting, question="Who?")
    demo.run(asked)
    assert capsys.readouterr().out.count("reused") == 5
    written = json.loads((setting.out / "report.json").read_text())["sections"]
    assert {section["command"] for section in written[:5]} == {sections.program("train.experiments.demo", asked)}
    assert ["qk_scale", "l2"] in written[5]["tables"][0]["rows"]


def test_a_stage_depends_on_its_own_settings_alone(setting):
    recipe = read_recipe(setting.recipe)

    def changed(demo_changes, **recipe_changes):
        before = demo.dependencies(setting, recipe)
        after = demo.dependencies(
            dataclasses.replace(setting, **demo_changes), dataclasses.replace(recipe, **recipe_changes)
        )
        names = ("begun", "learnt", "judged", "asked", "remembered")
        keys = ([kept.key(depends) for depends in each] for each in (before, after))
        return {name for name, old, new in zip(names, *keys, strict=True) if old != new}

    assert changed(dict(out="elsewhere", recipe="other.py"), out="there", keep=9) == set()
    for change in (dict(question="Why?"), dict(passage=7), dict(sample_tokens=7)):
        assert changed(change) == {"asked"}
    assert changed(dict(window=17)) == {"remembered"}
    for change in (dict(length=97), dict(sequences=2)):
        assert changed(change) == {"judged"}
    for change in (dict(learning_rate=1.0), dict(steps=9), dict(window=(8, 16)), dict(positions=0.9)):
        assert changed({}, **change) == {"learnt"}
    for change in (dict(window=(16, 17)), dict(seed=1), dict(qk_scale="rms"), dict(dtype="bfloat16"), dict(chunk=(9,))):
        assert changed({}, **change) == {"begun", "learnt"}


@pytest.mark.parametrize(
    ("program", "settings", "positional"),
    [
        (
            "train.experiments.demo",
            demo.DemoConfig(question="Who's there?", out=pathlib.Path("a b"), sample_tokens=4),
            (),
        ),
        (
            "train.experiments.evidence",
            evidence.EvidenceConfig("r.py", mixers=("delta",), seeds=(3, 4), samples=0),
            ("recipe",),
        ),
        ("train.experiments.recall_grid", recall_grid.GridConfig(steps=10, entrants=("swa", "full")), ()),
    ],
)
def test_a_recorded_command_gives_the_same_settings(program, settings, positional):
    python, flag, module, *arguments = shlex.split(sections.program(program, settings, positional))
    assert (python, flag, module) == ("python", "-m", program)
    assert tyro.cli(type(settings), args=arguments) == settings
    assert sections.program(program, type(settings)(), positional) == f"python -m {program}"


def test_the_table_compiles_once_for_all_windows(setting, tmp_path):
    (tmp_path / "a.txt").write_text(tiny_folder.WORDS)
    given = compare.CompareConfig(texts=(tmp_path / "a.txt",), windows=(8, 8, 16), sinks=(0, 4, 4), length=48)
    divergence.hidden_states.clear_cache()
    results = compare.run(given)
    assert divergence.hidden_states._cache_size() == 2  # the original, and all of the windowed
    assert list(results["a.txt"]) == ["8/0", "8/4", "16/4"]
    config, params, tokenizer = allmem_jax.load_pretrained(tmp_path / "tiny", window=16, sinks=4)
    tokens = divergence.cut(tokenizer.encode(tiny_folder.WORDS), 48, 1)
    scores = divergence.compare(config, params, tokens, divergence.standard_variants(config, None))
    row = divergence.summarise(scores, 16)[divergence.SWA]
    assert results["a.txt"]["16/4"] == pytest.approx((row["kl_inside"], row["kl_beyond"]), rel=1e-4, abs=1e-7)
    assert "| 16/4 |" in compare.show(results)
    with pytest.raises(ValueError, match="pair up"):
        compare.run(dataclasses.replace(given, sinks=(0,)))
    with pytest.raises(ValueError, match="shorter than length=16"):
        compare.run(dataclasses.replace(given, length=16))


def test_the_training_texts_are_written_once(shakespeare_path, tmp_path, capsys):
    books.main([str(tmp_path / "texts")])
    assert capsys.readouterr().out == f"{tmp_path / 'texts'}\n"
    files = sorted((tmp_path / "texts").iterdir())
    assert [file.read_text() for file in files] == [book.text for book in books.train_books()]
    old = [file.stat().st_mtime_ns for file in files]
    files[3].write_text("damaged")
    books.write(tmp_path / "texts")
    assert files[3].read_text() == books.train_books()[3].text
    assert [file.stat().st_mtime_ns for file in files[4:]] == old[4:]


def test_a_text_is_asked_from_the_file_alone(tmp_path):
    """What the state's file holds is what reading the text and the question at once would give."""
    folder = tiny_folder.write(tmp_path / "tiny")
    loaded, _, _ = allmem_jax.load_pretrained(folder)
    config = loaded.replace(mixer="allmem", window=16, sinks=2, chunk=8, d_mem=8, read_out="difference", alpha_init=0.5)
    memory_file.save(tmp_path / "memory.safetensors", config, lm.init_memory(config))
    released = reading.load(str(folder), str(tmp_path / "memory.safetensors"), 16)
    text = " ".join(np.random.default_rng(0).choice(tiny_folder.WORDS.split(" "), 400))
    found = reading.read_once(released, text, 300, tmp_path / "state.safetensors")
    assert found["tokens"] == 300 and found["variants"] == [divergence.ORIGINAL, divergence.SWA, divergence.CONVERTED]
    kept = state.load_state(tmp_path / "state.safetensors", released.config)
    assert int(kept.position[0]) == 300 and found["bytes"] == (tmp_path / "state.safetensors").stat().st_size
    tokens = reading._story(released.tokenizer, text, 300)
    params = lm.merge_params(released.backbone, released.memory)
    again = reading._answers(params, released.config, released.tokenizer, tokens, tmp_path / "again.safetensors")
    assert again == [row[-1] for row in found["rows"]]
    with pytest.raises(ValueError, match="give a longer one"):
        reading.read_once(released, text, 4000, tmp_path / "state.safetensors")
