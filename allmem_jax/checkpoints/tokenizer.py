"""Tokenizers and chat templates, from a Hugging Face folder or out of a GGUF file.

A GGUF file holds a vocabulary, merges and a template, not a tokenizer: it is put together here with the `tokenizers`
package, the way llama.cpp reads the same fields. Nothing here needs torch or a network.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from allmem_jax.checkpoints import gguf_reader
from allmem_jax.storage import stores

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_CONTROL, _USER_DEFINED = 3, 4  # token types of llama.cpp
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How text is cut before merging, by `tokenizer.ggml.pre`; None is GPT-2's own pattern.
_SPLITS: dict[str, str | None] = {
    "default": None,
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": _WORDS + r"|\p{N}{1,3}" + _REST,
    "llama3": _WORDS + r"|\p{N}{1,3}" + _REST,
    "llama-v3": _WORDS + r"|\p{N}{1,3}" + _REST,
    "qwen2": _WORDS + r"|\p{N}" + _REST,
    "deepseek-r1-qwen": _WORDS + r"|\p{N}" + _REST,
    "tekken": _TEKKEN,
}
# These put the first token before a text where the file does not say, and take a whole word that is a token as it is.
_LLAMA3_LIKE = ("llama-bpe", "llama3", "llama-v3", "tekken")


def load_tokenizer(path: str | os.PathLike[str]) -> transformers.PreTrainedTokenizerBase | None:
    """The tokenizer of a Hugging Face folder or a GGUF file; None when there is no tokenizer in it.

    What it encodes can be continued: it begins as the model's texts begin and no EOS closes it, whatever the files ask
    for (`save_tokenizer` gives that back). What it decodes is exact: no space before punctuation is cleaned away.

    Raises:
      ValueError: the tokenizer is damaged or of an unsupported kind.
    """
    path = stores.local(path).expanduser()
    if path.is_file():
        file = gguf_reader.open_gguf(path)
        with _one_line(path):
            return from_gguf(file) if "tokenizer.ggml.model" in file.metadata else None
    if not any((path / name).is_file() for name in _FILES):
        return None
    with _one_line(path):
        tokenizer = _from_folder(path)
    tokenizer.clean_up_tokenization_spaces = tokenizer.init_kwargs["clean_up_tokenization_spaces"] = False
    _leave_open(tokenizer)
    return tokenizer


@contextlib.contextmanager
def _one_line(path: pathlib.Path) -> Iterator[None]:
    """Makes one kind of error, on one line, of whatever transformers and tokenizers raise for damaged files."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        hint = "" if path.is_file() else "; copy the original's tokenizer.json"
        raise ValueError(f"{path}: cannot load the tokenizer: {reason}{hint}") from error


def _from_folder(path: pathlib.Path) -> transformers.PreTrainedTokenizerBase:
    options: dict[str, Any] = dict(local_files_only=True, trust_remote_code=False)
    if (path / "tokenizer.json").is_file() or not (path / "tokenizer.model").is_file():
        return transformers.AutoTokenizer.from_pretrained(path, **options)
    # The class that a sentencepiece model's config names has rules of its own for normalising and for the space before
    # a text; this one takes those of the model file, and "legacy" is the name of sentencepiece's way with that space.
    options |= {"legacy": True}
    if "add_bos_token" not in _settings(path):
        options |= {"add_bos_token": True}
    return transformers.PreTrainedTokenizerFast.from_pretrained(path, **options)


def _settings(path: pathlib.Path) -> dict[str, Any]:
    file = path / "tokenizer_config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _leave_open(tokenizer: Any) -> None:
    """Takes away what is put behind a text, and keeps the file's way aside as `closing`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.post_processor is None:
        return
    tokenizer.closing = backend.post_processor.__getstate__()
    _set_processor(tokenizer, json.dumps(_opened(json.loads(tokenizer.closing))).encode())
    tokenizer._add_eos_token = False  # its setter would make a processor anew, from less than the file says


def _set_processor(tokenizer: Any, state: bytes) -> None:
    processor = tokenizer.backend_tokenizer.post_processor
    processor.__setstate__(state)
    tokenizer.backend_tokenizer.post_processor = processor


def _opened(processor: dict[str, Any]) -> dict[str, Any]:
    """A post-processor, as `tokenizers` writes it in JSON, without the special tokens after the (last) text."""
    if processor["type"] == "Sequence":
        return processor | {"processors": [_opened(each) for each in processor["processors"]]}
    if processor["type"] != "TemplateProcessing":
        return processor
    opened = {}
    for key in ("single", "pair"):
        texts = [index for index, piece in enumerate(processor[key]) if "Sequence" in piece]
        opened[key] = processor[key][: texts[-1] + 1]
    return processor | opened


def save_tokenizer(tokenizer: transformers.PreTrainedTokenizerBase, folder: str | os.PathLike[str]) -> None:
    """Writes a tokenizer's files; one that `load_tokenizer` left open is closed in them as its source was."""
    source: Any = tokenizer
    if not hasattr(source, "closing"):
        source.save_pretrained(folder)
        return
    opened = source.backend_tokenizer.post_processor.__getstate__()
    try:
        _set_processor(source, source.closing)
        source.save_pretrained(folder)
    finally:
        _set_processor(source, opened)


def encode_prompt(tokenizer: transformers.PreTrainedTokenizerBase, text: str, begins: bool = True) -> list[int]:
    """The ids of a text that is to be continued: what the model's texts begin with, once, and no EOS behind.

    A text that begins with the BOS token in words, as a rendered chat template may, gets no second one; nor does one
    that does not begin anything (`begins` False), as it goes on from what was read before.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    before = prefix_tokens(tokenizer) if begins else []
    return ids if ids[: len(before)] == before else before + ids


def from_gguf(file: gguf_reader.GGUFFile) -> transformers.PreTrainedTokenizerFast:
    """Builds the tokenizer that a GGUF file's metadata describes."""
    prefix = "tokenizer.ggml."
    fields = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    kind, pre, tokens = fields.get("model"), fields.get("pre", "default"), fields.get("tokens")
    if not isinstance(kind, str) or kind not in ("gpt2", "llama") or not isinstance(tokens, list):
        raise ValueError(f"tokenizer {kind!r:.80} is not supported; supported in GGUF: 'gpt2', 'llama'")
    if kind == "gpt2" and not (isinstance(pre, str) and pre in _SPLITS):
        raise ValueError(f"pre-tokenizer {pre!r:.80} is not supported; supported: {', '.join(_SPLITS)}")
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {f"{name}_token": fields.get(f"{key}_token_id", -1) for name, key in names.items()}
    special = {name: tokens[index] for name, index in ids.items() if 0 <= index < len(tokens)}
    if kind == "gpt2":
        backend = _byte_level(fields, pre)
    else:
        gemma = str(file.metadata.get("general.architecture")).startswith("gemma")
        backend = _sentencepiece(fields, special.get("unk_token"), gemma)
    _add_special(backend, tokens, fields.get("token_type", ()))
    add_bos = bool(fields.get("add_bos_token", kind == "llama" or pre in _LLAMA3_LIKE)) and "bos_token" in special
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, add_bos_token=add_bos, clean_up_tokenization_spaces=False, **special
    )
    tokenizer.chat_template = file.metadata.get("tokenizer.chat_template")
    return tokenizer


def _byte_level(fields: Mapping[str, Any], pre: str) -> tokenizers.Tokenizer:
    """Byte-level BPE, as GPT-2, Llama 3, Qwen and SmolLM have it."""
    vocab = {token: index for index, token in enumerate(fields["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields.get("merges", ())]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=pre in _LLAMA3_LIKE))
    split = _SPLITS[pre]
    first: list[pre_tokenizers.PreTokenizer] = []
    if pre == "smollm":
        first = [pre_tokenizers.Digits(individual_digits=True)]
    elif split is not None:
        first = [pre_tokenizers.Split(tokenizers.Regex(split), behavior="isolated")]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])
    if "qwen" in pre:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(fields: Mapping[str, Any], unknown: str | None, gemma: bool) -> tokenizers.Tokenizer:
    """BPE over text in which "\u2581" stands for a space, as Llama 2, Mistral and Gemma have it."""
    tokens = fields["tokens"]
    if gemma:  # runs of spaces are stored as such, and scores do not follow the order of the merges
        tokens = ["\u2581" * len(token) if token and not token.strip(" ") else token for token in tokens]
    ranks = range(len(tokens)) if gemma else [-score for score in fields.get("scores", range(0, -len(tokens), -1))]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = (
        [tuple(merge.split(" ")) for merge in fields["merges"]] if "merges" in fields else _merges(tokens, vocab, ranks)
    )
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    decode = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if gemma:
        backend.normalizer = normalizers.Replace(" ", "\u2581")
        backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    else:
        prefix = bool(fields.get("add_space_prefix", True))
        scheme = "first" if prefix else "never"
        backend.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme=scheme, split=False)
        decode += [decoders.Strip(" ", left=1)] if prefix else []
    backend.decoder = decoders.Sequence(decode)
    return backend


def _merges(tokens: Sequence[str], vocab: Mapping[str, int], ranks: Sequence[float]) -> list[tuple[str, str]]:
    """The merges that a vocabulary implies: every cut of a token into two tokens, in the order of the ranks."""
    found = []
    for token, rank in zip(tokens, ranks, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                found.append((rank, len(left), len(right), vocab[left], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _add_special(backend: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Marks the tokens that text is never cut inside of: control tokens, and those that the author added."""
    control: list[tokenizers.AddedToken] = []
    added: list[tokenizers.AddedToken] = []
    for token, kind in zip(tokens, types, strict=False):
        if kind in (_CONTROL, _USER_DEFINED) and backend.token_to_id(token) is not None:
            special = bool(kind == _CONTROL)
            (control if special else added).append(tokenizers.AddedToken(token, normalized=False, special=special))
    backend.add_special_tokens(control)
    backend.add_tokens(added)


def prefix_tokens(tokenizer: Any) -> list[int]:
    """What a tokenizer puts before a text: its begin-of-sequence token where it has one, never what ends a text.

    The encoding of no text at all would not tell the two apart.
    """
    text = "a"
    bare, whole = tokenizer.encode(text, add_special_tokens=False), tokenizer.encode(text)
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return list(whole[:start])
    return []
