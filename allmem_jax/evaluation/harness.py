"""The model in EleutherAI's lm-evaluation-harness (lm_eval), as `--model allmem`.

    python -m allmem_jax.evaluation.harness --model allmem --model_args pretrained=FOLDER --tasks TASK --batch_size 8

takes lm_eval's own arguments; importing this module is enough for `lm_eval.simple_evaluate(model="allmem", ...)`.
Requests are encoded, truncated and answered as lm_eval's Hugging Face model does it.

    B rows of a batch, always as many    L tokens of a row, padded to a power of two    d model
"""

import functools
import inspect
import logging
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jinja2
import numpy as np
import tqdm

from allmem_jax.checkpoints import layout
from allmem_jax.checkpoints import load as load_lib
from allmem_jax.checkpoints import tokenizer as tokenizer_lib
from allmem_jax.decoding import chat, generation
from allmem_jax.evaluation import harness_arguments, scoring
from allmem_jax.model import config as config_lib
from allmem_jax.model import lm

try:
    import lm_eval.__main__
    from lm_eval import utils as lm_eval_utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import (
        Collator,
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
except ImportError as error:
    raise ImportError(f"the harness needs lm_eval ({error}): pip install 'allmem-jax[eval]'") from None

MAX_LENGTH = 131072  # of a model whose state does not grow; it has no limit of its own
SHORTEST = 32  # tokens of the smallest bucket
logger = logging.getLogger(__name__)


@register_model("allmem")
class AllMemHarness(TemplateLM):
    """A model folder or .gguf file behind lm_eval's interface.

    Every batch is padded to `batch_size` rows and a power of two of tokens, so that each such length is compiled once.
    """

    def __init__(
        self,
        pretrained: str = "",
        mixer: str | None = None,
        window: int | None = None,
        sinks: int | None = None,
        chunk: int | None = None,
        write: bool | None = None,
        dtype: Any = "float32",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        device: str | None = None,
        subfolder: str | None = None,
        gguf_file: str | None = None,
        tokenizer: str | None = None,
        truncation: bool | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        think_end_token: str | int | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: dict[str, Any] | None = None,
        **others: Any,
    ):
        """Loads the model.

        Args:
          pretrained: Hugging Face folder, one that was converted, or a .gguf file.
          mixer: "swa" (window and sinks), "full" (the original attention) or the kind of memory that the model has;
            default: the memory where there is one, else "full".
          window, sinks, chunk, write: replace what the model was converted with; write=False is a memory that
            nothing is written to.
          dtype: "float32", "bfloat16", or "auto" for that of the weights.
          batch_size: rows of a batch; "auto" is 8, or `max_batch_size` if that is less.
          max_batch_size: nothing without "auto".
          max_length: longer inputs lose their first tokens; default: 131072 tokens, with mixer "full" as many as the
            model was trained on.
          device: JAX chooses it; a line says so where it chooses another.
          subfolder, gguf_file: in `pretrained`.
          tokenizer: another folder to take it from.
          truncation: cut prompts to the tokenizer's own longest length before they are continued.
          add_bos_token: whether texts begin with the tokenizer's BOS; default: as it does it by itself.
          prefix_token_id: see the property.
          think_end_token: of what is generated, only what follows this text or id counts.
          enable_thinking, chat_template_args: handed to the chat template.
          **others: the other arguments of lm_eval's Hugging Face model, see `harness_arguments`.

        Raises:
          ValueError: an argument that is not known or cannot be served, no tokenizer, a mixer that the model has no
            memory for, or a number out of range.
        """
        super().__init__()
        if not pretrained:
            raise ValueError("pretrained is missing: give --model_args pretrained=FOLDER, or a .gguf file")
        known = [name for name in inspect.signature(AllMemHarness).parameters if name != "others"]
        harness_arguments.check_others(others, known)
        integers = dict(window=window, sinks=sinks, chunk=chunk, max_batch_size=max_batch_size, max_length=max_length)
        harness_arguments.check_kinds(int, prefix_token_id=prefix_token_id, **integers)
        flags = dict(write=write, truncation=truncation, add_bos_token=add_bos_token, enable_thinking=enable_thinking)
        harness_arguments.check_kinds(bool, **flags)
        harness_arguments.check_kinds(dict, chat_template_args=chat_template_args)
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length={max_length} must be at least 1")
        if enable_thinking and think_end_token is None:
            raise ValueError("enable_thinking=True needs think_end_token, the text or id that ends what was thought")
        self.batch_size = harness_arguments.batch_size(batch_size, max_batch_size)
        self.pretrained = str(harness_arguments.locate(str(pretrained), subfolder, gguf_file))
        self.truncation, self.add_bos_token, self._prefix_token_id = truncation, add_bos_token, prefix_token_id
        thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self.enable_thinking, self.chat_template_args = enable_thinking, (chat_template_args or {}) | thinking
        numbered = isinstance(think_end_token, str) and think_end_token.isdigit()
        self.think_end_token = int(think_end_token) if numbered and think_end_token else think_end_token
        fields = dict(mixer=mixer, window=window, sinks=sinks, chunk=chunk, write=write)
        self._load({name: value for name, value in fields.items() if value is not None}, dtype, tokenizer)
        harness_arguments.say_device(device)
        self.max_length = max_length or (self.config.max_length if self.config.mixer == "full" else MAX_LENGTH)

    def _load(self, fields: dict[str, Any], dtype: Any, tokenizer: str | None) -> None:
        """The model with some fields of its config replaced, its tokenizer or another, and what ends a text."""
        path, mixer = pathlib.Path(self.pretrained), fields.get("mixer")
        if mixer in config_lib.MEMORY_MIXERS and path.exists() and not (path / layout.ALLMEM_WEIGHTS).is_file():
            raise ValueError(f"mixer={mixer!r}, and {path} has no memory: convert it, or give mixer=swa or full")
        self.tokenizer: Any
        dtype = harness_arguments.dtype(dtype, path)
        self.config, self.params, self.tokenizer = load_lib.load_pretrained(path, dtype=dtype, **fields)
        self.tokenizer = self.tokenizer if tokenizer is None else tokenizer_lib.load_tokenizer(tokenizer)
        if self.tokenizer is None or self.tokenizer.eos_token_id is None:
            raise ValueError(f"{tokenizer or path} has no tokenizer with an end of text: copy the original's into it")
        vocabulary = self.config.vocab_size
        if tokenizer is not None and len(self.tokenizer) > vocabulary:
            raise ValueError(f"tokenizer={tokenizer!r} has {len(self.tokenizer)} tokens, and the model {vocabulary}")
        if not 0 <= self.prefix_token_id < vocabulary:
            raise ValueError(f"prefix_token_id={self.prefix_token_id} is outside the vocabulary of {vocabulary}")
        if self.add_bos_token is not None:
            self.tokenizer.add_bos_token = self.add_bos_token
        ends = None if (path / layout.ALLMEM_CONFIG).is_file() else harness_arguments.end_tokens(path)
        stops = chat.stop_tokens(self.tokenizer, self.config) if ends is None else ends
        self.stop_tokens = sorted({*stops, self.tokenizer.eos_token_id})

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> "AllMemHarness":
        """From --model_args, whose options win over flags of the same name (lm_eval always gives a --batch_size)."""
        flags = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**flags | arg_dict)

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What comes before a text that has no context: as asked, or the tokenizer's BOS, or its end of text."""
        choices = (self._prefix_token_id, self.tokenizer.bos_token_id, self.eot_token_id)
        return next(choice for choice in choices if choice is not None)

    @property
    def tokenizer_name(self) -> str:
        """Tells caches of requests apart."""
        return self.pretrained.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval writes beside its results."""
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        fields = ("mixer", "window", "sinks", "chunk", "write", "dtype")
        return {"model_num_parameters": count} | {f"model_{name}": getattr(self.config, name) for name in fields}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text; a BOS that the text has already, from a chat template, is not put there again."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        return self._encode(string, self.add_bos_token if add_special_tokens is None else add_special_tokens)

    def _encode_prompt(self, string: str) -> list[int]:
        """Tokens of what is to be continued, for which lm_eval's own model looks for the BOS alone."""
        begun = self.tokenizer.bos_token is not None and string.startswith(self.tokenizer.bos_token)
        ids = self._encode(string, False if begun else self.add_bos_token, truncation=bool(self.truncation))
        return ids or [self.prefix_token_id]

    def _encode(self, string: str, special: bool | None, **options: Any) -> list[int]:
        return self.tokenizer.encode(string, **({} if special is None else {"add_special_tokens": special}), **options)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, without its system message where the template refuses one."""
        options = dict(tokenize=False, add_generation_prompt=add_generation_prompt) | self.chat_template_args
        options["continue_final_message"] = not add_generation_prompt
        try:
            return self.tokenizer.apply_chat_template(chat_history, **options)
        except jinja2.TemplateError:
            logger.warning("the chat template failed: the system message is left out")
            rest = [message for message in chat_history if message["role"] != "system"]
        try:
            return self.tokenizer.apply_chat_template(rest, **options)
        except jinja2.TemplateError as error:
            raise ValueError(
                f"the chat template fails ({error}): leave out --apply_chat_template, or mend it"
            ) from None

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For (context, continuation) the log-probability of the continuation, and whether it is greedy."""
        if self.enable_thinking:
            raise ValueError("enable_thinking=True is for tasks that generate, and one of these scores given texts")
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For (key, context, continuation) the log-probability of the continuation, and whether it is greedy."""
        self._warn_beyond(max((len(context) + len(rest) for _, context, rest in requests), default=0))
        collator = Collator(requests, sort_fn=lambda r: (-len(r[1]) - len(r[2]), tuple(r[1] + r[2])))
        answers = []
        with _progress(len(requests), "scoring", disable_tqdm) as bar:
            for chunk in collator.get_batched(n=self.batch_size):
                rows = [self._row(*pair) for _, *pair in chunk]
                for (key, _, continuation), values in zip(chunk, self._score(rows), strict=True):
                    log_probs, likeliest = (x[-len(continuation) :] for x in values)
                    answers.append((float(log_probs.sum(dtype=np.float64)), bool(likeliest.all())))
                    if key is not None:
                        self.cache_hook.add_partial("loglikelihood", key, answers[-1])
                bar.update(len(chunk))
        return collator.get_original(answers)

    def _row(self, context: list[int], continuation: list[int]) -> list[int]:
        """Both together, at most `max_length` + 1 tokens: the last one is predicted and not read."""
        if not 0 < len(continuation) <= self.max_length:
            raise ValueError(f"a continuation has {len(continuation)} tokens, not 1 to max_length={self.max_length}")
        return self._fit(context + continuation, self.max_length + 1)

    def _fit(self, ids: list[int], room: int) -> list[int]:
        if len(ids) > room:
            logger.warning("%d tokens, max_length=%d: the first are left out", len(ids), self.max_length)
        return ids[-room:]

    def _warn_beyond(self, longest: int) -> None:
        """A line where inputs that are read whole are longer than those that the model was trained on."""
        trained = self.config.max_length
        if min(longest, self.max_length) > trained:
            logger.warning("inputs have up to %d tokens, and the model was trained on %d", longest, trained)

    def _score(self, rows: list[list[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """What `score` says of all tokens of each row but the first."""
        shape = self.batch_size, generation.bucket(max(map(len, rows)) - 1, SHORTEST)
        tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for index, row in enumerate(rows):
            tokens[index, : len(row) - 1], targets[index, : len(row) - 1] = row[:-1], row[1:]
        log_probs, likeliest = map(np.asarray, scoring.score(self.params, self.config, tokens, targets))
        return [(log_probs[i, : len(row) - 1], likeliest[i, : len(row) - 1]) for i, row in enumerate(rows)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, in windows of `max_length` where they are longer."""
        windows, counts = [], []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            pairs = lm_eval_utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            found = [(None, *lm_eval_utils.make_disjoint_window(pair)) for pair in pairs]
            windows += found
            counts.append(len(found))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        totals = [float(sum(next(scores)[0] for _ in range(count))) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string, the end of a text or turn, or `max_gen_toks` (256 unless told)."""
        lengths = {context: len(self.tok_encode(context)) for context, _ in (request.args for request in requests)}
        self._warn_beyond(max(lengths.values(), default=0))
        collator = Collator(
            [request.args for request in requests],
            sort_fn=lambda pair: (-lengths[pair[0]], pair[0]),
            group_by="gen_kwargs",
            group_fn=lambda pair: pair[1],
        )
        answers: list[str] = []
        with _progress(len(requests), "generating", disable_tqdm) as bar:
            for seed, chunk in enumerate(collator.get_batched(n=self.batch_size)):
                contexts, settings = [context for context, _ in chunk], chunk[0][1]
                for context, answer in zip(contexts, self._continue(contexts, settings, seed), strict=True):
                    answers.append(answer)
                    self.cache_hook.add_partial("generate_until", (context, settings), answer)
                bar.update(len(chunk))
        return collator.get_original(answers)

    def _continue(self, contexts: list[str], settings: dict[str, Any], seed: int) -> list[str]:
        """One batch of `generate_until`."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(settings, 256))
        eos = self.tokenizer.decode(self.eot_token_id)
        until, most = handle_stop_sequences(options.pop("until"), eos), options.pop("max_gen_toks")
        drawn = {name: options.pop(name) for name in ("temperature", "top_k", "top_p") if name in options}
        sampling = generation.Sampling(**drawn) if options.pop("do_sample") else generation.GREEDY
        if options.pop("num_beams", 1) != 1 or options:
            raise ValueError(
                f"generation_kwargs={settings}: only until, max_gen_toks, do_sample, temperature, top_k "
                "and top_p can be set"
            )
        if most >= self.max_length:
            raise ValueError(f"max_gen_toks={most} leaves no room for a prompt in max_length={self.max_length}")
        prompts = [self._fit(self._encode_prompt(context), self.max_length - most) for context in contexts]
        answers = self._generate(prompts, most, sampling, [term for term in until if term], seed)
        return [self._text(ids, until) for ids in answers]

    @functools.cached_property
    def _decoding(self) -> lm.Params:
        """The parameters for what decodes, made once for all batches."""
        return lm.unstack(self.params, dtype=self.config.dtype)

    def _generate(
        self, prompts: list[list[int]], most: int, sampling: generation.Sampling, until: list[str], seed: int
    ) -> list[list[int]]:
        """Tokens after each prompt; the end that one stopped at is its last token, which may have a text."""
        return generation.answers(
            self._decoding,
            self.config,
            prompts,
            batch=self.batch_size,
            max_tokens=most,
            sampling=sampling,
            stop_tokens=(),
            ends=lambda ids: ids[-1] in self.stop_tokens or ends_with(self.tokenizer, ids, until),
            seed=seed,
        )

    def _text(self, ids: list[int], until: list[str]) -> str:
        """What counts of an answer: it begins after what was thought and ends before the first stop string."""
        thought = self.think_end_token
        if not isinstance(thought, int):
            found = str(self.tokenizer.decode(ids, skip_special_tokens=True))
            return postprocess_generated_text(generation=found, stop=until, think_end_token=thought)
        spoken = ids[len(ids) - ids[::-1].index(thought) :] if thought in ids else ids
        found = str(self.tokenizer.decode(spoken, skip_special_tokens=True)).lstrip()
        return postprocess_generated_text(generation=found, stop=until, think_end_token=None)


def ends_with(tokenizer: chat.Tokenizer, ids: list[int], until: Sequence[str]) -> bool:
    """Whether the newest token completes a stop string, which may begin anywhere and hold special tokens.

    A token has a byte at least, so no longer stretch can hold the string. Of four stretches one begins with a
    character: the bytes of a cut one may hide what follows. Only what the whole text has counts.
    """
    longest = max((len(term.encode()) for term in until), default=0)
    ends = (str(tokenizer.decode(ids[-longest - more :])) for more in range(4) if until)
    if not any(term in end for end in ends for term in until):
        return False
    whole = str(tokenizer.decode(ids))
    return any(term in whole for term in until)


def _progress(total: int, what: str, disabled: bool) -> tqdm.tqdm:
    return tqdm.tqdm(total=total, desc=what, disable=disabled or not sys.stderr.isatty())


def main(argv: Sequence[str] | None = None) -> int:
    """lm_eval's own command, which knows the model "allmem"; 2 after an expected failure, which is one line."""
    if argv is not None:
        sys.argv = ["lm-eval", *argv]
    try:
        lm_eval.__main__.cli_evaluate()
    except (ValueError, OSError, NotImplementedError) as error:
        print(f"allmem: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
