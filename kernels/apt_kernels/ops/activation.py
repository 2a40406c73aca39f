"""SwiGLU."""

from __future__ import annotations

import torch

from apt_kernels import reference
from apt_kernels.cpu import training as cpu_training
from apt_kernels.ops import backends

# Triton is for NVIDIA's GPUs here: a torch without CUDA does not import it.
if torch.version.cuda is not None:
    from apt_kernels.triton import activation as triton_activation


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, gate and up side by side: [T, 2 I] -> [T, I]; see `reference.silu_and_mul`."""
    if backends.is_native(gate_up):
        out: torch.Tensor = torch.ops.apt_cpu.silu_and_mul(gate_up)
        return out
    if backends.is_triton(gate_up):
        return triton_activation.silu_and_mul(gate_up)
    return reference.silu_and_mul(gate_up)


def gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of two products that were not made as one; see `reference.gated_silu`."""
    if cpu_training.can_gate(gate):
        return cpu_training.gated_silu(gate, up)
    if backends.is_triton(gate, up):
        return triton_activation.silu_and_mul(torch.cat((gate, up), dim=-1))
    return reference.gated_silu(gate, up)
