"""The `allmem` command: convert, generate, chat, evaluate, recall, report, info, cost, longbench.

What a command needs is imported when it runs, so that help is quick. Expected failures end as one line on stderr and
exit code 2.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import tyro

Mixer = Literal["allmem", "mamba2", "delta", "swa", "full"]
DType = Literal["float32", "bfloat16"]
Suite = Literal["longbench", "longbench_e", "infinitebench", "lveval"]
Variant = Literal["allmem", "mamba2", "delta", "write_off", "swa", "full"]
Part = Literal["distance", "answers", "cost", "latency"]


def _read(given: list[str]) -> pathlib.Path:
    """What to read in place of an argument, which may be a URL."""
    from allmem_jax.storage import stores

    try:
        return stores.local(given[0])
    except ValueError as error:
        raise OSError(str(error)) from None  # of a ValueError tyro would not say the reason


_READ: tyro.constructors.PrimitiveConstructorSpec[pathlib.Path] = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="PATH",
    instance_from_str=_read,
    is_instance=lambda value: isinstance(value, pathlib.Path),
    str_from_instance=lambda value: [str(value)],
)
ReadPath = Annotated[pathlib.Path, _READ]
Model = Annotated[ReadPath, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
ModelOrPreset = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
Data = Annotated[ReadPath, tyro.conf.Positional, tyro.conf.arg(metavar="DATA_DIR")]
Out = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
Prompt = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]
Models = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL ...")]
Texts = Annotated[tuple[ReadPath, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TEXT ...")]


@dataclasses.dataclass(frozen=True)
class Mixing:
    """How a model on disk is to run."""

    memory: str | None = None
    """A trained memory for a model without one: a file, or the name of one that comes with this package, such as
    smollm2-135m-instruct. Window, sinks and chunk are then those it was trained with."""
    mixer: Mixer | None = None
    """allmem: window, sinks and memory; mamba2, delta: the same with a baseline in the memory's place; swa: window
    and sinks; full: the original attention. Default: as the model was converted, or full where it has no memory."""
    window: int | None = None
    """Tokens that attention sees; default: what the model was converted with."""
    sinks: int | None = None
    """First tokens that attention always sees."""
    chunk: int | None = None
    """Tokens between two updates of the memory."""
    dtype: DType = "float32"
    """Of weights and activations."""


Options = Annotated[Mixing, tyro.conf.arg(name="")]
Stops = Annotated[tuple[tuple[str, ...], ...], tyro.conf.arg(metavar="TEXT ..."), tyro.conf.UseAppendAction]
Thinking = Literal["on", "off"]


def convert(
    model: Model,
    out: Out,
    memory: str | None = None,
    window: int | None = None,
    sinks: int | None = None,
    chunk: int | None = None,
    n_mem: int | None = None,
    d_mem: int | None = None,
    read_out: Literal["difference", "full"] | None = None,
    delay: bool | None = None,
    qk_scale: Literal["l2", "rms"] | None = None,
    start: Literal["attention", "random"] | None = None,
    texts: tuple[pathlib.Path, ...] = (),
    seed: int = 0,
    dtype: DType = "float32",
    overwrite: bool = False,
) -> None:
    """Add a memory to a pretrained model: a fresh one, or one that was trained for it.

    The output scale of a fresh one starts at zero: until it is trained, the result equals the model with windowed
    attention and sinks. Its defaults are what was found to work; the paper's are one option away each. The folder stays
    a valid Hugging Face model (the original), with the memory beside it in allmem.safetensors.

    Example: allmem convert SmolLM2-135M-Instruct.Q4_1.gguf smollm2-allmem --window 128 --sinks 4 --chunk 64

    Args:
        model: Hugging Face folder (safetensors) or .gguf file; like all that is read, it may be a URL (gs://, s3://).
        out: Folder to write, or its URL.
        memory: A trained memory: a file, or the name of one that comes with this package.
        window: Tokens that attention sees, the current one among them. Default: 4096; as a trained memory has it.
        sinks: First tokens that attention always sees. Default: 128; as a trained memory has it.
        chunk: Tokens between two updates of the memory; more than the window leaves a blind gap. Default: 2048; as a
            trained memory has it.
        n_mem: Heads of the memory. Default: the model's key-value heads, but at most 8, and 4 where it has one or two.
        d_mem: Dimension of a head of the memory. Default: 64.
        read_out: What is read of the memory: the difference of f(W, q) to that of the initial weights, which is silent
            until something was written, or f(W, q) itself (full, the paper). Default: difference.
        delay: Write a token when it leaves the window (True), so that the memory adds nothing within, or as it comes
            (False, the paper). Default: True.
        qk_scale: Norm of the memory's queries and keys: 1 (l2, the paper and the default) or sqrt(d_mem) (rms).
        start: What the memory starts from: the projections of each layer's attention, with learning rates that are
            fitted to a text, or random ones (the paper). Default: attention.
        texts: UTF-8 text files for that; default: Python's documentation.
        seed: Of the memory's initial values.
        dtype: Of the weights that are written.
        overwrite: Replace what is in the folder.
    """
    from allmem_jax.storage import stores

    if stores.taken(out) and not overwrite:
        raise FileExistsError(f"{out} exists: give another folder, or add --overwrite to replace it")
    stores.check_writable(out)
    from allmem_jax.checkpoints import load as load_lib
    from allmem_jax.checkpoints import save as save_lib
    from allmem_jax.evaluation import cost
    from allmem_jax.model import lm as model_lib

    _say(f"reading {model}")
    sizes = _set(dict(window=window, sinks=sinks, chunk=chunk))
    shape = _set(dict(n_mem=n_mem, d_mem=d_mem, read_out=read_out, delay=delay, qk_scale=qk_scale))
    if memory is None:
        sizes = dict(window=4096, sinks=128, chunk=2048) | sizes
        shape, start = dict(read_out="difference", delay=True) | shape, start or "attention"
    elif shape or start:
        raise ValueError(f"memory={memory}: a trained memory is as it is; leave out {', '.join(shape) or 'start'}")
    config, params, tokenizer = load_lib.load_pretrained(model, dtype=dtype, memory=memory, **shape, **sizes)
    config = config.replace(mixer=config.memory_mixer)
    backbone, added = model_lib.split_params(params)
    if start == "attention":
        added = _memory_from_attention(config, backbone, tokenizer, texts, seed)
    elif memory is None:
        added = model_lib.init_memory(config, seed)
    params = model_lib.merge_params(backbone, added)
    _say(f"writing {out}")
    save_lib.save_pretrained(out, config, params, tokenizer, overwrite=overwrite)
    groups = cost.parameter_groups(config)
    print(
        f"{out}: {groups['memory'] / 1e6:.1f} M parameters of memory added, {cost.added_share(config):.1%} of the model"
    )


def _memory_from_attention(config: Any, backbone: Any, tokenizer: Any, texts: Sequence[pathlib.Path], seed: int) -> Any:
    from allmem_jax.checkpoints import start as start_lib
    from allmem_jax.evaluation import divergence_report

    if tokenizer is None:
        raise ValueError(
            "start=attention reads a text, and the model has no tokenizer: copy the original's tokenizer.json into the "
            "folder, or give --start random"
        )
    text = "\n".join(divergence_report.read_texts(texts).values())[: 16 * start_lib.LENGTH]
    tokens = tokenizer.encode(text, add_special_tokens=False)[: start_lib.LENGTH]
    progress = _progress(config.n_layers, "starting the memory from the attention")
    return start_lib.from_attention(config, backbone, tokens, seed, progress)


def generate(
    model: Model,
    prompt: Prompt,
    mixing: Options = Mixing(),
    max_tokens: int = 200,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Stops = (),
    chat: bool = False,
    thinking: Thinking | None = None,
) -> None:
    """Continue a text; it appears as it is written.

    Example: allmem generate smollm2-allmem "Call me Ishmael." --max-tokens 100

    Example: cat book.txt question.txt | allmem generate smollm2-allmem - --temperature 0.7 --top-p 0.9

    Args:
        model: Converted folder, Hugging Face folder (safetensors) or .gguf file.
        prompt: Text to continue; - reads standard input. One that begins with a dash goes last, after --.
        max_tokens: Longest continuation, in tokens.
        temperature: 0 takes the likeliest token each time.
        top_k: Draw from the k likeliest tokens; 0 is all.
        top_p: Draw from the likeliest tokens that together reach this probability.
        seed: Of the draws.
        stop: Texts to stop at, which are not shown; may be given several times.
        chat: Take the prompt as a user's message, in the model's chat template.
        thinking: With --chat, whether the model thinks aloud first; default: as its template has it.
    """
    from allmem_jax.checkpoints import tokenizer as tokenizer_lib
    from allmem_jax.decoding import chat as chat_lib
    from allmem_jax.decoding import generation

    if thinking and not chat:
        raise ValueError(f"--thinking {thinking} is a switch of the chat template: add --chat")
    prompt, stops = _unicode("the prompt", sys.stdin.read() if prompt == "-" else prompt), _stops(stop)
    if not prompt.strip():
        raise ValueError("the prompt is empty: give some text to continue, or - to read it from standard input")
    sampling = generation.Sampling(temperature, top_k, top_p)
    sampling.check()
    config, params, tokenizer = _load(model, mixing)
    _check_window(mixing, [config.mixer])
    if chat:
        talk = chat_lib.Conversation(
            params, config, tokenizer, sampling, max_tokens, seed, stop=stops, thinking=_switch(thinking)
        )
        return _print_stream(talk.reply(prompt))
    pieces = chat_lib.complete(
        params,
        config,
        tokenizer,
        prompt,
        max_tokens=max_tokens,
        sampling=sampling,
        seed=seed,
        stop=stops,
        progress=_progress(len(tokenizer_lib.encode_prompt(tokenizer, prompt)), "reading the prompt"),
    )
    print(prompt, end="", flush=True)
    return _print_stream(pieces)


def chat(
    model: Model,
    mixing: Options = Mixing(),
    system: str = "",
    max_tokens: int = 512,
    temperature: float = 0.7,
    top_k: int = 0,
    top_p: float = 0.9,
    seed: int = 0,
    stop: Stops = (),
    thinking: Thinking | None = None,
    context: int = 4096,
) -> None:
    """Talk with an instruction-tuned model. An empty line or Ctrl-D ends it.

    A converted model keeps a state of constant size: a turn costs its own tokens, however long the chat is.

    Example: allmem chat smollm2-allmem --system "Answer in one sentence."

    Example: allmem chat SmolLM2-135M-Instruct.Q4_1.gguf --memory smollm2-135m-instruct

    Args:
        model: Converted folder, Hugging Face folder (safetensors) or .gguf file.
        system: What the model is told first.
        max_tokens: Longest answer, in tokens.
        temperature: 0 takes the likeliest token each time.
        top_k: Draw from the k likeliest tokens; 0 is all.
        top_p: Draw from the likeliest tokens that together reach this probability.
        seed: Of the draws.
        stop: Texts that end an answer, without being shown; may be given several times.
        thinking: Whether the model thinks aloud before it answers; default: as its template has it.
        context: Longest chat with full attention, in tokens.
    """
    from allmem_jax.decoding import chat as chat_lib
    from allmem_jax.decoding import generation

    sampling = generation.Sampling(temperature, top_k, top_p)
    sampling.check()
    stops, system = _stops(stop), _unicode("the system message", system)
    config, params, tokenizer = _load(model, mixing)
    _check_window(mixing, [config.mixer])
    messages = [{"role": "system", "content": system}] if system else []
    talk = chat_lib.Conversation(
        params, config, tokenizer, sampling, max_tokens, seed, context, messages, stops, _switch(thinking)
    )
    while line := _ask():
        _print_stream(talk.reply(line))


def evaluate(
    model: Model,
    texts: Texts,
    mixing: Options = Mixing(),
    out: pathlib.Path = pathlib.Path("out/evaluation"),
    length: int = 2048,
    sequences: int = 2,
    batch: int = 1,
) -> None:
    """Compare a converted model with its original on text files.

    Reports the KL from the original inside and beyond the window, for windowed attention alone, with the memory, and
    with the memory's writing off, as JSON, PNG and one HTML page. Without a text, Python's documentation is read.

    Example: allmem evaluate smollm2-allmem moby_dick.txt persuasion.txt --out out/books

    Args:
        model: Converted folder, Hugging Face folder (safetensors) or .gguf file.
        texts: UTF-8 text files.
        out: Folder to write report.json, distance.png and index.html to.
        length: Tokens of a sequence.
        sequences: Sequences from each text, spread over it.
        batch: Sequences run together.
    """
    from allmem_jax.evaluation import divergence_report
    from allmem_jax.reporting import page as page_lib
    from allmem_jax.reporting import sections

    _check_folder(out)
    named = divergence_report.read_texts(texts)
    config, params, tokenizer = _load(model, mixing)
    sizes = {"length": length, "sequences": sequences, "batch": batch}
    command = sections.command("evaluate", model, *texts, **vars(mixing), out=out, **sizes)
    section = divergence_report.measure(config, params, tokenizer, named, **sizes, command=command)
    settings = sections.Table("", ("setting", "value"), tuple((k, str(v)) for k, v in vars(config).items()))
    described = sections.Section("settings", "Settings", command, tables=(settings,))
    page = page_lib.write(out, page_lib.Report(f"{model.name} against its original", (section, described)))
    for name, rows in section.data["texts"].items():
        beyond = (f"{key} {page_lib.number(row['kl_beyond'])}" for key, row in rows.items() if "kl_beyond" in row)
        print(f"{name}: KL beyond the window: {', '.join(beyond)}")
    print(f"report: {page}")


def report(
    model: Model,
    texts: Texts = (),
    out: pathlib.Path = pathlib.Path("out/report"),
    length: int | None = None,
    sequences: int = 2,
    prompt_length: int | None = None,
    samples: int = 8,
    questions: ReadPath | None = None,
    longbench: ReadPath | None = None,
    suite: Suite = "longbench",
    skip: tuple[Part, ...] = (),
    include: tuple[ReadPath, ...] = (),
    dtype: DType = "float32",
) -> int:
    """Measure a converted model in every way that this machine can, on one HTML page with plots.

    Each section names the command that makes it alone. What a part has measured is kept in the folder: a second run
    goes on where the first was stopped. A part that fails is shown as failed; the exit code is then 1.

    Example: allmem report smollm2-allmem moby_dick.txt --out out/report

    Args:
        model: Converted folder.
        texts: UTF-8 text files; default: Python's documentation.
        out: Folder to write report.json and index.html to.
        length: Tokens of a sequence; default: 2048, or two windows if that is more.
        sequences: Sequences from each text that are compared with the original.
        prompt_length: Tokens of a prompt that hides something; default: 512, or four windows if that is more.
        samples: Questions of each kind, and examples of each task of LongBench.
        questions: JSON lines with questions about the texts.
        longbench: Folder with the files of LongBench, InfiniteBench or LV-Eval, to be scored too.
        suite: Which of them.
        skip: Parts to leave out.
        include: Section files that other programs wrote, to show as they are.
        dtype: Of weights and activations.
    """
    from allmem_jax.evaluation import full_report

    _check_folder(out)
    settings = full_report.Settings(
        model, texts, out, length, sequences, prompt_length, samples, questions, longbench, suite, skip, include, dtype
    )
    page, failed = full_report.run(settings, lambda: _load(model, Mixing(dtype=dtype)))
    print(f"report: {page}")
    return 1 if failed else 0


def info(
    model: ModelOrPreset,
    context: int = 131072,
    window: int | None = None,
    sinks: int | None = None,
    chunk: int | None = None,
    n_mem: int | None = None,
    dtype: DType = "bfloat16",
) -> None:
    """Show what a model costs: parameters, bytes of state, operations per token. Loads no weights.

    Example: allmem info qwen3-0.6b --context 131072

    Args:
        model: Folder, .gguf file, or the name of a preset.
        context: Tokens seen when the token in question is decoded.
        window: Tokens that attention sees; default: the model's.
        sinks: First tokens that attention always sees.
        chunk: Tokens between two updates of the memory.
        n_mem: Heads of the memory.
        dtype: Of keys, values and activations.
    """
    from allmem_jax.checkpoints import load as load_lib
    from allmem_jax.evaluation import cost

    given = dict(window=window, sinks=sinks, chunk=chunk, n_mem=n_mem)
    config = load_lib.read_config(model).replace(dtype=dtype, **_set(given))
    config = config.replace(mixer=config.memory_mixer)
    groups = cost.parameter_groups(config)
    state = cost.state_bytes(config, context)
    original, converted = (cost.flops_per_token(config, context, mixer) for mixer in ("full", config.mixer))
    if config.mixer == "allmem":
        memory = f"chunk {config.chunk}, memory {config.memory_heads} x {config.d_mem}"
    else:
        memory = f"memory {config.mixer} {' x '.join(map(str, config.linear_state_shape))}"
    print(f"{model}: {config.family}, {config.n_layers} layers, window {config.window}, sinks {config.sinks}, {memory}")
    print("\nparameters (millions)")
    for name, count in groups.items():
        print(f"  {name:<12}{count / 1e6:>12.2f}")
    print(f"  {'total':<12}{sum(groups.values()) / 1e6:>12.2f}   the memory is {cost.added_share(config):.1%}")
    print(f"\nstate of one sequence after {context} tokens (MiB, {dtype})")
    print(f"  full attention {state['full'] / 2**20:>12.1f}")
    print(
        f"  converted      {state[config.mixer] / 2**20:>12.1f}   whatever the length; without memory "
        f"{state['swa'] / 2**20:.1f}"
    )
    print(f"\noperations for the token at {context} (GFLOP)     full   converted")
    for part in original:
        print(f"  {part:<44}{original[part] / 1e9:>8.3f}{converted[part] / 1e9:>12.3f}")
    totals = [sum(parts.values()) / 1e9 for parts in (original, converted)]
    print(f"  {'total':<44}{totals[0]:>8.3f}{totals[1]:>12.3f}   {totals[0] / totals[1]:.2f} x fewer")


def cost(
    models: Models = ("qwen3-0.6b", "qwen3-1.7b"),
    context: int = 131072,
    windows: tuple[int, ...] = (4096, 8192),
    out: pathlib.Path | None = None,
    measure: bool = False,
) -> None:
    """Compare full attention, windows and the memories: operations of a token and bytes of state. Loads no weights.

    By formula, at context lengths from 1,024 to 262,144 tokens. With --measure also in seconds on this machine, on two
    layers of the first model's shape with random weights, at 1,024 to 16,384 tokens.

    Example: allmem cost qwen3-0.6b --measure --out out/cost

    Args:
        models: Folders, .gguf files, or names of presets.
        context: Tokens seen when the token of the table is decoded.
        windows: Tokens that attention sees, in the mixers that have a window; the first is plotted.
        out: Folder to write the figures to, as JSON.
        measure: Measure times as well; takes a few minutes.
    """
    from allmem_jax.checkpoints import load as load_lib
    from allmem_jax.evaluation import cost as cost_lib
    from allmem_jax.evaluation import latency
    from allmem_jax.reporting import sections

    if not models or not windows:
        raise ValueError("models or windows is empty: give at least one folder, .gguf file or preset, and one window")
    if out is not None:
        _check_folder(out)
    command = sections.command("cost", *models, context=context, windows=windows, out=out, measure=measure)
    configs = {name: load_lib.read_config(name).replace(dtype="bfloat16") for name in models}
    made = [cost_lib.section(configs, windows=windows, context=context)]
    if measure:
        name, config = next(iter(configs.items()))
        made.append(latency.section(latency.small(config), name))
    for section in made:
        _print_section(section)
        if out is not None:
            sections.save(out / f"{section.name}.json", dataclasses.replace(section, command=command))


def recall(
    model: Model,
    texts: Texts = (),
    mixing: Options = Mixing(),
    questions: ReadPath | None = None,
    tasks: tuple[str, ...] = (),
    pairs: tuple[int, ...] = (),
    lengths: tuple[int, ...] = (),
    samples: int = 32,
    chat: bool = False,
    seed: int = 0,
    batch: int = 8,
    out: pathlib.Path = pathlib.Path("out/recall"),
) -> None:
    """Ask a converted model, beside its original, for what it read beyond its window, and within.

    Words and numbers are hidden in the texts and asked for; with --questions the texts themselves are asked about. What
    was answered is kept in OUT/parts: a second run goes on where the first was stopped.

    Example: allmem recall smollm2-allmem moby_dick.txt --lengths 512 1024 --samples 64

    Example: allmem recall smollm2-allmem moby_dick.txt --pairs 1 3 8 16 32 --lengths 1000 2000 4000 8000

    Args:
        model: Converted folder, Hugging Face folder (safetensors) or .gguf file.
        texts: UTF-8 text files; default: Python's documentation.
        questions: JSON lines, each a question about one of the texts.
        tasks: Names of tasks; default: those that a small model can do, unless there are pairs to ask.
        pairs: Numbers of names with a word each that a prompt hides at once, as tasks pairs_1, pairs_3 and so on.
        lengths: Tokens of prompt and answer of the long tasks; default: several windows.
        samples: Examples of a task at a length.
        chat: Ask through the model's chat template; otherwise as a text that the answer continues.
        seed: Of the examples.
        batch: Prompts run together.
        out: Folder for the answers and recall.json, a section of a report.
    """
    from allmem_jax.evaluation import divergence_report
    from allmem_jax.evaluation import questions as questions_lib
    from allmem_jax.evaluation import recall as tasks_lib
    from allmem_jax.reporting import sections

    _check_folder(out)
    asked = questions_lib.read_questions(questions) if questions else []
    named = divergence_report.read_texts(texts)
    config, params, tokenizer = _load(model, mixing)
    backbone, variants = tasks_lib.variants(config, params)
    tasks = (*tasks, *(f"pairs_{count}" for count in pairs))
    given = _set(dict(tasks=tasks or None, lengths=lengths or None))
    settings = dataclasses.replace(
        tasks_lib.defaults(config, bool(asked)), samples=samples, chat=chat, seed=seed, batch=batch, **given
    )
    section = tasks_lib.section(
        settings,
        backbone,
        tokenizer,
        named,
        variants,
        questions=asked,
        parts=out / "parts",
        source=_fingerprint(model, mixing),
        command=tasks_lib.command(model, texts, questions, settings, config, out, memory=mixing.memory),
    )
    sections.save(out / f"{section.name}.json", section)
    _print_section(section)


def longbench(
    model: Model,
    data: Data,
    mixing: Options = Mixing(),
    suite: Suite = "longbench",
    tasks: tuple[str, ...] = (),
    mixers: tuple[Variant, ...] = (),
    limit: int | None = None,
    max_length: int = 131072,
    chat: Literal["published", "always", "never"] = "published",
    batch: int = 1,
    out: pathlib.Path = pathlib.Path("out/longbench"),
) -> None:
    """Score a model on local files of LongBench, InfiniteBench or LV-Eval, with their prompts and metrics.

    Predictions are kept in OUT/TASK.jsonl as they are made: a second run goes on where the first was stopped.
    The AllMem paper runs with --window 4096 (or 8192) --sinks 128.

    Example: allmem longbench smollm2-allmem data/LongBench --mixers full swa allmem --out out/longbench

    Args:
        model: Converted folder, Hugging Face folder (safetensors) or .gguf file.
        data: Folder with the published JSON lines, one file a task.
        suite: Which of them.
        tasks: Names of files without .jsonl; default: all that are there.
        mixers: Several to compare; write_off is the memory without its writing. Default: the one of --mixer.
        limit: Only the first so many examples of each task.
        max_length: Tokens of a prompt; longer ones lose their middle.
        chat: When prompts go into the model's chat template: for the tasks that publish so, always, or never.
        batch: Prompts run together.
        out: Folder for the predictions and SUITE.json, a section of a report.
    """
    from allmem_jax.evaluation import longbench as longbench_lib
    from allmem_jax.evaluation import longbench_data
    from allmem_jax.model import config as config_lib
    from allmem_jax.reporting import sections

    _check_folder(out)
    plan = longbench_data.prepare(data, longbench_data.Settings(suite, tasks, limit, max_length, chat, batch))
    for line in plan.skipped:
        _say(f"left out: {line}")
    memory: Any = next((name for name in mixers if name in config_lib.MEMORY_MIXERS), mixing.mixer)
    config, params, tokenizer = _load(model, dataclasses.replace(mixing, mixer=memory))
    mixers = mixers or (config.mixer,)
    _check_window(mixing, mixers)
    variants = longbench_lib.variants(config, params, mixers)
    progress = _progress(sum(plan.counts) * len(variants), "answering")
    results = longbench_lib.run(plan, params, tokenizer, variants, out, lambda: progress(1))
    section = longbench_lib.section(
        results, longbench_lib.command(str(model), plan, config, mixers, out, memory=mixing.memory)
    )
    sections.save(out / f"{suite}.json", section)
    _print_section(section)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, 2 after an expected failure, or what the command says."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["lm-eval"]:
        return _lm_eval(arguments[1:])
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII terminal gets all that it can show
    app = tyro.extras.SubcommandApp()
    for command in (convert, generate, chat, evaluate, recall, report, info, cost, longbench):
        app.command(command)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: _say(f"warning: {message}")
        try:
            code = app.cli(
                prog="allmem",
                description="Language models with a constant-size state. `allmem lm-eval ARGUMENTS` is the command of "
                "lm-evaluation-harness, which knows them as --model allmem.",
                args=_prompt_last(arguments) if arguments[:1] == ["generate"] else arguments,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
        except BrokenPipeError:  # whoever read our output has left
            sys.stdout = None
            return 141
        except UnicodeDecodeError as error:
            _say(f"error: standard input is not UTF-8 text: byte {error.start} cannot be decoded")
            return 2
        except (ValueError, OSError, NotImplementedError) as error:
            _say(f"error: {error}")
            return 2
        except KeyboardInterrupt:
            return 130
    return code or 0


def _prompt_last(arguments: list[str]) -> list[str]:
    """Puts a prompt that begins with a dash last, after --, where it is no option: those have two dashes and no space.

    What follows an option stays where it is, as it may be its value.
    """
    for place, (before, word) in enumerate(itertools.pairwise(arguments), 1):
        option = word == "-h" or (word.startswith("--") and " " not in word.partition("=")[0])
        if word.startswith("-") and not option and not before.startswith("-") and "--" not in arguments:
            return [*arguments[:place], *arguments[place + 1 :], "--", word]
    return arguments


def _lm_eval(arguments: list[str]) -> int:
    """lm_eval's command, whose arguments are its own; 2 where it is not installed."""
    try:
        from allmem_jax.evaluation import harness
    except ImportError as error:
        _say(f"error: {error}")
        return 2
    return harness.main(arguments)


def _load(model: pathlib.Path, mixing: Mixing) -> tuple[Any, Any, Any]:
    """Config, parameters and tokenizer as `mixing` asks for; a memory that is asked for and missing is made."""
    from allmem_jax.checkpoints import load as load_lib

    _say(f"reading {model}")
    return load_lib.load_with_tokenizer(model, **_set(vars(mixing)))


def _fingerprint(model: pathlib.Path, mixing: Mixing) -> str:
    """What tells these parameters from others: the files that they come from."""
    from allmem_jax.checkpoints import memory_file
    from allmem_jax.evaluation import recall as recall_lib

    files = [model] if mixing.memory is None else [model, memory_file.find(mixing.memory)]
    return " ".join(map(recall_lib.fingerprint, files))


def _check_window(mixing: Mixing, mixers: Sequence[str]) -> None:
    """Refuses sizes that nothing would use."""
    given = _set({name: getattr(mixing, name) for name in ("window", "sinks", "chunk")})
    if given and set(mixers) == {"full"}:
        options = " ".join(f"--{name} {value}" for name, value in given.items())
        raise ValueError(
            f"{options}: the model runs with full attention, which has none: add --mixer swa, or leave it out"
        )


def _check_folder(out: pathlib.Path) -> None:
    """Refuses a folder that cannot be written to, before anything is measured for it."""
    from allmem_jax.storage import stores

    stores.check_writable(stores.local_only(out, "out"))


def _stops(given: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    """The stop strings of all --stop."""
    stops = tuple(_unicode("--stop", stop) for several in given for stop in several)
    if "" in stops:
        raise ValueError("--stop is empty: give the text to stop at")
    return stops


def _switch(thinking: Thinking | None) -> bool | None:
    return None if thinking is None else thinking == "on"


def _unicode(what: str, text: str) -> str:
    """`text`, or a ValueError where it was not UTF-8: Python keeps such bytes as halves of surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is not UTF-8 text: character {error.start} cannot be decoded") from None
    return text


def _set(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _ask() -> str:
    try:
        return _unicode("the message", input("> " if sys.stdin.isatty() else "").strip())
    except EOFError:
        return ""


def _print_section(section: Any) -> None:
    """Paragraphs, and tables in columns of text."""
    print(f"{section.title}\n", *section.text, sep="\n")
    for table in section.tables:
        rows = [table.header, *table.rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        print(f"\n{table.caption}")
        for first, *rest in rows:
            print("  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]))
    print()


def _print_stream(pieces: Iterator[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def _progress(total: int, what: str) -> Callable[[int], Any]:
    """A bar on stderr that closes itself when full; call it with the number of units just done."""
    import tqdm

    bar = tqdm.tqdm(total=total, desc=what, leave=False, disable=not sys.stderr.isatty())

    def update(count: int) -> None:
        bar.update(count)
        if bar.n >= total:
            bar.close()

    return update


def _say(message: str) -> None:
    print(f"allmem: {message}", file=sys.stderr, flush=True)
