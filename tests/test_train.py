"""Distillation on a toy: step functions, exact resume after any kind of stop, and errors that say what to do."""

import dataclasses
import errno
import functools
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import allmem_jax
from allmem_jax.checkpoints import load as load_lib
from allmem_jax.model import config as config_lib
from allmem_jax.model import lm, sharding
from allmem_jax.storage import stores
from tests import compiling, tiny_folder
from train import curriculum, finetune
from train import recipe as recipe_lib
from train.experiments import overhead
from train.loop import batches, checkpoint, compiled, evaluation, metrics, models, plan, steps, tiny
from train.loop import optimizer as optimizer_lib
from train.recipe import FinetuneConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text, and a compilation cache that the runs of this file and their subprocesses share."""
    folder = tmp_path_factory.mktemp("train")
    words = np.random.default_rng(0).choice("a bc def ghi jklm no".split(" "), 600)
    (folder / "text.txt").write_text(" ".join(words))
    old = {name: getattr(jax.config, name) for name in CACHE}
    for name, value in {**CACHE, "jax_compilation_cache_dir": str(folder / "compiled")}.items():
        jax.config.update(name, value)
    yield folder
    for name, value in old.items():
        jax.config.update(name, value)


CACHE = {"jax_compilation_cache_dir": None, "jax_persistent_cache_min_compile_time_secs": 0.0}


@pytest.fixture(scope="module")
def recipe(folder):
    return FinetuneConfig(
        model="tiny",
        texts=(str(folder / "text.txt"),),
        out=str(folder / "whole"),
        cache=str(folder / "cache"),
        steps=6,
        batch=2,
        seq_length=48,
        window=(12, 32),
        sinks=(0, 3),
        chunk=(8,),
        d_mem=8,
        positions=0.5,
        inside_weight=2.0,
        learning_rate=1e-2,
        warmup=2,
        checkpoint_every=2,
    )


@pytest.fixture(scope="module")
def pretrained(recipe):
    return models.load(recipe)


@pytest.fixture(scope="module")
def whole(recipe, pretrained):
    """An uninterrupted run: its metrics, without the timings, and its memory."""
    return outcome(finetune.run(recipe, pretrained))


def outcome(out):
    lines = metrics.read_metrics(stores.join(out, "metrics.jsonl"))
    for line in lines:
        line.pop("tokens_per_s")
    return lines, models.trained_memory(out)


def same(got, want):
    assert got[0] == want[0]
    jax.tree.map(np.testing.assert_array_equal, got[1], want[1])


@pytest.fixture(scope="module")
def toy(recipe, pretrained):
    """(jitted step, state, backbone, batch, teacher) as the loop has them."""
    mesh = sharding.make_mesh()
    state, backbone = compiled.start(recipe, pretrained, mesh)
    make_teacher, student = compiled.make(recipe, pretrained.config, sharding.tree_shardings(state, mesh), mesh)
    tokens = np.random.default_rng(1).integers(97, 110, (2, 49)).astype(np.int32)
    arrays = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": np.ones((2, 48), bool)}
    batch = batches.place(recipe, arrays, mesh)
    fresh = lambda: jax.tree.map(jnp.copy, state)  # noqa: E731, a step consumes its state
    return student(8), fresh, backbone, batch, make_teacher(backbone, batch)


def test_windows_and_sinks_compile_once_and_the_loss_falls(recipe, toy):
    step, fresh, backbone, batch, teacher = toy
    state, kls = fresh(), []
    rng = np.random.default_rng(0)
    for number in range(20):
        window, sinks = rng.integers(8, 40, dtype=np.int32), rng.integers(0, 4, dtype=np.int32)
        window, sinks = (np.int32(12), np.int32(1)) if number in (0, 19) else (window, sinks)
        state, values = step(state, backbone, batch, teacher, window, sinks, compiled.draw(recipe, number % 19))
        kls.append(float(values["kl"]))
    assert step._cache_size() == 1
    assert kls[19] < kls[0]
    assert jax.tree.structure(state.trained) == jax.tree.structure(fresh().trained)
    kl, inside, beyond = (float(values[name]) for name in ("kl", "kl_inside", "kl_beyond"))
    assert inside < 0.1 * beyond
    share = (beyond - kl) / (beyond - inside)  # of the positions that are inside, which weigh 2
    np.testing.assert_allclose(values["loss"], (2 * share * inside + (1 - share) * beyond) / (1 + share), rtol=1e-4)
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.trained))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.optimizer)) < 2.1 * trained


def test_a_step_that_is_not_finite_changes_nothing(recipe, toy):
    step, fresh, backbone, batch, teacher = toy
    args = (np.int32(12), np.int32(1), compiled.draw(recipe, 0))
    state, values = step(fresh(), backbone, batch, jnp.full_like(teacher, jnp.nan), *args)
    assert (int(state.skipped), int(state.skipped_in_a_row)) == (1, 1)
    jax.tree.map(np.testing.assert_array_equal, state[:2], fresh()[:2])
    state, _ = step(state, backbone, batch, teacher, *args)
    assert (int(state.skipped), int(state.skipped_in_a_row)) == (1, 0)
    assert float(jnp.abs(state.trained["layers"]["memory"]["alpha"]).max()) > 0


def test_stopped_by_sigterm_goes_on_with_the_same_losses(recipe, pretrained, whole, folder, monkeypatch):
    config = dataclasses.replace(recipe, out=str(folder / "stopped"))
    show = metrics.Progress.show

    def show_and_stop(self, line):
        show(self, line)
        if line["step"] == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Progress, "show", show_and_stop)
        with pytest.raises(SystemExit) as stop:
            finetune.run(config, pretrained)
    assert stop.value.code == 0  # what a scheduler that preempts takes for an orderly end
    assert not (folder / "stopped/allmem.safetensors").exists()
    same(outcome(finetune.run(config, pretrained)), whole)
    same(outcome(finetune.run(config, pretrained)), whole)  # nothing left to do


def test_killed_goes_on_with_the_same_losses(recipe, pretrained, whole, folder):
    config = dataclasses.replace(recipe, out=str(folder / "killed"))
    program = (
        "import time\nfrom train import finetune\nfrom train.loop import metrics\n"
        "from train.recipe import FinetuneConfig\n"
        "show = metrics.Progress.show\n"
        "def slowly(self, line):\n    show(self, line)\n    time.sleep(60 * (line['step'] == 5))\n"
        f"metrics.Progress.show = slowly\nfinetune.run({config!r})\n"
    )
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "PYTHONPATH": ROOT}
    process = subprocess.Popen([sys.executable, "-c", program], env=env, cwd=folder)
    log = folder / "killed/metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") == 5):
        time.sleep(0.1)
    assert process.poll() is None, "the run ended by itself"
    process.kill()
    process.wait()
    with log.open("a") as file:
        file.write('{"step": 6, "lo')  # what a kill in mid-write leaves
    same(outcome(finetune.run(config, pretrained)), whole)


class Killed(BaseException):
    pass


def test_killed_in_the_midst_of_writing_to_a_store_goes_on_too(recipe, pretrained, whole, store, folder, monkeypatch):
    stores.write(f"{store}/texts/text.txt", (folder / "text.txt").read_bytes())
    config = dataclasses.replace(recipe, texts=(f"{store}/texts",), out=f"{store}/run")
    changes, left = {name: getattr(stores, name) for name in ("put", "write", "remove")}, 0

    def change(name, *given):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return changes[name](*given)

    for name in changes:
        monkeypatch.setattr(stores, name, functools.partial(change, name))
    left = 10  # changes that it makes before, so that one checkpoint is there and half another
    with pytest.raises(Killed):
        finetune.run(config, pretrained)
    left = 1000
    assert finetune.run(config, pretrained) == config.out
    same(outcome(config.out), whole)
    found = stores.names(config.out)
    assert {name.split("/")[1] for name in found if name.startswith("checkpoints/")} == {"4", "6"}
    assert {name.split("/")[0] for name in found} >= {"recipe.json", "allmem_config.json", "tensorboard"}
    assert json.loads(stores.read(f"{config.out}/recipe.json"))["out"] == config.out
    with pytest.raises(checkpoint.CheckpointMismatch, match=f"{config.out}/checkpoints is of another run: seed"):
        finetune.run(dataclasses.replace(config, seed=1), pretrained)


def test_too_many_bad_steps_stop_with_a_reason(recipe, pretrained, folder):
    config = dataclasses.replace(recipe, out=str(folder / "bad"), max_bad_steps=2)
    alpha = pretrained.memory["layers"]["memory"] | {"alpha": jnp.full((2, 32), jnp.inf)}
    pretrained = pretrained._replace(memory={"layers": {"memory": alpha}})
    with pytest.raises(FloatingPointError, match="2 steps in a row had a loss or gradient that is not finite"):
        finetune.run(config, pretrained)
    lines = metrics.read_metrics(folder / "bad/metrics.jsonl")
    assert [line["skipped"] for line in lines] == [1, 2] and lines[0]["loss"] is None


def test_a_checkpoint_of_another_recipe_or_model_is_refused(recipe, pretrained, whole):
    before = (pathlib.Path(recipe.out) / "metrics.jsonl").read_text()
    with pytest.raises(checkpoint.CheckpointMismatch, match="learning_rate is 0.01 there and 0.02 here"):
        finetune.run(dataclasses.replace(recipe, learning_rate=2e-2), pretrained)
    with pytest.raises(checkpoint.CheckpointMismatch, match="batch is 2 there and 4 here; steps is 6 there and 8 here"):
        finetune.run(dataclasses.replace(recipe, batch=4, steps=8), pretrained)
    other = pretrained._replace(backbone=tiny.backbone(seed=1))
    with pytest.raises(checkpoint.CheckpointMismatch, match="backbone is"):
        finetune.run(recipe, other)
    assert (pathlib.Path(recipe.out) / "metrics.jsonl").read_text() == before


def test_nan_weights_are_named(recipe, pretrained, folder):
    scale = pretrained.backbone["final_norm"]["scale"].at[3].set(jnp.nan)
    pretrained = pretrained._replace(backbone={**pretrained.backbone, "final_norm": {"scale": scale}})
    config = dataclasses.replace(recipe, out=str(folder / "nan"))
    with pytest.raises(ValueError, match="NaN or infinite weights in final_norm/scale"):
        finetune.run(config, pretrained)
    assert not (folder / "nan").exists()


@pytest.mark.slow
def test_a_mesh_of_four_devices_gives_the_same_losses(recipe, whole, folder):
    config = dataclasses.replace(recipe, out=str(folder / "mesh"), mesh=(1, 2, 2, 1))
    env = {
        **os.environ,
        "XLA_FLAGS": compiling.on_devices(4),
        "PYTHONPATH": ROOT,
    }
    program = f"from train import finetune\nfrom train.recipe import FinetuneConfig\nfinetune.run({config!r})\n"
    subprocess.run([sys.executable, "-c", program], env=env, cwd=folder, check=True, timeout=300)
    got, want = outcome(folder / "mesh"), whole
    np.testing.assert_allclose([line["kl"] for line in got[0]], [line["kl"] for line in want[0]], rtol=1e-3)


def test_schedule_rises_holds_and_falls():
    rate = optimizer_lib.wsd_schedule(2.0, steps=10, warmup=2, decay=0.4)
    np.testing.assert_allclose([rate(i) for i in range(11)], [1, 2, 2, 2, 2, 2, 2, 1.5, 1, 0.5, 0], rtol=1e-6)


def test_the_memory_of_a_folder_is_trained_as_it_is(recipe, tmp_path):
    """None leaves every field to the folder; a value that differs from its memory is refused, all in one error."""
    path = tiny_folder.write(tmp_path / "plain")
    plain = load_lib.read_config(path)
    unlike = dict(
        qk_scale="rms",
        n_mem=3,
        d_mem=4,
        mem_expansion=3,
        conv_kernel=2,
        alpha_init=0.1,
        lr_init=0.02,
        momentum_init=0.3,
    )
    config = plain.replace(mixer="allmem", write=False, **unlike)
    _, backbone, tokenizer = allmem_jax.load_pretrained(path)
    memory = lm.init_memory(config, seed=7)
    allmem_jax.save_pretrained(tmp_path / "saved", config, lm.merge_params(backbone, memory), tokenizer)
    recipe = dataclasses.replace(recipe, model=str(tmp_path / "saved"), d_mem=None)
    start = models.load(recipe)
    assert {name: getattr(start.config, name) for name in unlike} == unlike and not start.config.write
    assert (start.config.window, start.config.sinks, start.config.chunk) == (32, 3, 8)
    jax.tree.map(np.testing.assert_array_equal, start.memory, memory)
    same = dataclasses.replace(recipe, qk_scale="rms", d_mem=4, lr_init=0.02, mixer="allmem", write=True)
    assert models.load(same).config == start.config.replace(write=True)
    for name, value in dict(
        mixer="delta", n_mem=1, d_mem=8, qk_scale="l2", alpha_init=0.0, lr_init=0.01, momentum_init=0.5
    ).items():
        with pytest.raises(ValueError, match=rf"{name}={value!r} \(it has .*Set {name} to None"):
            dataclasses.replace(recipe, **{name: value}).student(config, remembers=True)
    with pytest.raises(ValueError, match=r"d_mem=8 \(it has 4\), qk_scale='l2' \(it has 'rms'\)"):
        plan.planned_config(dataclasses.replace(recipe, d_mem=8, qk_scale="l2"))
    assert plan.planned_config(recipe) == start.config


def test_a_fresh_memory_is_the_recipes(recipe, tmp_path, monkeypatch):
    """Of the recipe's seed and fields, with the defaults of `ModelConfig` in place of None, and no warning."""
    monkeypatch.setattr(lm, "init_memory", lambda *arguments: arguments)
    recipe = dataclasses.replace(recipe, model=str(tiny_folder.write(tmp_path / "plain")), d_mem=None)
    start = models.load(dataclasses.replace(recipe, seed=3, mixer="delta", d_mem=4, lr_init=0.02))
    assert (start.config.mixer, start.config.d_mem, start.config.lr_init) == ("delta", 4, 0.02)
    assert start.memory == (start.config, 3)
    default = models.load(recipe).config
    assert (default.mixer, default.write, default.qk_scale, default.d_mem) == ("allmem", True, "l2", 64)
    assert (default.lr_init, default.n_mem) == (0.005, 4)  # the model has one key head


def test_a_memory_may_write_less(recipe, tmp_path):
    """`write_strength` scales values, which is to scale all learning rates; only AllMem's memory can be scaled so."""
    recipe = dataclasses.replace(recipe, model=str(tiny_folder.write(tmp_path / "plain")), d_mem=4, write_strength=0.25)
    whole = models.load(dataclasses.replace(recipe, write_strength=1.0)).memory["layers"]["memory"]
    less = models.load(recipe).memory["layers"]["memory"]
    np.testing.assert_array_equal(less["v_conv"]["kernel"], whole["v_conv"]["kernel"] / 4)
    np.testing.assert_array_equal(less["lr_proj"]["kernel"], whole["lr_proj"]["kernel"])
    with pytest.raises(ValueError, match="write_strength=0.25 is for mixer=allmem; this memory is 'delta'"):
        models.load(dataclasses.replace(recipe, mixer="delta"))
    with pytest.raises(ValueError, match="write_strength=0.25 needs a model with weights"):
        random = models.Pretrained(tiny.CONFIG, None, None, tiny.ByteTokenizer())
        with mock.patch.object(models, "read", return_value=random):
            models.load(recipe)
    with pytest.raises(ValueError, match="write_strength=0 must be positive"):
        dataclasses.replace(recipe, write_strength=0).check()


def test_what_a_run_depends_on_has_no_gaps(recipe, pretrained):
    """The identity has the model's values where the recipe leaves them to it, so that it tells runs apart."""
    rows = type("Rows", (), {"content_hash": lambda self: "rows"})()
    pretrained = pretrained._replace(origin="hash")
    one = finetune.identity(recipe, pretrained, rows)
    assert (one["mixer"], one["write"], one["d_mem"], one["qk_scale"]) == ("allmem", True, 8, "l2")
    assert finetune.identity(dataclasses.replace(recipe, qk_scale="l2", write=True), pretrained, rows) == one
    for change in (dict(qk_scale="rms"), dict(lr_init=0.1), dict(write=False)):
        other = pretrained._replace(config=pretrained.config.replace(**change))
        assert finetune.identity(recipe, other, rows) != one
    assert finetune.identity(recipe, pretrained._replace(origin="another"), rows) != one


class Ragged:
    """Rows of which few, or no, positions have a loss, none of them from `end` on; see `stream.Source`."""

    def __init__(self, end=48):
        self.end = end

    def __len__(self):
        return 6

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        tokens = rng.integers(97, 110, 49).astype(np.int32)
        mask = (rng.random(48) < (0.0, 0.0, 0.05, 0.1, 0.5, 1.0)[index]) & (np.arange(48) < self.end)
        return {"tokens": tokens[:-1], "targets": tokens[1:], "mask": mask, "segment_ids": np.ones(48, np.int32)}


def test_evaluation_weighs_positions_not_batches(recipe, pretrained):
    """Against the mean over all positions at once; NaN where a kind of position does not occur."""
    config = dataclasses.replace(recipe, batch=1, eval_batches=6, objective="pretrain")
    mesh = sharding.make_mesh()
    params = lm.merge_params(pretrained.backbone, pretrained.memory)
    with jax.set_mesh(mesh):
        got, near = (
            evaluation.make(config, pretrained.config, rows, None, mesh)(params, {})
            for rows in (Ragged(), Ragged(end=35))
        )
    rows = [Ragged()[index] for index in range(6)]
    tokens, targets, mask = (np.stack([row[name] for row in rows]) for name in ("tokens", "targets", "mask"))
    logits = jax.jit(lambda tokens: lm.AllMemLM(pretrained.config).apply({"params": params}, tokens))(tokens)
    each = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), targets[..., None], axis=-1)[..., 0]
    beyond = np.arange(48) >= 32 + 3
    want = {"ce": each[mask], "ce_inside": each[mask & ~beyond], "ce_beyond": each[mask & beyond]}
    assert got == {f"eval_{name}": pytest.approx(values.mean(), rel=1e-5) for name, values in want.items()}
    assert np.isnan(near["eval_ce_beyond"]) and near["eval_ce"] == near["eval_ce_inside"]


@pytest.mark.parametrize("mixer", config_lib.MEMORY_MIXERS)
def test_weight_decay_is_on_all_projections_that_are_trained(mixer):
    """In pretraining on each matrix [layers, in, out] of attention, MLP and memory; not on embedding and head."""
    config = tiny.CONFIG.replace(mixer=mixer, tie_embeddings=False, qkv_bias=True, qk_norm=True, d_model=64)
    shapes = jax.eval_shape(lambda: lm.random_params(config))
    leaves = {sharding.path_string(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(shapes)}
    on = {
        sharding.path_string(path)
        for path, on in jax.tree_util.tree_leaves_with_path(optimizer_lib.decayed(shapes))
        if on
    }
    assert on == {path for path, shape in leaves.items() if len(shape) == 3 and "_conv/" not in path}
    assert {path.split("/")[1] for path in on} == {"attention", "mlp", "memory"}


def test_weight_decay_is_on_projections_only():
    memory = {
        "q_proj": {"kernel": jnp.ones(2)},
        "lr_proj": {"kernel": jnp.ones(2), "bias": jnp.ones(2)},
        "q_conv": {"kernel": jnp.ones(2)},
        "out_norm": {"scale": jnp.ones(2)},
        "fast_up": jnp.ones(2),
    }
    optimizer = optimizer_lib.make(lambda count: 1.0, (0.9, 0.95), 0.1, 1.0)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, memory), optimizer.init(memory), memory)
    moved = {sharding.path_string(p) for p, x in jax.tree_util.tree_leaves_with_path(updates) if jnp.any(x)}
    assert moved == {"q_proj/kernel", "lr_proj/kernel"}


def test_positions_are_distinct_and_allowed_ones_first():
    allowed = jnp.asarray(np.random.default_rng(0).random((3, 40)) < [[0.5], [0.1], [0.9]])
    index, use = jax.jit(steps.choose_positions, static_argnums=2)(jax.random.key(0), allowed, 10)
    for row in range(3):
        assert len(set(index[row].tolist())) == 10
        np.testing.assert_array_equal(np.asarray(allowed)[row, index[row]], use[row])
        assert use[row].sum() == min(10, allowed[row].sum())


def test_offsets_restart_with_each_document():
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0, 0, 3]])
    batch = steps.Batch(segments, segments, segments > 0, segments)
    np.testing.assert_array_equal(steps.offsets_in_document(batch), [[0, 1, 2, 0, 1, 0, 1, 0]])
    plain = steps.offsets_in_document(batch._replace(segment_ids=None))
    np.testing.assert_array_equal(plain, [np.arange(8)])


def test_draws_depend_on_seed_and_step_alone():
    config = FinetuneConfig(chunk=(8, 16), window=(10, 20), sinks=(0, 3))
    drawn = [config.draw(step) for step in range(200)]
    assert drawn == [config.draw(step) for step in range(200)]
    assert drawn != [dataclasses.replace(config, seed=1).draw(step) for step in range(200)]
    assert [set(values) for values in zip(*drawn, strict=True)] == [{8, 16}, set(range(10, 21)), set(range(4))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": ""}, "model is not set: give --model"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"window": (9, 8)}, r"window=\(9, 8\) must be a range"),
        ({"chunk": ()}, "chunk="),
        ({"pack": True, "chunk": (8, 12)}, "pack needs chunk sizes that divide the largest"),
        ({"positions": 0.0}, "positions=0.0 must be above 0"),
        ({"beyond_window": True, "window": (48, 48)}, "beyond_window leaves no position"),
        ({"mesh": (64, 1, 1, 1)}, "batch=2 rows"),
    ],
)
def test_recipes_that_cannot_work(recipe, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(recipe, **change).check()


def test_blind_gap_is_warned_of(recipe):
    with pytest.warns(UserWarning, match="up to 4 tokens are seen by neither"):
        dataclasses.replace(recipe, window=(4, 32)).check()


def test_command_line(capsys, tmp_path, error_of):
    assert "no recipe at nowhere.py" in error_of(finetune.main, ["nowhere.py"])
    (tmp_path / "empty.py").write_text("")
    assert "must define `config = FinetuneConfig" in error_of(finetune.main, [str(tmp_path / "empty.py")])
    with pytest.raises(SystemExit):
        finetune.main([os.path.join(ROOT, "configs/smoke.py"), "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--learning-rate" in shown and "first tokens that stay visible" in shown
    with pytest.raises(SystemExit):
        finetune.main([os.path.join(ROOT, "configs/smoke.py"), "--steps", "many"])
    given = [os.path.join(ROOT, "configs/smoke.py"), "--d_mem", "None", "--lr-init", "0.1", "--write", "False"]
    left = recipe_lib.parse(FinetuneConfig, "train.finetune", "", given)
    assert (left.d_mem, left.lr_init, left.write) == (None, 0.1, False)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("experiments.recall_grid", ["--seeds"], "or there is no seed"),
        ("experiments.overhead", ["nowhere.py"], "no recipe at nowhere.py"),
        ("experiments.compare", ["a.txt", "--windows", "1"], "windows=(1,) and sinks="),
        ("experiments.demo", ["--recipe", "nowhere.py"], "no recipe at nowhere.py"),
        ("fetch", ["nothing"], "nothing called 'nothing' to fetch"),
    ],
)
def test_programs_end_with_one_line(program, arguments, message, monkeypatch, error_of):
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    assert message in error_of(lambda: runpy.run_module(f"train.{program}", run_name="__main__"))


def test_every_recipe_is_valid():
    for file in sorted(pathlib.Path(ROOT, "configs").glob("*.py")):
        config = dataclasses.replace(recipe_lib.read_recipe(str(file)), model="x", texts=("y",), out="z")
        config.check()
        if stages := runpy.run_path(str(file)).get("stages"):
            assert len(curriculum.make_recipes(config, stages)) == len(stages)


def test_pretraining_learns_everything_and_goes_on(recipe, folder, monkeypatch):
    """All parameters move, the loss falls, an average is kept, a batch in pieces is the same batch."""
    config = dataclasses.replace(
        recipe,
        objective="pretrain",
        out=str(folder / "pretrained"),
        inside_weight=1.0,
        batch=4,
        steps=8,
        ema=0.5,
        eval_texts=recipe.texts,
        eval_every=4,
        eval_batches=1,
    )
    lines, _ = outcome(finetune.run(config))
    assert lines[-1]["ce"] < lines[0]["ce"] - 0.5 and lines[-1]["eval_ce"] < lines[3]["eval_ce"]
    assert "kl" not in lines[0] and "eval_kl" not in lines[3]
    pieces = dataclasses.replace(config, out=str(folder / "pieces"), accumulate=2)
    np.testing.assert_allclose(
        [line["loss"] for line in outcome(finetune.run(pieces))[0]], [line["loss"] for line in lines], rtol=1e-4
    )


def test_random_weights_of_a_preset(recipe, folder, monkeypatch):
    """A preset is made where it is to lie; both objectives; it needs a tokenizer."""
    small = dict(tiny.CONFIG.__dict__, d_model=48)
    monkeypatch.setitem(config_lib.PRESETS, "small", small)
    with pytest.raises(ValueError, match="tokenizer='': the preset small comes without one"):
        models.load(dataclasses.replace(recipe, model="small"))
    start = models.Pretrained(
        recipe.student(config_lib.preset("small"), remembers=False), None, None, tiny.ByteTokenizer()
    )
    mesh = sharding.make_mesh()
    state, frozen = compiled.start(dataclasses.replace(recipe, model="small", backbone_dtype="bfloat16"), start, mesh)
    assert frozen["embed"]["embedding"].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trained)} == {jnp.dtype("float32")}
    state, frozen = compiled.start(dataclasses.replace(recipe, objective="pretrain", model="small"), start, mesh)
    assert frozen == {} and "embed" in state.trained


def test_a_full_disk_is_one_error_and_older_steps_stay(recipe, pretrained, folder, monkeypatch, error_of):
    config = dataclasses.replace(recipe, out=str(folder / "full"), model="tiny")
    save = checkpoint.Checkpoints.save

    def full(self, step, *rest):
        if step > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", full)
        patch.setattr(finetune, "run", lambda config, run=finetune.run: run(config, pretrained))
        patch.setattr(recipe_lib, "read_recipe", lambda path: config)
        assert "No space left on device; free some space" in error_of(finetune.main, ["any"])
    assert [path.name for path in (folder / "full/checkpoints").iterdir() if path.is_dir()] == ["2"]
    assert len(outcome(finetune.run(config, pretrained))[0]) == 6


def test_what_the_loop_costs_can_be_measured(recipe, monkeypatch):
    monkeypatch.setattr(overhead, "COMPILING", 2)
    found = overhead.measure(dataclasses.replace(recipe, eval_texts=()), 3)
    assert set(found) == {"loop", "bare", "data", "loop_over_bare", "data_over_bare"}
    assert found["loop_over_bare"] == found["loop"] / found["bare"] > 0 and found["data"] > 0
