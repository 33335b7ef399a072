"""Pretrained models in and out: Hugging Face folders, GGUF files, and trained memories.

convert       reads a model from where it lies, and writes one
families      names of tensors and fields, by family; `fields` checks them
gguf_reader   reads a GGUF file
tokenizer     tokenizers and chat templates; `ends` says where a text ends
memory_file   a trained memory as one small file
start         a memory made of a layer's own attention
"""

__all__ = ["convert", "ends", "families", "memory_file", "start", "tokenizer"]
