"""The ops as Triton kernels for GPUs, one file an op. `ops` chooses them; tests call them directly, interpreted."""
