"""The arguments of lm_eval's Hugging Face model (`hf`) as `--model allmem` takes them.

Those that `AllMemHarness` does not have either change no answer here, or can have one value, or are refused.
"""

import json
import logging
import pathlib
from typing import Any

import jax

# Where a model lies, runs and how it is read: answers are the same whatever these say.
WITHOUT_EFFECT = """revision logits_cache use_fast_tokenizer max_memory_per_gpu max_cpu_memory offload_folder device_map
attn_implementation low_cpu_mem_usage local_files_only cache_dir use_cache""".split()
# Argument -> the values that ask for what happens here anyway, and what to do instead of another one.
ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "backend": (("default", "causal"), "models here are decoders"),
    "trust_remote_code": ((None, False), "a model's own code is not run; leave it out"),
    "softmax_dtype": ((None, "float32"), "log-probabilities are float32; leave it out"),
    "mixed_precision_dtype": ((None,), "give dtype=bfloat16"),
    "parallelize": ((None, False), "a model runs on one device; leave it out"),
    "tp_plan": ((None,), "a model runs on one device; leave it out"),
    "use_safetensors": ((None, True), "weights are read from safetensors; leave it out"),
    "quantization_config": ((None,), "weights are read as they are; a quantized model can be a .gguf file"),
    "load_in_8bit": ((None, False), "weights are read as they are; a quantized model can be a .gguf file"),
    "load_in_4bit": ((None, False), "weights are read as they are; a quantized model can be a .gguf file"),
    "autogptq": ((None, False), "weights are read as they are; a quantized model can be a .gguf file"),
    "gptqmodel": ((None, False), "weights are read as they are; a quantized model can be a .gguf file"),
    "peft": ((None,), "merge the adapter into the model's weights first"),
    "delta": ((None,), "add it to the model's weights first"),
}
AUTO_BATCH = 8
_KINDS: dict[type, str] = {bool: "True or False", int: "a whole number", dict: "a dict, such as {'name': value}"}
# What changes greedy answers, and the values that do not.
_PROCESSORS = {
    "repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "bad_words_ids": [],
}
logger = logging.getLogger(__name__)


def check_others(given: dict[str, Any], known: list[str]) -> None:
    """ValueError that names an argument which is not known, or the value of one that cannot be served.

    Args:
      given: the arguments that `AllMemHarness` does not have.
      known: the names of those that it has.
    """
    for name, value in given.items():
        if name in WITHOUT_EFFECT:
            continue
        if name not in ONLY:
            raise ValueError(f"{name} is no argument of --model allmem, which takes {', '.join(known)}")
        values, instead = ONLY[name]
        if value not in values:
            raise ValueError(f"{name}={value!r} cannot be served: {instead}")


def check_kinds(kind: type, **given: Any) -> None:
    """ValueError that names an argument which is neither None nor of a kind (bool, int, dict); no bool is an int."""
    for name, value in given.items():
        if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is int)):
            raise ValueError(f"{name}={value!r} must be {_KINDS[kind]}")


def batch_size(given: int | str, most: int | None) -> int:
    """Rows of a batch. "auto" and "auto:N" are a fixed number: a batch has one shape, and nothing is tried out."""
    if str(given).split(":")[0] == "auto":
        size = max(1, min(AUTO_BATCH, most or AUTO_BATCH))
        logger.warning("batch_size=%s: %d rows, a fixed number here; give another as batch_size", given, size)
        return size
    if not str(given).isdigit() or int(given) < 1:
        raise ValueError(f"batch_size={given!r} must be a positive number, or auto")
    return int(given)


def locate(pretrained: str, subfolder: str | None, gguf_file: str | None) -> pathlib.Path:
    """The folder or the .gguf file."""
    return pathlib.Path(pretrained).expanduser() / (subfolder or "") / (gguf_file or "")


def dtype(given: Any, path: pathlib.Path) -> str:
    """A dtype by name; "auto" is bfloat16 where config.json says so of the weights, and float32 for all others."""
    name = str(given).removeprefix("torch.")
    if name != "auto":
        return name
    config = _read(path / "config.json")
    stored = config.get("dtype", config.get("torch_dtype"))
    chosen = "bfloat16" if stored == "bfloat16" else "float32"
    if stored not in (chosen, None):
        logger.warning("dtype=auto: the weights are %s and run in %s", stored, chosen)
    return chosen


def say_device(device: str | None) -> None:
    """A line where another device than the one that is named will be used."""
    platform = jax.default_backend()
    wanted = str(device).split(":")[0].replace("cuda", "gpu")
    if device is not None and wanted != platform:
        logger.warning("device=%s: JAX runs on %s; JAX_PLATFORMS chooses another", device, platform)


def end_tokens(path: pathlib.Path) -> list[int] | None:
    """The ids at which transformers stops with a folder's files; None where it is no folder that says so.

    They are those of generation_config.json, and of config.json where that file is missing. What else the file says
    that would change greedy answers is not done here, which a line tells.
    """
    files = [file for name in ("generation_config.json", "config.json") if (file := path / name).is_file()]
    if not files:
        return None
    found = _read(files[0])
    changing = {name: found[name] for name, neutral in _PROCESSORS.items() if found.get(name) not in (None, neutral)}
    if changing:
        logger.warning("%s sets %s, which --model hf applies and --model allmem does not", files[0], changing)
    ends = found.get("eos_token_id")
    return [each for each in (ends if isinstance(ends, list) else [ends]) if isinstance(each, int)]


def _read(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object of a folder; empty where there is none, or none that can be read: loading says so."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
