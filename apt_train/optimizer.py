"""Optimizers by name of their parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Muon, Optimizer

from apt_train.config import OptimizerSettings


def build_optimizers(model: nn.Module, settings: OptimizerSettings) -> tuple[Optimizer, ...]:
    """AdamW, and Muon (arXiv 2502.16982) before it where the settings want it.

    Muon's steps are those of Newton and Schulz, scaled to the size of AdamW's, so that one learning rate fits both. It
    takes the layers' matrices; embedding, head and vectors are AdamW's.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    by_muon = [p for name, p in named if settings.name == "muon" and is_hidden_matrix(name, p)]
    taken = {id(p) for p in by_muon}
    rest = [p for _, p in named if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizers: list[Optimizer] = []
    if by_muon:
        optimizers.append(
            Muon(
                by_muon,
                lr=settings.learning_rate,
                weight_decay=settings.weight_decay,
                momentum=settings.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    if groups:
        is_plain = not any(isinstance(p, DTensor) for p in rest)  # the fused step takes no mix of both
        optimizers.append(
            AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=is_plain)
        )
    return tuple(optimizers)


def is_hidden_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter is a matrix inside a layer."""
    return parameter.dim() == 2 and ".layers." in name


def set_learning_rate(optimizers: Iterable[Optimizer], learning_rate: float) -> None:
    """The same for all groups."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
