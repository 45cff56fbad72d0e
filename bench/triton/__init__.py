"""A bench for Triton kernels on a machine without a GPU.

`interpreter` runs kernels on CPU tensors, `trace` watches what they touch, `ahead` compiles them
for GPUs that are not there, and `gate` asks all three whether a kernel may go in. `cuda_module`
runs whole training steps as they are compiled for CUDA. None of it sees latency, bank conflicts or
a miscompiled kernel: those need the device.
"""
