"""The model in EleutherAI's lm-evaluation-harness (lm_eval), as `--model allmem`.

    python -m allmem_jax.harness --model allmem --model_args pretrained=FOLDER --tasks TASK --batch_size 8

takes lm_eval's own arguments; importing this module is enough for `lm_eval.simple_evaluate(model="allmem", ...)`.
Requests are encoded, truncated and answered as lm_eval's Hugging Face model does it.

    B rows of a batch, always as many    L tokens of a row, padded to a power of two    d model
"""

import functools
import logging
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jinja2
import numpy as np
import tqdm

from allmem_jax import config as config_lib
from allmem_jax import convert, functional, generation, model, text

try:
    import lm_eval.__main__
    from lm_eval import utils as lm_eval_utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import Collator, normalize_gen_kwargs, postprocess_generated_text
except ImportError as error:
    raise ImportError(f"allmem_jax.harness needs lm_eval ({error}): pip install 'allmem-jax[eval]'") from None

MAX_LENGTH = 131072  # of a model whose state does not grow; it has no limit of its own
SHORTEST = 32  # tokens of the smallest bucket
logger = logging.getLogger(__name__)


@functools.partial(jax.jit, static_argnames="config")
def score(
    params: model.Params, config: config_lib.ModelConfig, tokens: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probability float32 [B, L] of each target, and whether it is the likeliest token bool [B, L].

    Logits exist for about 512 positions of the batch at a time.

    Args:
      params: of the model.
      config: its mixer says how the rows are read.
      tokens: int32 [B, L], L a power of two.
      targets: int32 [B, L], the token after each position.
    """
    hidden: Any = model.AllMemLM(config).apply({"params": params}, tokens, return_hidden=True)  # [B, L, d]
    head = model.head_kernel(params, config)
    batch, length = tokens.shape
    size = min(length, generation.bucket(max(1, 512 // batch), at_least=1))

    def block(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        states, wanted = part  # [B, size, d], [B, size]
        logits = functional.logits(states, head)
        chosen = jnp.take_along_axis(logits, wanted[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == wanted

    parts = [jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), 1, 0) for x in (hidden, targets)]
    log_probs, likeliest = (jnp.moveaxis(x, 0, 1).reshape(batch, length) for x in jax.lax.map(block, tuple(parts)))
    return log_probs, likeliest


@register_model("allmem")
class AllMemHarness(TemplateLM):
    """A model folder or .gguf file behind lm_eval's interface.

    Every batch is padded to `batch_size` rows and a power of two of tokens, so that each such length is compiled once.
    """

    def __init__(
        self,
        pretrained: str,
        mixer: str | None = None,
        window: int | None = None,
        sinks: int | None = None,
        chunk: int | None = None,
        write: bool | None = None,
        dtype: str = "float32",
        batch_size: int | str = 1,
        max_length: int | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        """Loads the model.

        Args:
          pretrained: Hugging Face folder, one that was converted, or a .gguf file.
          mixer: "swa" (window and sinks), "full" (the original attention) or the kind of memory that the model has;
            default: the memory where there is one, else "full".
          window, sinks, chunk, write: replace what the model was converted with; write=False is a memory that
            nothing is written to.
          dtype: "float32" or "bfloat16".
          batch_size: rows of a batch.
          max_length: longer inputs lose their first tokens; default: 131072 tokens, with mixer "full" as many as the
            model was trained on.
          max_batch_size, device: lm_eval hands them to every model; JAX chooses the device.

        Raises:
          ValueError: no tokenizer, a mixer that the model has no memory for, or a number out of range.
        """
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size!r} must be a positive number: batches here are of one size")
        fields = dict(mixer=mixer, window=window, sinks=sinks, chunk=chunk, write=write)
        given = {name: value for name, value in fields.items() if value is not None}
        self.tokenizer: Any
        config, self.params, self.tokenizer = convert.load_pretrained(pretrained, dtype=dtype, **given)
        if self.tokenizer is None or self.tokenizer.eos_token_id is None:
            raise ValueError(f"{pretrained} has no tokenizer with an end of text: copy the original's into it")
        remembers = "memory" in self.params["layers"]
        self.config = config.replace(mixer=mixer or (config.memory_mixer if remembers else "full"))
        if self.config.mixer in config_lib.MEMORY_MIXERS and not remembers:
            raise ValueError(f"mixer={mixer!r}, and {pretrained} has no memory: convert it, or give mixer=swa or full")
        self.pretrained, self.batch_size = str(pretrained), int(batch_size)
        self.max_length = max_length or (config.max_length if self.config.mixer == "full" else MAX_LENGTH)

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
        """What comes before a text that has no context: the tokenizer's BOS, or its end of text without one."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

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
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, without its system message where the template refuses one."""
        ending = dict(add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt)
        try:
            return self.tokenizer.apply_chat_template(chat_history, tokenize=False, **ending)
        except jinja2.TemplateError:
            logger.warning("the chat template failed: the system message is left out")
            rest = [message for message in chat_history if message["role"] != "system"]
            return self.tokenizer.apply_chat_template(rest, tokenize=False, **ending)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For (key, context, continuation) the log-probability of the continuation, and whether it is greedy."""
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

    def _score(self, rows: list[list[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """What `score` says of all tokens of each row but the first."""
        shape = self.batch_size, generation.bucket(max(map(len, rows)) - 1, SHORTEST)
        tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for index, row in enumerate(rows):
            tokens[index, : len(row) - 1], targets[index, : len(row) - 1] = row[:-1], row[1:]
        log_probs, likeliest = map(np.asarray, score(self.params, self.config, tokens, targets))
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
        collator = Collator(
            [request.args for request in requests],
            sort_fn=lambda pair: (-len(self.tok_encode(pair[0])), pair[0]),
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
        until, most = [term for term in options.pop("until") if term], options.pop("max_gen_toks")
        drawn = {name: options.pop(name) for name in ("temperature", "top_k", "top_p") if name in options}
        sampling = generation.Sampling(**drawn) if options.pop("do_sample") else generation.GREEDY
        if options.pop("num_beams", 1) != 1 or options:
            raise ValueError(f"generation_kwargs={settings}: only until, max_gen_toks, do_sample, temperature, top_k "
                             "and top_p can be set")  # fmt: skip
        if most >= self.max_length:
            raise ValueError(f"max_gen_toks={most} leaves no room for a prompt in max_length={self.max_length}")
        encoded = [self.tok_encode(context) or [self.prefix_token_id] for context in contexts]
        prompts = [self._fit(ids, self.max_length - most) for ids in encoded]
        answers = self._generate(prompts, most, sampling, until, seed)
        found = [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in answers]
        return [postprocess_generated_text(generation=answer, stop=until, think_end_token=None) for answer in found]

    def _generate(
        self, prompts: list[list[int]], most: int, sampling: generation.Sampling, until: list[str], seed: int
    ) -> list[list[int]]:
        """Tokens after each prompt, until all have stopped; a stop string is at the end of what it ends."""
        longest, config = max(map(len, prompts)), self.config
        if config.mixer == "full":
            config = generation.full_as_windowed(config, longest + most)
        rows = prompts + [[self.prefix_token_id]] * (self.batch_size - len(prompts))
        logits, state = generation.prefill(self.params, config, rows)
        stops = text.stop_tokens(self.tokenizer)
        tail = 1 + max((len(term.encode()) for term in until), default=0)  # a token has a byte at least
        answers: list[list[int]] = [[] for _ in prompts]
        going = set(range(len(prompts)))
        for tokens, *_ in generation.stream(
            self.params, config, logits, state, max_tokens=most, sampling=sampling, stop_tokens=stops, seed=seed
        ):
            for index in sorted(going):
                if tokens[index] in stops:
                    going.remove(index)
                    continue
                answers[index].append(int(tokens[index]))
                end = self.tokenizer.decode(answers[index][-tail:], skip_special_tokens=True)
                if any(term in end for term in until):
                    going.remove(index)
            if not going:
                break
        return answers


def _progress(total: int, what: str, disabled: bool) -> tqdm.tqdm:
    return tqdm.tqdm(total=total, desc=what, disable=disabled or not sys.stderr.isatty())


def main(argv: Sequence[str] | None = None) -> None:
    """lm_eval's own command, which knows the model "allmem"."""
    if argv is not None:
        sys.argv = ["lm-eval", *argv]
    lm_eval.__main__.cli_evaluate()


if __name__ == "__main__":
    main()
