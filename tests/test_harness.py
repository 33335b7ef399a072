"""lm_eval's tasks answered as its own Hugging Face model answers them, and by the memory, whatever the batch."""

import json
import pathlib
import re
import runpy
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_folder

pytest.importorskip("torch")
pytest.importorskip("lm_eval")

import datasets
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from allmem_jax import cli, generation, harness, model
from allmem_jax import convert as convert_lib

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
SENTENCES = [s for s in re.split(r"(?<=\.)\s+", " ".join((ROOT / "LICENSE").read_text().split())) if 60 < len(s) < 130]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny_folder.write(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def converted(plain):
    """The same with a random memory that speaks."""
    config, params, tokenizer = convert_lib.load_pretrained(plain, window=24, sinks=2, chunk=8, d_mem=8, lr_init=0.2)
    rng = np.random.default_rng(1)
    memory = jax.eval_shape(lambda: model.init_memory(config))
    memory = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), jnp.float32), memory)
    path = plain.parent / "converted"
    convert_lib.save_pretrained(path, config, model.merge_params(params, memory), tokenizer)
    return path


@pytest.fixture(scope="module")
def theirs(plain):
    return HFLM(pretrained=str(plain), device="cpu", dtype="float32", batch_size=3)


@pytest.fixture(scope="module")
def ours(plain):
    return harness.AllMemHarness(str(plain), batch_size=3)


@pytest.fixture(scope="module")
def remembering(converted):
    return harness.AllMemHarness(str(converted), batch_size=2)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Three tasks on the sentences of the licence: choose an ending, write one, read all of it."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = []
    for index, sentence in enumerate(SENTENCES[:6]):
        words = sentence.split()
        others = [" ".join(SENTENCES[(index + step) % 6].split()[-4 - step :]) for step in (1, 2, 3)]
        choices = [*others, " ".join(words[-5:])]
        rows.append({"start": " ".join(words[:-5]), "text": sentence, "choices": choices, "label": 3})
    (folder / "sentences.json").write_text("\n".join(map(json.dumps, rows)))
    common = {
        "dataset_path": "json", "test_split": "train", "fewshot_split": "train",
        "dataset_kwargs": {"data_files": str(folder / "sentences.json"), "cache_dir": str(folder / "cache")},
    }  # fmt: skip
    return [
        common | {
            "task": "choose", "output_type": "multiple_choice", "num_fewshot": 1, "doc_to_text": "{{start}}",
            "doc_to_choice": "{{choices}}", "doc_to_target": "label",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        common | {
            "task": "write", "output_type": "generate_until", "doc_to_text": "{{start}}", "doc_to_target": "{{text}}",
            "generation_kwargs": {"until": ["\n\n", "th"], "max_gen_toks": 20, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
        common | {
            "task": "read", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
        },
    ]  # fmt: skip


def evaluate(lm, tasks, **options):
    datasets.disable_progress_bars()
    loaded = TaskManager(include_defaults=False).load([dict(task) for task in tasks])
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=task.get_config("num_fewshot") or 0)
        task.set_fewshot_seed(seed=1234)
    return evaluator.evaluate(lm, loaded, bootstrap_iters=0, **options)


def same(found, wanted):
    """Results and every single answer, within 1e-3."""
    assert found["results"].keys() == wanted["results"].keys()
    for task, figures in wanted["results"].items():
        for name, value in figures.items():
            if isinstance(value, float):
                assert found["results"][task][name] == pytest.approx(value, rel=1e-3, abs=1e-3), (task, name)
        for ours, theirs in zip(found["samples"][task], wanted["samples"][task], strict=True):
            assert ours["arguments"] == theirs["arguments"]
            for mine, other in zip(ours["resps"], theirs["resps"], strict=True):
                assert mine[0] == pytest.approx(other[0], abs=1e-3)


def requests(kind, *arguments):
    return [Instance(kind, {}, pair, index) for index, pair in enumerate(arguments)]


def test_tasks_give_the_figures_of_the_hugging_face_model(ours, theirs, tasks):
    found = evaluate(ours, tasks)
    same(found, evaluate(theirs, tasks))
    assert found["results"]["read"]["byte_perplexity,none"] > 1
    assert len({sample["resps"][0][0] for sample in found["samples"]["write"]}) > 1


def test_chat_templates_are_applied_alike(ours, theirs, tasks):
    options = dict(apply_chat_template=True, fewshot_as_multiturn=True, system_instruction="Be brief.")
    found = evaluate(ours, tasks[:2], **options)
    same(found, evaluate(theirs, tasks[:2], **options))
    context = found["samples"]["choose"][0]["arguments"][0][0]
    assert context.startswith("<|im_start|>system\nBe brief.<|im_end|>") and context.count("<|im_start|>user") == 2
    assert "plain" in ours.tokenizer_name and "/" not in ours.tokenizer_name


def test_long_inputs_lose_their_start_as_there(plain, ours, theirs, caplog):
    """Windows of a rolling text, contexts that are too long for scoring, and for generation."""
    book = " ".join(SENTENCES[:4])
    short = harness.AllMemHarness(str(plain), max_length=48, batch_size=3)
    hf = HFLM(pretrained=theirs.model, tokenizer=theirs.tokenizer, max_length=48, batch_size=2)
    scored = requests("loglikelihood", (book, " the end."), ("", SENTENCES[0][:30]), ("A short one", ", and its end"))
    same_scores(short.loglikelihood(scored), hf.loglikelihood(scored))
    assert "max_length=48" in caplog.text
    rolling = requests("loglikelihood_rolling", (book,), (SENTENCES[5],), ("",))
    np.testing.assert_allclose(short.loglikelihood_rolling(rolling), hf.loglikelihood_rolling(rolling), rtol=1e-5)
    written = requests("generate_until", (book, {"max_gen_toks": 8}), ("The licence", {"max_gen_toks": 8}))
    assert short.generate_until(written) == hf.generate_until(written)
    assert short.loglikelihood(scored)[0] != ours.loglikelihood(scored)[0]


def same_scores(found, wanted, rel=1e-5):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    np.testing.assert_allclose([score for score, _ in found], [score for score, _ in wanted], rtol=rel)


def test_scores_depend_neither_on_the_batch_nor_on_the_bucket(converted, remembering):
    """A short request beside a long one, in its bucket, against each by itself; one program for each size."""
    asked = requests("loglikelihood", (SENTENCES[0], " shall be"), (SENTENCES[1][:40], " of the License"))
    one = harness.AllMemHarness(str(converted), batch_size=1)
    harness.score.clear_cache()
    together = remembering.loglikelihood(asked)
    assert harness.score._cache_size() == 1
    same_scores(together, one.loglikelihood(asked))
    assert harness.score._cache_size() == 3
    again = remembering.loglikelihood([*asked[::-1], asked[0], asked[0]])
    same_scores(again, [*together[::-1], together[0], together[0]])
    assert harness.score._cache_size() == 3


def test_what_is_generated_is_greedy(remembering):
    """Read in pieces and written token by token, ragged, against the scores of the whole row."""
    prompts = [remembering.tok_encode(text) for text in (SENTENCES[0], SENTENCES[1][:9])]
    answers = remembering._generate(prompts, 12, generation.GREEDY, [], 0)
    asked = [(None, *pair) for pair in zip(prompts, answers, strict=True)]
    assert [greedy for _, greedy in remembering._loglikelihood_tokens(asked)] == [True, True]
    answers[0][5] += 1
    assert [greedy for _, greedy in remembering._loglikelihood_tokens(asked)] == [False, True]


def test_prompts_of_any_length_share_programs(remembering):
    def write(*cuts):
        asked = ((SENTENCES[0][:cut], {"max_gen_toks": 4}) for cut in cuts)
        return remembering.generate_until(requests("generate_until", *asked))

    answers = write(30, 90)
    before = generation.decode_step._cache_size(), generation.prefill_piece._cache_size()
    assert write(50, 90, 30)[1:] == answers[::-1] and write(30) == answers[:1]
    assert (generation.decode_step._cache_size(), generation.prefill_piece._cache_size()) == before


def test_stop_strings_are_found_across_tokens(remembering):
    """A stop string that begins in one token and ends in the next; the other row goes on."""
    texts = [sentence[:30] for sentence in SENTENCES[:2]]
    prompts = [remembering.tok_encode(text) for text in texts]
    ids = remembering._generate(prompts, 24, generation.GREEDY, [], 0)[0]
    pieces = [remembering.tokenizer.decode(token) for token in ids]
    pairs = [(place, a[-1:] + b[:1]) for place, (a, b) in enumerate(zip(pieces, pieces[1:], strict=False))]
    place, term = next((place, pair) for place, pair in pairs if place > 3 and pair.isascii() and len(pair) == 2)
    assert len(remembering._generate(prompts[:1], 24, generation.GREEDY, [term], 0)[0]) <= place + 2 < 24
    ask = lambda until: requests("generate_until", *((t, {"max_gen_toks": 24, "until": until}) for t in texts))  # noqa: E731
    free = remembering.generate_until(ask([]))
    assert term in free[0]
    for until in (term, [term], ["not there", term]):
        assert remembering.generate_until(ask(until)) == [text.split(term)[0] for text in free]


def test_sampling_repeats_with_its_seed_and_differs_between_batches(remembering):
    hot = {"max_gen_toks": 8, "do_sample": True, "temperature": 2.0}
    asked = requests("generate_until", *[("The licence", hot)] * 4)
    first = remembering.generate_until(asked)
    assert first == remembering.generate_until(asked) and len(set(first)) == 4


def test_the_memory_and_its_controls(converted, plain):
    asked = requests("loglikelihood_rolling", (SENTENCES[0],))
    models = [harness.AllMemHarness(str(converted), **options) for options in ({}, {"write": False}, {"mixer": "swa"})]
    scores = [one.loglikelihood_rolling(asked)[0] for one in models]
    assert len({round(score, 3) for score in scores}) == len(scores)
    assert [one.max_length for one in models] == [131072] * 3
    assert models[1].get_model_info()["model_mixer"] == "allmem" and models[1].get_model_info()["model_write"] is False
    full = [harness.AllMemHarness(str(plain)), harness.AllMemHarness(str(converted), mixer="full")]
    assert [(one.config.mixer, one.max_length) for one in full] == [("full", 8192)] * 2
    assert harness.AllMemHarness(str(converted), window=8, sinks=0, chunk=4).config.window == 8


def test_errors_name_the_fix(converted, plain, remembering, tmp_path):
    config, params, tokenizer = convert_lib.load_pretrained(plain, mixer="delta")
    memory = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), jax.eval_shape(lambda: model.init_memory(config)))
    convert_lib.save_pretrained(tmp_path / "delta", config, model.merge_params(params, memory), tokenizer)
    assert harness.AllMemHarness(str(tmp_path / "delta")).config.mixer == "delta"
    with pytest.raises(ValueError, match="a memory for mixer='delta', not for mixer='allmem'"):
        harness.AllMemHarness(str(tmp_path / "delta"), mixer="allmem")
    with pytest.raises(ValueError, match="mixer='allmem'.*has no memory: convert it"):
        harness.AllMemHarness(str(plain), mixer="allmem")
    with pytest.raises(ValueError, match="mixer='hybrid' is not one of"):
        harness.AllMemHarness(str(plain), mixer="hybrid")
    with pytest.raises(ValueError, match="batch_size='auto'"):
        harness.AllMemHarness(str(plain), batch_size="auto")
    ask = lambda **settings: remembering.generate_until(requests("generate_until", ("A", settings)))  # noqa: E731
    with pytest.raises(ValueError, match="repetition_penalty"):
        ask(repetition_penalty=2.0)
    with pytest.raises(ValueError, match="max_gen_toks=131072"):
        ask(max_gen_toks=131072)
    with pytest.raises(ValueError, match="a continuation has 0 tokens"):
        remembering.loglikelihood(requests("loglikelihood", ("A", "")))


def test_missing_extra_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(ImportError, match=r"pip install 'allmem-jax\[eval\]'") as error:
        runpy.run_path(harness.__file__)
    assert "\n" not in str(error.value) and error.value.__suppress_context__


def test_command_line(converted, tasks, tmp_path, monkeypatch, capsys):
    """lm_eval's own command, from a task file to a file of results."""
    import lm_eval.tasks

    class LocalTasks(TaskManager):  # its own tasks are thousands of files to read
        def __init__(self, **options):
            super().__init__(include_defaults=False, **options)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", LocalTasks)
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)
    monkeypatch.setattr(sys, "argv", ["python"])
    (tmp_path / "read.yaml").write_text(json.dumps(tasks[2]))
    arguments = f"pretrained={converted},window=24,chunk=8,batch_size=2,dtype=float32,max_length=512"
    assert cli.main(["lm-eval", "--model", "allmem", "--model_args", arguments, "--tasks", str(tmp_path / "read.yaml"),
                  "--limit", "2", "--output_path", str(tmp_path / "out")]) == 0  # fmt: skip
    assert "|read" in capsys.readouterr().out
    (path,) = (tmp_path / "out").rglob("results_*.json")
    saved = json.loads(path.read_text())
    assert saved["results"]["read"]["byte_perplexity,none"] > 1
    assert saved["config"]["model_window"] == 24 and saved["max_length"] == 512
