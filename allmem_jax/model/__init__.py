"""The model: what it is, its mathematics, its modules, its state.

config          sizes of a model; `presets` has those of the published ones
functional      the mathematics of a layer, without parameters; all that calls the kernels
linear_memory   the mathematics of the baselines
layers          the modules that a layer is made of
memory, baselines   what stands beside the attention
decoder         one layer
lm              the language model; its parameters as backbone and memory
losses          distillation, block by block over the vocabulary
state           what a decoding model knows of its past
sharding        where arrays live on a mesh
"""

__all__ = ["config", "decoder", "functional", "layers", "linear_memory", "lm", "losses", "memory", "sharding", "state"]
