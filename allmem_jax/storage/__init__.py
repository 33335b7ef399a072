"""Files that are whole or not there, here and in object stores.

stores   paths such as gs://bucket/run: read through a local copy, written whole
hub      models on the Hugging Face Hub, hf://OWNER/NAME
files    local files that are whole or not there
jit_cache   what JAX compiles, for the next run
"""

__all__ = ["files", "hub", "jit_cache", "stores"]
