"""A model's card on the Hugging Face Hub: what it was made of, its sizes, how it is loaded, and what was measured."""

import huggingface_hub

from allmem_jax.model import config as config_lib


def text(
    repo: str,
    config: config_lib.ModelConfig,
    *,
    base: str | None = None,
    license: str | None = None,
    memory: str = "",
    figures: str = "",
) -> str:
    """The card, as Markdown behind the fields that the Hub reads.

    Args:
      repo: OWNER/NAME.
      config: of the converted model.
      base: the pretrained model's name on the Hub, where that is known.
      license: its name on the Hub, where that is known.
      memory: the text of the memory's own card.
      figures: tables of what was measured, as plain text.
    """
    fields = huggingface_hub.ModelCardData(
        base_model=base,
        license=license,
        library_name="allmem-jax",
        pipeline_tag="text-generation",
        tags=["allmem", config.memory_mixer, "sliding-window-attention", "long-context", "jax"],
    )
    name = repo.rpartition("/")[2]
    of = f"[{base}](https://huggingface.co/{base})" if base else f"a model of the family {config.family}"
    parts = [f"---\n{fields.to_yaml()}\n---", f"# {name}", _WHAT.format(of=of), _sizes(config), _USE.format(repo=repo)]
    if memory:
        parts.append(_deeper(memory))
    if figures:
        parts.append(f"## What was measured\n\n```text\n{figures.strip()}\n```")
    return "\n\n".join(parts) + "\n"


_WHAT = """\
{of} with a memory beside the attention of every layer
([AllMem](https://arxiv.org/abs/2602.13680)): attention sees a window and the first tokens, and what leaves the window
is learned by a small network while the model reads. State and cost per token are constant."""

_USE = """\
## Use

```python
import allmem_jax

config, params, tokenizer = allmem_jax.load_pretrained("hf://{repo}")
prompt = tokenizer.encode("The old sailor looked at the sea and")
(tokens,) = allmem_jax.generate(params, config, [prompt], max_tokens=50)
```

    allmem chat hf://{repo}

`config.json` and `model.safetensors` are the pretrained model, which transformers reads as before; the memory is
`allmem.safetensors`."""


def _sizes(config: config_lib.ModelConfig) -> str:
    rows = {
        "layers": config.n_layers,
        "window, sinks": f"{config.window:,}, {config.sinks:,} tokens",
        "memory": f"{config.memory_mixer}, {config.memory_heads} heads of {config.d_mem}",
        "chunk": f"{config.chunk:,} tokens",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _deeper(markdown: str) -> str:
    """The same with headings one level down."""
    lines = markdown.strip().splitlines()
    return "\n".join(f"#{line}" if line.startswith("#") else line for line in lines)
