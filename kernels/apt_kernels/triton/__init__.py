"""The ops as Triton kernels for GPUs, one file an op. `apt_kernels.ops` chooses them; tests call them directly, interpreted."""
