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
import tokenizers
import transformers

pytest.importorskip("torch")
pytest.importorskip("lm_eval")

import datasets
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import allmem_jax
from allmem_jax import cli
from allmem_jax.checkpoints import layout
from allmem_jax.decoding import generation
from allmem_jax.evaluation import harness, harness_arguments
from allmem_jax.model import config as config_lib
from allmem_jax.model import lm as lm_lib

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
SENTENCES = [s for s in re.split(r"(?<=\.)\s+", " ".join((ROOT / "LICENSE").read_text().split())) if 60 < len(s) < 130]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny_folder.write(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def converted(plain):
    """The same with a random memory that speaks."""
    config, params, tokenizer = allmem_jax.load_pretrained(plain, window=24, sinks=2, chunk=8, d_mem=8, lr_init=0.2)
    rng = np.random.default_rng(1)
    memory = jax.eval_shape(lambda: lm_lib.init_memory(config))
    memory = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), jnp.float32), memory)
    path = plain.parent / "converted"
    allmem_jax.save_pretrained(path, config, lm_lib.merge_params(params, memory), tokenizer)
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
        "dataset_path": "json",
        "test_split": "train",
        "fewshot_split": "train",
        "dataset_kwargs": {"data_files": str(folder / "sentences.json"), "cache_dir": str(folder / "cache")},
    }
    return [
        common
        | {
            "task": "choose",
            "output_type": "multiple_choice",
            "num_fewshot": 1,
            "doc_to_text": "{{start}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        common
        | {
            "task": "write",
            "output_type": "generate_until",
            "doc_to_text": "{{start}}",
            "doc_to_target": "{{text}}",
            "generation_kwargs": {"until": ["\n\n", "th"], "max_gen_toks": 20, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
        common
        | {
            "task": "read",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
        },
    ]


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
    harness.scoring.score.clear_cache()
    together = remembering.loglikelihood(asked)
    assert harness.scoring.score._cache_size() == 1
    same_scores(together, one.loglikelihood(asked))
    assert harness.scoring.score._cache_size() == 3
    again = remembering.loglikelihood([*asked[::-1], asked[0], asked[0]])
    same_scores(again, [*together[::-1], together[0], together[0]])
    assert harness.scoring.score._cache_size() == 3


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
    texts = [SENTENCES[3][:30], SENTENCES[0][:30]]  # the first is answered with some ASCII
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
    config, params, tokenizer = allmem_jax.load_pretrained(plain, mixer="delta")
    memory = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), jax.eval_shape(lambda: lm_lib.init_memory(config)))
    allmem_jax.save_pretrained(tmp_path / "delta", config, lm_lib.merge_params(params, memory), tokenizer)
    assert harness.AllMemHarness(str(tmp_path / "delta")).config.mixer == "delta"
    with pytest.raises(ValueError, match="a memory for mixer='delta', not for mixer='allmem'"):
        harness.AllMemHarness(str(tmp_path / "delta"), mixer="allmem")
    with pytest.raises(ValueError, match="mixer='allmem'.*has no memory: convert it"):
        harness.AllMemHarness(str(plain), mixer="allmem")
    with pytest.raises(ValueError, match="mixer='hybrid' is not one of"):
        harness.AllMemHarness(str(plain), mixer="hybrid")
    ask = lambda **settings: remembering.generate_until(requests("generate_until", ("A", settings)))  # noqa: E731
    with pytest.raises(ValueError, match="repetition_penalty"):
        ask(repetition_penalty=2.0)
    with pytest.raises(ValueError, match="max_gen_toks=131072"):
        ask(max_gen_toks=131072)
    with pytest.raises(ValueError, match="a continuation has 0 tokens"):
        remembering.loglikelihood(requests("loglikelihood", ("A", "")))


# No token is in two rows, so that the last one says what follows; after a row comes <|endoftext|>.
SAID = ["A the<|im_start|>bc", "BxZy", "Cp<|endoftext|>q<|im_end|>", "Duv\u00e9w", "Ekl mn"]


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """A model that was made to say `SAID`, with two ends in its generation_config.json, and a tokenizer with a BOS."""
    tokenizer = tiny_folder.tiny_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    size = len(tokenizer)
    config = config_lib.ModelConfig(
        vocab_size=size,
        d_model=size,
        n_layers=1,
        n_heads=1,
        n_kv_heads=1,
        head_dim=8,
        d_ff=8,
        mixer="full",
        tie_embeddings=False,
    )
    params = jax.eval_shape(lambda: lm_lib.init_params(config))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
    params["final_norm"] = jax.tree.map(np.ones_like, params["final_norm"])
    params["embed"]["embedding"] = np.eye(size, dtype=np.float32)
    for row in SAID:
        ids = tokenizer.encode(row)
        params["lm_head"]["kernel"][ids[:-1], ids[1:]] = 1.0
    path = tmp_path_factory.mktemp("models") / "scripted"
    allmem_jax.save_pretrained(path, config, params, tokenizer)
    (path / layout.ALLMEM_CONFIG).unlink()
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("Z")]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return path


def said(lm, *until):
    settings = {"max_gen_toks": 5, "until": list(until)}
    return lm.generate_until(requests("generate_until", *((row[0], settings) for row in SAID)))


def test_answers_end_where_the_hugging_face_model_ends_them(scripted):
    """At each end of generation_config.json and at no other id, and at stop strings, special tokens among them."""
    ours = harness.AllMemHarness(str(scripted))
    theirs = HFLM(pretrained=str(scripted), device="cpu", dtype="float32")
    assert said(ours) == said(theirs) == [" thebc", "xZ", "pq", "uv\u00e9w", "kl mn"]
    for until in (["<|im_start|>"], ["\u00e9"], ["v\u00e9w", " m"], ["he", "q"]):
        assert said(ours, *until) == said(theirs, *until)
    assert said(ours, "<|im_start|>")[0] == " the" and said(ours, "\u00e9")[3] == "uv"
    for end in ("l", ours.tokenizer.convert_tokens_to_ids("l"), "not there"):
        options = dict(think_end_token=end, max_length=40)
        other = HFLM(pretrained=theirs.model, tokenizer=theirs.tokenizer, **options)
        answers = said(harness.AllMemHarness(str(scripted), **options), "n")
        assert answers == said(other, "n") and answers[4] == ("kl m" if end == "not there" else "m")


def test_stop_strings_are_found_in_the_bytes_of_characters():
    """Tokens of a byte each, of which a decoder makes nothing where a stretch begins within a character."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], byte_fallback=True))
    backend.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)

    def ends(text, *until):
        ids = list(text.encode())
        return next((at for at in range(1, len(ids) + 1) if harness.ends_with(tokenizer, ids[:at], until)), None)

    sea = "\u6d77\u3068\u9be8" * 3  # characters of three bytes
    for begun in (sea, f"a{sea}", f"ab{sea}"):
        assert ends(f"{begun}\n{sea}", "\n") == len(f"{begun}\n".encode())
        assert ends(begun, "\u9be8\u6d77") == len(begun.encode()) - 15
    assert ends("the whale", "wh", "whale") == 6 and ends("the whale", "The") is None and ends("a") is None
    cut = "\u6d77".encode()[:2] + b"\n"  # a damaged character, of whose newline the text shows nothing
    assert not harness.ends_with(tokenizer, list(cut), ["\n"]) and tokenizer.decode(list(cut)) == "\ufffd" * 3


def test_arguments_of_the_hugging_face_model_are_taken(plain, scripted, theirs):
    """Scores and prompts with another tokenizer, with its BOS and without, and after another first token."""
    asked = requests("loglikelihood", ("", SENTENCES[0][:20]), ("<|endoftext|>The whale", " and"), ("The", " sea"))
    scores = set()
    for options in (dict(), dict(add_bos_token=True), dict(add_bos_token=False), dict(prefix_token_id=7)):
        ours = harness.AllMemHarness(str(plain), batch_size=3, tokenizer=str(scripted), revision="v1", **options)
        bos = {name: value for name, value in options.items() if name == "add_bos_token"}
        tokenizer = transformers.AutoTokenizer.from_pretrained(scripted, **bos)
        other = HFLM(pretrained=theirs.model, tokenizer=tokenizer, **options)
        found = ours.loglikelihood(asked)
        same_scores(found, other.loglikelihood(asked))
        scores.add(tuple(found))
        for text in ("The whale", "<|endoftext|>The whale"):
            assert ours._encode_prompt(text) == other.tok_batch_encode([text])[0][0].tolist()
    assert len(scores) == 3
    assert harness.AllMemHarness(str(plain.parent), subfolder="plain").pretrained == str(plain)


def test_templates_get_their_arguments_and_may_refuse_the_system(plain, theirs):
    ask = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    refusing = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.content }}{% endfor %}{{ enable_thinking }}{{ depth }}"
    )
    for options in (dict(), dict(enable_thinking=False, chat_template_args={"depth": 3})):
        ours = harness.AllMemHarness(str(plain), **options)
        other = HFLM(pretrained=theirs.model, tokenizer=ours.tokenizer, **options)
        ours.tokenizer.chat_template = refusing
        assert ours.apply_chat_template(ask) == other.apply_chat_template(ask) == ("Why?False3" if options else "Why?")
    for broken in ("{% for m in messages %}{{ m.content }", "{{ raise_exception('nobody') }}"):
        ours.tokenizer.chat_template = broken
        with pytest.raises(ValueError, match="the chat template fails .*leave out --apply_chat_template"):
            ours.apply_chat_template(ask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(trust_remote_code=True), "trust_remote_code=True cannot be served: a model's own code is not run"),
        (dict(backend="seq2seq"), "backend='seq2seq' cannot be served: models here are decoders"),
        (dict(softmax_dtype="bfloat16"), "softmax_dtype='bfloat16' cannot"),
        (dict(mixed_precision_dtype="float16"), "give dtype=bfloat16"),
        (dict(parallelize=True), "parallelize=True cannot"),
        (dict(load_in_4bit=True), "load_in_4bit=True cannot.*a .gguf file"),
        (dict(peft="adapter"), "peft='adapter' cannot.*merge the adapter"),
        (dict(widow=8), "widow is no argument of --model allmem, which takes pretrained, mixer, window"),
        (dict(max_length=1e5), "max_length=100000.0 must be a whole number"),
        (dict(max_length=-1), "max_length=-1 must be at least 1"),
        (dict(prefix_token_id=True), "prefix_token_id=True must be a whole number"),
        (dict(prefix_token_id=999), "prefix_token_id=999 is outside the vocabulary of 280"),
        (dict(add_bos_token="yes"), "add_bos_token='yes' must be True or False"),
        (dict(chat_template_args="depth"), "chat_template_args='depth' must be a dict"),
        (dict(enable_thinking=True), "enable_thinking=True needs think_end_token"),
        (dict(dtype="float16"), "dtype='float16' is not one of 'float32', 'bfloat16'"),
        (dict(batch_size="many"), "batch_size='many' must be a positive number, or auto"),
        (dict(gguf_file="model.gguf"), "model.gguf: no such file"),
        (dict(pretrained=""), "pretrained is missing"),
    ],
)
def test_what_cannot_be_served_is_named(plain, options, message):
    with pytest.raises((ValueError, OSError), match=message) as error:
        harness.AllMemHarness(**{"pretrained": str(plain)} | options)
    assert "\n" not in str(error.value)


def test_what_changes_no_answer_is_taken(plain, tmp_path, caplog):
    same = dict(
        revision=None,
        logits_cache=False,
        softmax_dtype="float32",
        attn_implementation="sdpa",
        peft=None,
        backend="causal",
        parallelize=False,
        trust_remote_code=False,
        load_in_8bit=False,
    )
    ours = harness.AllMemHarness(str(plain), batch_size="auto:4", dtype="auto", device="cpu:0", **same)
    assert ours.batch_size == 8 and ours.config.dtype == "float32" and "8 rows, a fixed number" in caplog.text
    assert "JAX runs on" not in caplog.text
    assert harness_arguments.batch_size("auto", 2) == 2
    harness_arguments.say_device("tpu")
    assert "device=tpu: JAX runs on cpu" in caplog.text
    for stored, dtype in (("bfloat16", "bfloat16"), ("float16", "float32")):
        (tmp_path / "config.json").write_text(json.dumps({"torch_dtype": stored}))
        assert harness_arguments.dtype("auto", tmp_path) == dtype
    assert "the weights are float16 and run in float32" in caplog.text
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 3, "repetition_penalty": 1.1, "min_length": 0}')
    assert harness_arguments.end_tokens(tmp_path) == [3]
    assert "sets {'repetition_penalty': 1.1}, which --model hf applies" in caplog.text
    ours.enable_thinking = True
    with pytest.raises(ValueError, match="enable_thinking=True is for tasks that generate"):
        ours.loglikelihood(requests("loglikelihood", ("A", "B")))


def test_a_line_tells_of_inputs_longer_than_in_training(converted, caplog):
    trained = harness.AllMemHarness(str(converted), batch_size=2)
    trained.config = trained.config.replace(max_length=64)
    trained._warn_beyond(64)
    assert not caplog.text
    trained._warn_beyond(65)
    assert "inputs have up to 65 tokens, and the model was trained on 64" in caplog.text


def test_missing_extra_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(ImportError, match=r"pip install 'allmem-jax\[eval\]'") as error:
        runpy.run_path(harness.__file__)
    assert "\n" not in str(error.value) and error.value.__suppress_context__


@pytest.fixture
def command(monkeypatch, tasks, tmp_path):
    """Runs lm_eval's own command on the task `read`, without its own tasks, which are thousands of files to read."""
    import lm_eval.tasks

    class LocalTasks(TaskManager):
        def __init__(self, **options):
            super().__init__(include_defaults=False, **options)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", LocalTasks)
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)
    monkeypatch.setattr(sys, "argv", ["python"])
    path = tmp_path / "read.yaml"
    path.write_text(json.dumps(tasks[2]))

    def run(arguments, *words):
        return cli.main(["lm-eval", "--model", "allmem", "--model_args", arguments, "--tasks", str(path), *words])

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pretrained=/absent/model", "/absent/model: no such file or folder"),
        ("pretrained={plain},peft=adapter", "peft='adapter' cannot be served"),
        ("pretrained={plain},mixer=allmem", "has no memory: convert it"),
        ("window=8", "pretrained is missing"),
    ],
)
def test_errors_of_the_command_are_one_line(plain, command, capsys, arguments, message):
    assert command(arguments.format(plain=plain)) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("allmem: error: ") and message in last


def test_command_line(converted, command, tmp_path, capsys):
    """From a task file to a file of results."""
    arguments = f"pretrained={converted},window=24,chunk=8,batch_size=2,dtype=float32,max_length=512"
    assert command(arguments, "--limit", "2", "--output_path", str(tmp_path / "out")) == 0
    assert "|read" in capsys.readouterr().out
    (path,) = (tmp_path / "out").rglob("results_*.json")
    saved = json.loads(path.read_text())
    assert saved["results"]["read"]["byte_perplexity,none"] > 1
    assert saved["config"]["model_window"] == 24 and saved["max_length"] == 512
