"""Activation checkpointing (arXiv 1604.06174): less is kept for the backward pass, which computes it again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::linear"})
ATTENTIONS = frozenset(
    {
        "apt_triton::varlen_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
    }
)


def recompute_layers(layers: nn.ModuleList, kind: Literal["selective", "full"]) -> None:
    """Each layer keeps its inputs and, if selective, what is dear to compute again: attention and every second product.

    The layers' forward functions are replaced, not the layers: parameters keep their names.
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if kind == "selective":
        options["context_fn"] = _selective_contexts
    for layer in layers:
        setattr(layer, "forward", partial(checkpoint, layer.forward, **options))  # noqa: B010


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_every_second_product())


def _every_second_product() -> Callable[..., CheckpointPolicy]:
    """A policy for one pass of one layer. Forward pass and recomputation count alike, each by itself."""
    counts = {False: 0, True: 0}

    def policy(context: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = op.name() if isinstance(op, torch._ops.OpOverload) else str(op)
        name = name.partition(".")[0]
        if name in PRODUCTS:
            counts[context.is_recompute] += 1
            if counts[context.is_recompute] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.MUST_SAVE if name in ATTENTIONS else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
