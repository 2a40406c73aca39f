"""The norm of all gradients, whichever of them are divided among processes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor


def l2_norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """L2 norm over all elements [], the same on every process.

    ``torch.nn.utils.clip_grad_norm_`` refuses a mix of plain and distributed tensors: here each layout's squares are
    summed locally and then over its mesh at once.
    """
    squares: dict[Any, list[torch.Tensor]] = defaultdict(list)
    for tensor in tensors:
        layout = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
        local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
        squares[layout].append(local.norm(dtype=torch.promote_types(local.dtype, torch.float32)).square())
    if not squares:
        return torch.zeros(())
    return torch.stack([_summed(torch.stack(each).sum(), layout) for layout, each in squares.items()]).sum().sqrt()


def clip(parameters: Iterable[nn.Parameter], norm: float, max_norm: float) -> None:
    """Scale gradients of this norm down to max_norm, in place."""
    factor = min(max_norm / (norm + 1e-6), 1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            local = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            local.mul_(factor)


def _summed(square: torch.Tensor, layout: Any) -> torch.Tensor:
    if layout is None:
        return square
    mesh, placements = layout
    for dim, placement in enumerate(placements):
        if not placement.is_replicate():
            dist.all_reduce(square, group=mesh.get_group(dim))
    return square
