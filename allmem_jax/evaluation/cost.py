"""What a model costs: parameters by group, bytes of state, and operations per token, all without running it.

XLA's own count is of no use here: it counts the body of a scan once. The formulas below count a multiplication, an
addition or a selection as 1 operation each. They count the elementwise work on the recurrent states, which in decoding
is as large as their products, and leave out what else is elementwise (norms, activations, softmax, masks): a few
percent, as `tests/test_cost.py` finds against compiled programs.

    d model    Hq, Hkv attention heads    D head dim    V vocabulary    N memory heads    K convolution taps
    F channels through the convolutions    D_m dimension of a memory head    H = hidden size of its fast weights
    S, P rows and columns of a "mamba2" head's state    D' both of a "delta" head's    T tokens of a block
"""

import math
from collections.abc import Mapping, Sequence

import flax.traverse_util
import jax
import jax.numpy as jnp

from allmem_jax.model import config as config_lib
from allmem_jax.model import linear_memory, lm, state
from allmem_jax.reporting import sections

MIXERS = ("full", "swa", "mamba2", "delta", "allmem")  # in the order of tables and plots
LENGTHS = tuple(2**power for power in range(10, 19))  # 1,024 to 262,144 tokens
CONTEXT = 131072


def parameter_groups(config: config_lib.ModelConfig) -> dict[str, int]:
    """Parameters of the converted model by group: embedding, attention, mlp, norms, head, memory (by `eval_shape`).

    "head" is 0 where it is the transposed embedding. The memory is that of the config's mixer; where that has none,
    AllMem's, which conversion would add.
    """
    config = config.replace(mixer=config.memory_mixer)
    tokens = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(lambda: lm.AllMemLM(config).init(jax.random.key(0), tokens)["params"])
    groups = dict.fromkeys(("embedding", "attention", "mlp", "norms", "head", "memory"), 0)
    for path, leaf in flax.traverse_util.flatten_dict(shapes).items():
        groups[_group(path)] += math.prod(leaf.shape)
    return groups


def _group(path: tuple[str, ...]) -> str:
    if path[0] == "embed":
        return "embedding"
    if path[0] == "lm_head":
        return "head"
    if path[0] == "layers" and path[1] in ("attention", "mlp", "memory"):
        return path[1]
    return "norms"


def added_share(config: config_lib.ModelConfig) -> float:
    """The memory's share of the converted model's parameters, in [0, 1]."""
    groups = parameter_groups(config)
    return groups["memory"] / sum(groups.values())


def state_bytes(config: config_lib.ModelConfig, context: int) -> dict[str, int]:
    """Bytes that decoding one row keeps after `context` tokens, by mixer; constant for all but "full"."""
    return {mixer: sum(state_parts(config, context, mixer).values()) for mixer in MIXERS}


def state_parts(config: config_lib.ModelConfig, context: int, mixer: str | None = None) -> dict[str, int]:
    """Bytes that decoding one row keeps after `context` tokens: {"cache", "recurrent"}.

    The cache holds keys and values in the config's dtype, 2 Hkv D numbers per token and layer: of every token for full
    attention (layers that are local in the pretrained model hold at most their window), else of window + sinks
    tokens, allocated from the start. "recurrent" is the rest of the decode state: fast weights, momentum and pending
    gradients or the matrices of the linear memories, all float32, the convolutions' tails and the position.
    """
    config = _asked(config, context, mixer)
    if config.mixer == "full":
        per_token = 2 * config.n_kv_heads * config.head_dim * jnp.dtype(config.dtype).itemsize
        return {"cache": per_token * sum(_visible(config, context)), "recurrent": 0}
    shapes = jax.eval_shape(lambda: state.init_state(config, 1))
    cache = sum(leaf.size * leaf.dtype.itemsize for leaf in (shapes.keys, shapes.values))
    return {"cache": cache, "recurrent": state.state_bytes(config) - cache}


def flops_per_token(config: config_lib.ModelConfig, context: int, mixer: str | None = None) -> dict[str, int]:
    """Operations to decode one token after `context` tokens, by part, as the decode step does them.

    * projections: 2 per weight of the attention's q, k, v and o, in every layer; mlp: the same; head: 2 d V.
    * attention: scores and the weighted sum are 2 Hq D each per visible key, so 4 Hq D keys. Keys are `context` for
      full attention and min(context, window + sinks) for the windowed one.
    * memory: the whole branch, its projections among it; see `_memory`.

    Training costs about three times the forward pass of the same length, four with rematerialisation.

    Args:
      config: the model.
      context: tokens seen, this one included.
      mixer: one of `config.MIXERS`; None means the config's.

    Returns:
      {"projections", "attention", "memory", "mlp", "head"}; their sum is the cost of the token.
    """
    config = _asked(config, context, mixer)
    return _parts(config, sum(_visible(config, context)), block=None)


def prefill_flops_per_token(config: config_lib.ModelConfig, context: int, mixer: str | None = None) -> dict[str, int]:
    """Operations per token to read a prompt of `context` tokens: the mean over them, in the parts of `flops_per_token`.

    Keys that a token does not see are not counted, though attention in blocks computes some of them; the head is
    counted as if every token had its logits. Memories work on blocks: AllMem's of a chunk, the linear ones' of
    `linear_memory.BLOCK` tokens.
    """
    config = _asked(config, context, mixer)
    keys = sum(seen * (seen + 1) / 2 + (context - seen) * seen for seen in _visible(config, context)) / context
    block = config.chunk if config.mixer == "allmem" else linear_memory.BLOCK
    return _parts(config, keys, min(block, context))


def token_mixer(parts: Mapping[str, int]) -> dict[str, int]:
    """The share of the token mixer in what `flops_per_token` returns, by two countings.

    "mixer" is all that stands in the place of the original attention: its projections q, k, v and o, attention, and
    the memory branch. "core" leaves out those four projections, which every mixer has alike; the memory's own stay.
    """
    core = parts["attention"] + parts["memory"]
    return {"mixer": parts["projections"] + core, "core": core}


def times_less(config: config_lib.ModelConfig, context: int, mixer: str | None = None) -> dict[str, float]:
    """How many times less a mixer costs than full attention at `context` tokens.

    Returns:
      "mixer" and "core", operations of the token mixer to decode a token; "model", of the whole model; "prefill", of
      the token mixer per token of a prompt of that length; "state", bytes of the whole decode state.
    """

    def costs(mixer: str | None) -> dict[str, int]:
        parts = flops_per_token(config, context, mixer)
        return {
            **token_mixer(parts),
            "model": sum(parts.values()),
            "prefill": token_mixer(prefill_flops_per_token(config, context, mixer))["mixer"],
            "state": sum(state_parts(config, context, mixer).values()),
        }

    full, own = costs("full"), costs(mixer)
    return {name: full[name] / own[name] for name in full}


def _asked(config: config_lib.ModelConfig, context: int, mixer: str | None) -> config_lib.ModelConfig:
    if context < 1:
        raise ValueError(f"context={context} must be at least 1 token")
    return config.replace(mixer=mixer or config.mixer)


def _parts(c: config_lib.ModelConfig, keys: float, block: int | None) -> dict[str, int]:
    """`keys` that a token sees, summed over the layers; `block` tokens that a memory takes at once, or None."""
    return {
        "projections": c.n_layers * 4 * c.d_model * c.head_dim * (c.n_heads + c.n_kv_heads),
        "attention": round(4 * c.n_heads * c.head_dim * keys),
        "memory": c.n_layers * _memory(c, block),
        "mlp": c.n_layers * 6 * c.d_model * c.d_ff,
        "head": 2 * c.d_model * c.vocab_size,
    }


def _memory(c: config_lib.ModelConfig, block: int | None) -> int:
    """Operations of one layer's memory branch per token, in blocks of T = `block` tokens, or None in decoding.

    Projections are 2 per weight, convolutions 2 F K. Then:

    * allmem: the read is three products with the fast weights, the gradient at the token's key three more (gate k,
      up k, down^T Gout) and three outer products: 9 * 2 N H D_m; the difference reads the initial weights too, 3 more.
      Each of the 3 N H D_m fast weights takes 20 elementwise operations a block: its initial value or the state's, for
      weights, momentum and pending (3), rescaling for the gradient and for the update (10), pending sum (1), momentum
      and step (3), and whether they happen (3). In decoding an outer product is one operation and not two, and each
      weight takes 6 at every token (its initial value or the state's, two row norms, the pending sum) and 14 more at
      the token that ends a chunk.
    * mamba2: writing and reading the state 4 N S P, tokens of the block among each other 2 T (S + N P), and
      2 elementwise on the state a block (decay, and what was written).
    * delta: erasing, writing and reading the state 6 N D'^2, tokens among each other 7 T N D' (three products of T
      by T and the triangular system), and the same 2.
    """
    if c.mixer not in config_lib.MEMORY_MIXERS:
        return 0
    d, heads, channels = c.d_model, c.memory_heads, c.memory_heads * c.d_mem
    convolutions = 2 * c.conv_kernel * c.conv_channels
    if c.mixer == "allmem":
        fast = channels * c.memory_hidden
        on_weights = 33 * fast + 42 * fast // c.chunk if block is None else 18 * fast + 60 * fast // block
        on_weights += 6 * fast if c.read_out == "difference" else 0
        return 2 * d * (4 * channels + 5 * heads) + convolutions + on_weights
    block = block or 1
    _, rows, columns = c.linear_state_shape
    matrix = heads * rows * columns
    if c.mixer == "mamba2":
        projections = 2 * d * (3 * channels + 2 * rows + heads)
        products = 4 * matrix + 2 * block * (rows + channels)
    else:
        projections = 2 * d * (5 * heads * columns + 2 * heads)
        products = 6 * matrix + 7 * block * heads * columns
    return projections + convolutions + products + 2 * matrix // block


def _visible(config: config_lib.ModelConfig, context: int) -> list[int]:
    """Keys that a query after `context` tokens sees, per layer."""
    full = config.mixer == "full"
    keys = context if full else min(context, config.window + config.sinks)
    narrow = min(context, config.local_window or context, context if full else config.window)
    return [narrow if is_local else keys for is_local in config.local_layers or (False,) * config.n_layers]


def section(
    models: Mapping[str, config_lib.ModelConfig], *, windows: Sequence[int] = (4096, 8192), context: int = CONTEXT
) -> sections.Section:
    """Figure 3 of the paper: operations of the token mixer and bytes of state by context length.

    Args:
      models: name -> config. Their window plays no part, their dtype is that of keys and values.
      windows: of the mixers that have one; the first is plotted.
      context: of the table, in tokens.
    """
    cases = {
        f"{name}, window {window}": config.replace(window=window, chunk=min(config.chunk, window))
        for name, config in models.items()
        for window in windows
    }
    plots = []
    for name in models:
        config = cases[f"{name}, window {windows[0]}"]
        plots += [
            _plot(name, config, "operations of the token mixer per decoded token", "GFLOP", _gflop),
            _plot(name, config, "state of one sequence", "MB", _megabytes),
        ]
    lessening = {
        case: {mixer: times_less(config, context, mixer) for mixer in MIXERS[1:]} for case, config in cases.items()
    }
    counted = _counted(next(iter(cases.values())))
    return sections.Section(
        name="cost",
        title="Cost of a token and bytes of state by context length",
        command=sections.command("cost", *models, context=context, windows=tuple(windows)),
        text=(*(_finding(case, cases[case].memory_mixer, less, context) for case, less in lessening.items()), counted),
        tables=(_token_table(cases, context), _parameter_table(models)),
        plots=tuple(plots),
        data={"context": context, "times_less_than_full_attention": lessening},
    )


def _finding(case: str, mixer: str, rows: Mapping[str, Mapping[str, float]], context: int) -> str:
    """A mixer against full attention, and whether that is at most 1/10 of the operations and 1/20 of the bytes."""
    less = rows[mixer]
    verdicts = [
        f"at most 1/{bound} of the {what}: {'yes' if less[key] >= bound else 'no'}"
        for key, bound, what in (("mixer", 10, "operations"), ("state", 20, "bytes"))
    ]
    return (
        f"{case}: at {context:,} tokens the token mixer of {mixer} does {less['mixer']:.1f} x fewer operations for a "
        f"decoded token than full attention ({less['core']:.1f} x without the projections that both have, "
        f"{less['model']:.1f} x for the whole model, {less['prefill']:.1f} x per token of a prompt of that length), "
        f"and its state is {less['state']:.1f} x smaller; {'; '.join(verdicts)}."
    )


def _counted(config: config_lib.ModelConfig) -> str:
    return (
        "Counted: of all layers, the projections q, k, v and o, attention, and the whole memory branch, its "
        "elementwise work on the state included; a multiplication and an addition are two operations. "
        f"{config.sinks} sinks. State: keys and values in {config.dtype}, a memory's matrices in float32; the window's "
        "cache is allocated from the start, so a short context takes as much. By formula; tests/test_cost.py compares "
        "the formulas with compiled programs."
    )


def _gflop(config: config_lib.ModelConfig, context: int, mixer: str) -> float:
    return token_mixer(flops_per_token(config, context, mixer))["mixer"] / 1e9


def _megabytes(config: config_lib.ModelConfig, context: int, mixer: str) -> float:
    return sum(state_parts(config, context, mixer).values()) / 1e6


def _plot(name: str, config: config_lib.ModelConfig, what: str, unit: str, quantity) -> sections.Plot:
    """`quantity(config, context, mixer)` of every mixer over `LENGTHS`."""
    xs = tuple(float(length) for length in LENGTHS)
    lines = {mixer: (xs, tuple(quantity(config, length, mixer) for length in LENGTHS)) for mixer in MIXERS}
    window = float(config.window)
    return sections.Plot(f"{name}: {what}", "context (tokens)", unit, lines, log_x=True, log_y=True, mark_x=window)


def _token_table(cases: Mapping[str, config_lib.ModelConfig], context: int) -> sections.Table:
    rows = []
    for case, config in cases.items():
        for mixer in MIXERS:
            parts = flops_per_token(config, context, mixer)
            own, less = token_mixer(parts), times_less(config, context, mixer)
            size = state_parts(config, context, mixer)
            row = [f"{case}: {mixer}"]
            row += [f"{own['mixer'] / 1e9:.3f}", f"{less['mixer']:.1f}", f"{own['core'] / 1e9:.3f}"]
            row += [f"{less['core']:.1f}", f"{parts['memory'] / 1e9:.3f}", f"{size['cache'] / 1e6:.1f}"]
            row += [f"{size['recurrent'] / 1e6:.1f}", f"{less['state']:.1f}"]
            rows.append(tuple(row))
    header = (
        "",
        "token mixer GFLOP",
        "x less",
        "without q, k, v, o GFLOP",
        "x less",
        "of it memory GFLOP",
        "cache MB",
        "recurrent MB",
        "x less",
    )
    return sections.Table(f"one token decoded at {context:,} tokens; all layers", header, tuple(rows))


def _parameter_table(models: Mapping[str, config_lib.ModelConfig]) -> sections.Table:
    rows = []
    for name, config in models.items():
        for mixer in config_lib.MEMORY_MIXERS:
            memory = config.replace(mixer=mixer)
            count, share = parameter_groups(memory)["memory"], added_share(memory)
            rows.append((f"{name}: {mixer}", f"{count / 1e6:.2f}", f"{share:.1%}"))
    return sections.Table("parameters of the memory branch", ("", "millions", "of the model"), tuple(rows))
