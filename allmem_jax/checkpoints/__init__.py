"""Pretrained models in and out: Hugging Face folders, GGUF files, and trained memories.

load          a model, or its config alone, from wherever it lies
save          a model as a folder; `layout` says what is in one
weights       tensors of files as parameters
families      names of tensors, by family
hf_config, gguf_config   configs of both kinds of files as ours; `fields` checks them
gguf_reader   reads a GGUF file
tokenizer     tokenizers and chat templates; `ends` says where a text ends
memory_file   a trained memory as one small file
card          what the Hub shows of a model
start         a memory made of a layer's own attention
"""

__all__ = ["card", "ends", "families", "hf_config", "layout", "load", "memory_file", "save", "start", "tokenizer"]
