"""What kernels are measured and compiled with; no kernel needs it.

bench         times kernels, or reads their schedules
torch_peers   what users of torch would run instead
schedule      the TPU compiler's static schedule of one kernel
compiling     the compilers of devices that are not there
topology      those devices
"""

__all__ = ["topology"]
