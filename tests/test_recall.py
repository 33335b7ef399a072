"""The recall tasks: what the rows hold, and that the answer lies where only a memory can reach."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from allmem_jax.model import lm
from allmem_jax.reporting import sections
from train.experiments import recall, recall_grid

TINY = recall.TinyModel(d_model=16, d_mem=8)
MQAR = recall.RecallConfig(pairs=(2, 4), gap=(20, 24), batch=32, model=TINY)
PASSKEY = dataclasses.replace(recall.TASKS["passkey"], batch=8, model=TINY)


@pytest.mark.parametrize("config", [MQAR, PASSKEY], ids=["mqar", "passkey"])
def test_each_pair_is_asked_once_after_the_gap(config):
    drawn = recall.training_batches(config, 0)
    assert drawn.tokens.shape == (recall.STRIDE, config.batch, recall.length(config, config.gap[1]))
    size, first_noise = 1 + config.digits, config.keys + config.values
    counts, gaps, begins = set(), set(), set()
    for row, places, answers, asked in zip(*(np.concatenate(part) for part in drawn), strict=True):
        pairs = asked.sum()
        (spots,) = np.flatnonzero(row < first_noise)[None]
        begin, question = spots[0], places[0, 0]
        told = row[begin : begin + pairs * size].reshape(pairs, size)
        said = np.concatenate([row[places[:pairs]], answers[:pairs, -1:]], axis=1)  # keys and digits
        np.testing.assert_array_equal(said[:, 1:], answers[:pairs])
        assert sorted(told.tolist()) == sorted(said.tolist())
        assert len(set(told[:, 0])) == pairs
        assert len(spots) == pairs * (size + config.digits)  # all else is noise
        assert begin >= recall.lead_in(config) >= config.model.sinks
        counts.add(int(pairs))
        gaps.add(int(question - begin - pairs * size))
        begins.add(int(begin - recall.lead_in(config)))
    assert counts == set(config.pairs)
    assert config.gap[0] <= min(gaps) <= max(gaps) <= config.gap[1]
    assert begins == set(range(config.model.chunk))
    fixed = recall.training_batches(dataclasses.replace(config, offset=3), 0).tokens
    assert ((fixed < first_noise).argmax(axis=-1) == recall.lead_in(config) + 3).all()


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "remembers"), [("swa", False), ("write_off", False), ("allmem", True)])
def test_only_a_memory_can_know_the_answer(variant, remembers):
    config = dataclasses.replace(MQAR, gap=(15, 15))
    tiny = recall.model_config(config, variant)
    drawn = recall.sequences(config, np.random.default_rng(0), np.full(4, 4), np.full(4, 15))
    first = drawn.places.min(axis=(1, 2))  # of the questions
    told = (np.arange(drawn.tokens.shape[1]) < first[:, None]) & (drawn.tokens >= config.keys)
    told &= drawn.tokens < config.keys + config.values
    assert told.sum() == 16
    others = np.where(told, config.keys + (drawn.tokens - config.keys + 1) % config.values, drawn.tokens)
    params = lm.init_params(tiny)
    apply = jax.jit(lambda tokens: lm.AllMemLM(tiny).apply({"params": params}, tokens))
    one, two = (np.asarray(apply(tokens))[np.arange(4), first] for tokens in (drawn.tokens, others))
    assert (not np.array_equal(one, two)) == remembers


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="keys=3"):
        recall.RecallConfig(keys=3)
    with pytest.raises(ValueError, match="reach of n_layers"):
        recall.RecallConfig(gap=(14, 20))
    with pytest.raises(ValueError, match="fewest and the most"):
        recall.RecallConfig(gap=(24, 20))
    with pytest.raises(ValueError, match="multiple of 10"):
        recall.RecallConfig(steps=15)


def test_command_line(capsys):
    assert recall.parse([]) == recall.parse(["mqar"]) == recall.TASKS["mqar"]
    changed = recall.parse(["passkey", "--gap", "20", "30", "--offset", "2", "--model.lr_init", "0.5"])
    assert (changed.digits, changed.gap, changed.offset, changed.model.lr_init) == (5, (20, 30), 2, 0.5)
    with pytest.raises(SystemExit) as stop:
        recall.parse(["mqar", "--keys", "3"])
    assert stop.value.code == 2 and "must lie between 1 and keys=3" in capsys.readouterr().err


def test_comparisons_are_fair():
    setting = recall_grid.SETTINGS["mqar"]
    names = ("allmem", "mamba2", "delta", *recall_grid.EQUAL_STATE)
    sizes = {name: recall.sizes(setting.of(name, 0), setting.entrants[name][0]) for name in names}
    parameters = [sizes[name]["parameters"] for name in names[:3]]
    assert max(parameters) <= 1.05 * min(parameters)
    for name in recall_grid.EQUAL_STATE:
        assert 0.9 <= sizes[name]["recurrent"] / sizes["allmem"]["recurrent"] <= 1.1


@pytest.mark.slow
def test_grid_keeps_what_it_has_trained(tmp_path, monkeypatch):
    config = dataclasses.replace(MQAR, batch=4, steps=20, eval_gaps=(1, 2), eval_batches=1)
    monkeypatch.setattr(recall_grid, "SETTINGS", {"mqar": recall_grid.Setting("Pairs", config, {"swa": ("swa", {})})})
    settings = recall_grid.GridConfig(out=tmp_path, settings=("mqar",), seeds=(0, 1))
    made = recall_grid.main(settings)
    first, second, _ = sorted(tmp_path.iterdir())
    assert re.fullmatch(r"mqar-swa-0-\w+\.json", first.name) and re.fullmatch(r"mqar-swa-1-\w+\.json", second.name)
    row = json.loads(second.read_text())
    assert [step for step, _, _ in row["curve"]] == [10, 20]
    assert [place[:2] for place in row["accuracy"]] == [[24, 2], [24, 4], [48, 2], [48, 4]]
    assert all(0 <= value <= 1 for _, _, value in row["accuracy"])
    monkeypatch.setattr(recall, "train", None)  # nothing is trained again
    assert recall_grid.main(settings) == made
    assert made.command == f"python -m train.experiments.recall_grid --out {tmp_path} --settings mqar --seeds 0 1"
    assert sections.load(tmp_path / "section.json").tables == made.tables
    with pytest.raises(TypeError):  # what other settings give is not there yet
        recall_grid.main(dataclasses.replace(settings, steps=10))
    first.write_text("[")
    with pytest.raises(ValueError, match=f"{first.name} is not a result"):
        recall_grid.main(settings)


def test_unknown_entrants_are_refused():
    with pytest.raises(ValueError, match="entrants='gru' is not one of 'allmem'"):
        recall_grid.GridConfig(entrants=("gru",))
    with pytest.raises(ValueError, match="have none of"):
        recall_grid.run(recall_grid.GridConfig(settings=("passkey",), entrants=("delta_state",)))


def test_break_point():
    row = {"config": {"gap": [24, 24]}, "accuracy": [[24, 2, 1.0], [24, 4, 0.95], [24, 8, 0.5], [48, 8, 1.0]]}
    worse = {**row, "accuracy": [[24, 2, 1.0], [24, 4, 0.7], [24, 8, 0.5], [48, 8, 1.0]]}
    assert recall_grid.break_point([row]) == 4
    assert recall_grid.break_point([row, worse]) == 2
    assert recall_grid.break_point([{**row, "accuracy": [[24, 2, 0.1]]}]) == 0
