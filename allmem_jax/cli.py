"""The `allmem` command: convert, generate, chat, evaluate, info.

What a command needs is imported when it runs, so that help is quick. Expected failures end as one line on stderr and
exit code 2.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import tyro

Mixer = Literal["allmem", "swa", "full"]
DType = Literal["float32", "bfloat16"]


Model = Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
ModelOrPreset = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
Out = Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
Prompt = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]
Texts = Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TEXT ...")]


@dataclasses.dataclass(frozen=True)
class Mixing:
    """How a model on disk is to run."""

    mixer: Mixer | None = None
    """allmem: window, sinks and memory; swa: window and sinks; full: the original attention. Default: allmem where
    the model has a memory, else full."""
    window: int | None = None
    """Tokens that attention sees; default: what the model was converted with."""
    sinks: int | None = None
    """First tokens that attention always sees."""
    chunk: int | None = None
    """Tokens between two updates of the memory."""
    dtype: DType = "float32"
    """Of weights and activations."""


Options = Annotated[Mixing, tyro.conf.arg(name="")]


def convert(
    model: Model,
    out: Out,
    window: int = 4096,
    sinks: int = 128,
    chunk: int = 2048,
    n_mem: int | None = None,
    d_mem: int = 64,
    qk_scale: Literal["l2", "rms"] = "l2",
    seed: int = 0,
    dtype: DType = "float32",
    overwrite: bool = False,
) -> None:
    """Add a fresh memory to a pretrained model.

    The memory's output scale starts at zero: until it is trained, the result equals the model with windowed attention
    and sinks. The folder stays a valid Hugging Face model (the original), with the memory in allmem.safetensors.

    Example: allmem convert SmolLM2-135M-Instruct.Q4_1.gguf smollm2-allmem --window 128 --sinks 4 --chunk 64

    Args:
        model: Hugging Face folder (safetensors) or .gguf file.
        out: Folder to write.
        window: Tokens that attention sees, the current one among them.
        sinks: First tokens that attention always sees.
        chunk: Tokens between two updates of the memory; more than the window leaves a blind gap.
        n_mem: Heads of the memory. Default: the model's key-value heads.
        d_mem: Dimension of a head of the memory.
        qk_scale: Norm of the memory's queries and keys: 1 (l2, the paper) or sqrt(d_mem) (rms).
        seed: Of the memory's initial values.
        dtype: Of the weights that are written.
        overwrite: Replace what is in the folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise FileExistsError(f"{out} exists: give another folder, or add --overwrite to replace it")
    from allmem_jax import convert as convert_lib
    from allmem_jax import cost
    from allmem_jax import model as model_lib

    _say(f"reading {model}")
    sizes = dict(window=window, sinks=sinks, chunk=chunk, d_mem=d_mem, qk_scale=qk_scale)
    config, params, tokenizer = convert_lib.load_pretrained(model, dtype=dtype, n_mem=n_mem, **sizes)
    backbone, _ = model_lib.split_params(params)
    params = model_lib.merge_params(backbone, model_lib.init_memory(config, seed))
    _say(f"writing {out}")
    convert_lib.save_pretrained(out, config, params, tokenizer, overwrite=overwrite)
    groups = cost.parameter_groups(config)
    print(
        f"{out}: {groups['memory'] / 1e6:.1f} M parameters of memory added, {cost.added_share(config):.1%} of the model"
    )


def generate(
    model: Model,
    prompt: Prompt,
    mixing: Options = Mixing(),
    max_tokens: int = 200,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
) -> None:
    """Continue a text; it appears as it is written.

    Example: allmem generate smollm2-allmem "Call me Ishmael." --max-tokens 100

    Example: cat book.txt question.txt | allmem generate smollm2-allmem - --temperature 0.7 --top-p 0.9

    Args:
        model: Converted folder, Hugging Face folder (safetensors) or .gguf file.
        prompt: Text to continue; - reads standard input.
        max_tokens: Longest continuation, in tokens.
        temperature: 0 takes the likeliest token each time.
        top_k: Draw from the k likeliest tokens; 0 is all.
        top_p: Draw from the likeliest tokens that together reach this probability.
        seed: Of the draws.
        chat: Take the prompt as a user's message, in the model's chat template.
    """
    from allmem_jax import generation, text

    prompt = sys.stdin.read() if prompt == "-" else prompt
    if not prompt.strip():
        raise ValueError("the prompt is empty: give some text to continue, or - to read it from standard input")
    sampling = generation.Sampling(temperature, top_k, top_p)
    sampling.check()
    config, params, tokenizer = _load(model, mixing)
    if chat:
        talk = text.Conversation(params, config, tokenizer, sampling, max_tokens, seed)
        return _print_stream(talk.reply(prompt))
    print(prompt, end="", flush=True)
    pieces = text.complete(
        params, config, tokenizer, prompt, max_tokens=max_tokens, sampling=sampling, seed=seed,
        progress=_progress(len(tokenizer.encode(prompt)), "reading the prompt"),
    )  # fmt: skip
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
    context: int = 4096,
) -> None:
    """Talk with an instruction-tuned model. An empty line or Ctrl-D ends it.

    A converted model keeps a state of constant size: a turn costs its own tokens, however long the chat is.

    Example: allmem chat smollm2-allmem --system "Answer in one sentence."

    Args:
        model: Converted folder, Hugging Face folder (safetensors) or .gguf file.
        system: What the model is told first.
        max_tokens: Longest answer, in tokens.
        temperature: 0 takes the likeliest token each time.
        top_k: Draw from the k likeliest tokens; 0 is all.
        top_p: Draw from the likeliest tokens that together reach this probability.
        seed: Of the draws.
        context: Longest chat with --mixer full, in tokens.
    """
    from allmem_jax import generation, text

    sampling = generation.Sampling(temperature, top_k, top_p)
    sampling.check()
    config, params, tokenizer = _load(model, mixing)
    messages = [{"role": "system", "content": system}] if system else []
    talk = text.Conversation(params, config, tokenizer, sampling, max_tokens, seed, context, messages)
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
    with the memory's writing off, as JSON, PNG and one HTML page.

    Example: allmem evaluate smollm2-allmem moby_dick.txt persuasion.txt --out out/books

    Args:
        model: Converted folder, Hugging Face folder (safetensors) or .gguf file.
        texts: UTF-8 text files.
        out: Folder to write report.json, curves.png and index.html to.
        length: Tokens of a sequence.
        sequences: Sequences from each text, spread over it.
        batch: Sequences run together.
    """
    from allmem_jax import evals, report
    from allmem_jax import model as model_lib

    missing = [str(path) for path in texts if not path.is_file()]
    if missing or not texts:
        raise FileNotFoundError(f"no such file: {', '.join(missing)}" if missing else "give at least one text file")
    config, params, tokenizer = _load(model, mixing)
    if config.mixer == "full":
        config = config.replace(mixer="swa")
    backbone, memory = model_lib.split_params(params)
    distinct = len({path.name for path in texts}) == len(texts)
    ids = {path.name if distinct else str(path): _encode(tokenizer, path) for path in texts}
    tokens = {name: evals.cut(text, length, sequences, tokenizer.encode("")) for name, text in ids.items()}
    variants = evals.standard_variants(config, memory if config.mixer == "allmem" else None)
    total = len(texts) * -(-sequences // batch) * len(variants)
    progress = _progress(total, "evaluating")
    results = evals.evaluate(config, backbone, tokens, variants, batch=batch, progress=lambda: progress(1))
    both = len(variants) > 1 and length > config.window
    command = shlex.join(["allmem", "evaluate", str(model), *map(str, texts), "--length", str(length),
                          "--sequences", str(sequences), "--out", str(out)])  # fmt: skip
    page = report.write(
        out,
        report.Report(
            title=f"{model.name} against its original",
            evaluation=results,
            memory=evals.CONVERTED if both else None,
            control=evals.WRITE_OFF if both else None,
            settings=dataclasses.asdict(config),
            commands=[command],
        ),
    )
    for name, rows in results["texts"].items():
        beyond = (f"{key} {report.number(row['kl_beyond'])}" for key, row in rows.items() if "kl_beyond" in row)
        print(f"{name}: KL beyond the window: {', '.join(beyond)}")
    print(f"report: {page}")


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
    from allmem_jax import cost

    given = dict(window=window, sinks=sinks, chunk=chunk, n_mem=n_mem)
    config = _read_config(model).replace(dtype=dtype, mixer="allmem", **_set(given))
    groups = cost.parameter_groups(config)
    state = cost.state_bytes(config, context)
    original, converted = (cost.flops_per_token(config, context, mixer) for mixer in ("full", "allmem"))
    print(f"{model}: {config.family}, {config.n_layers} layers, window {config.window}, sinks {config.sinks}, "
          f"chunk {config.chunk}, memory {config.memory_heads} x {config.d_mem}")  # fmt: skip
    print("\nparameters (millions)")
    for name, count in groups.items():
        print(f"  {name:<12}{count / 1e6:>12.2f}")
    print(f"  {'total':<12}{sum(groups.values()) / 1e6:>12.2f}   the memory is {cost.added_share(config):.1%}")
    print(f"\nstate of one sequence after {context} tokens (MiB, {dtype})")
    print(f"  full attention {state['full'] / 2**20:>12.1f}")
    print(f"  converted      {state['allmem'] / 2**20:>12.1f}   whatever the length; without memory "
          f"{state['swa'] / 2**20:.1f}")  # fmt: skip
    print(f"\noperations for the token at {context} (GFLOP)     full   converted")
    for part in original:
        print(f"  {part:<44}{original[part] / 1e9:>8.3f}{converted[part] / 1e9:>12.3f}")
    totals = [sum(parts.values()) / 1e9 for parts in (original, converted)]
    print(f"  {'total':<44}{totals[0]:>8.3f}{totals[1]:>12.3f}   {totals[0] / totals[1]:.2f} x fewer")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, or 2 after an expected failure."""
    app = tyro.extras.SubcommandApp()
    for command in (convert, generate, chat, evaluate, info):
        app.command(command)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: _say(f"warning: {message}")
        try:
            app.cli(
                prog="allmem",
                description="Language models with a constant-size state.",
                args=argv,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
        except BrokenPipeError:  # whoever read our output has left
            sys.stdout = None
            return 141
        except (ValueError, OSError, NotImplementedError) as error:
            _say(f"error: {error}")
            return 2
        except KeyboardInterrupt:
            return 130
    return 0


def _load(model: pathlib.Path, mixing: Mixing) -> tuple[Any, Any, Any]:
    """Config, parameters and tokenizer as `mixing` asks for; a memory that is asked for and missing is made."""
    from allmem_jax import convert as convert_lib
    from allmem_jax import model as model_lib

    _say(f"reading {model}")
    sizes = _set(dict(window=mixing.window, sinks=mixing.sinks, chunk=mixing.chunk))
    config, params, tokenizer = convert_lib.load_pretrained(model, dtype=mixing.dtype, **sizes)
    if tokenizer is None:
        raise ValueError(f"{model} has no tokenizer: copy the original model's tokenizer.json into it")
    remembers = "memory" in params["layers"]
    config = config.replace(mixer=mixing.mixer or ("allmem" if remembers else "full"))
    if config.mixer == "allmem" and not remembers:
        _say(f"{model} has no memory: an untrained one is added, which changes nothing yet")
        params = model_lib.merge_params(params, model_lib.init_memory(config))
    return config, params, tokenizer


def _read_config(name: str) -> Any:
    """The config of a folder, a .gguf file or a preset, without reading weights."""
    from allmem_jax import config as config_lib

    path = pathlib.Path(name).expanduser()
    if not path.exists():
        if "/" in name or name.endswith(".gguf"):
            raise FileNotFoundError(f"{name}: no such file or folder")
        return config_lib.preset(name)
    from allmem_jax import convert as convert_lib
    from allmem_jax import families, gguf_reader

    if path.is_file():
        file = gguf_reader.open_gguf(path)
        factors = file.read("rope_freqs.weight") if "rope_freqs.weight" in file.tensors else None
        return families.config_from_gguf(file.metadata, {k: v.shape for k, v in file.tensors.items()}, factors)
    if (path / convert_lib.ALLMEM_CONFIG).is_file():
        return config_lib.ModelConfig.from_json((path / convert_lib.ALLMEM_CONFIG).read_text())
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} has no config.json: give a Hugging Face folder, a .gguf file or a preset")
    return families.config_from_hf(json.loads((path / "config.json").read_text()))


def _encode(tokenizer: Any, path: pathlib.Path) -> list[int]:
    """The tokens of a text file, special ones not added."""
    try:
        return tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} cannot be decoded") from None


def _set(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


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
