"""All layers of a decoder as one C++ op.

At batch 1 a step takes a few milliseconds; calling each of its hundreds of ops from Python would add one or two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from apt_kernels.cpu import native
from apt_kernels.cpu.linear import Bf16Weight, Int4Weight, Int8Weight, PackedWeight


@dataclass(frozen=True, slots=True)
class Projection:
    """A packed weight with its bias, float32 [out]."""

    weight: PackedWeight
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer: attention and gated feed-forward, each behind a norm. Norm weights are bfloat16."""

    input_norm: torch.Tensor
    qkv: Projection
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    attention_out: Projection
    post_attention_norm: torch.Tensor
    gate_up: Projection
    down: Projection
    window: int | None

    @property
    def projections(self) -> tuple[Projection, ...]:
        """Its matrix products, in order."""
        return (self.qkv, self.attention_out, self.gate_up, self.down)


class DecoderLayers:
    """The layers and the final norm, over a paged KV cache; inference only, bfloat16 activations."""

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        final_norm: torch.Tensor,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        eps: float,
        scale: float,
    ) -> None:
        self._layers: Any = torch.classes.apt_cpu.DecoderLayers(
            num_heads, num_kv_heads, head_dim, eps, scale, final_norm
        )
        for layer in layers:
            qkv, attention_out, gate_up, down = (_spelled(projection) for projection in layer.projections)
            self._layers.add(
                layer.input_norm,
                qkv,
                layer.query_norm,
                layer.key_norm,
                attention_out,
                layer.post_attention_norm,
                gate_up,
                down,
                layer.window,
            )

    def __call__(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        key_caches: list[torch.Tensor],
        value_caches: list[torch.Tensor],
        key_scales: list[torch.Tensor | None],
        value_scales: list[torch.Tensor | None],
        slot_mapping: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        context_lens: torch.Tensor,
        block_tables: torch.Tensor,
    ) -> torch.Tensor:
        """Embedded tokens [T, C] -> normed hidden states [T, C]; the caches [N, P, K, D] get the new keys and values.

        Args:
            x: bfloat16.
            cos, sin: [T, D/2].
            key_caches, value_caches: one for each layer. key_scales, value_scales: theirs if they are int8.
            slot_mapping: [T] int64. cu_seqlens_q: [B+1]. context_lens: [B]. block_tables: [B, max_blocks].
        """
        hidden: torch.Tensor = self._layers.forward(
            *(x, cos, sin, key_caches, value_caches, key_scales, value_scales),
            *(slot_mapping, cu_seqlens_q, context_lens, block_tables),
        )
        return hidden


def can_run_layers(layers: Sequence[LayerWeights], head_dim: int) -> bool:
    """Whether the C++ op can run these layers: C++ ops on, their formats, bfloat16, heads of a multiple of 16."""
    if not native.is_enabled() or head_dim % 16 != 0:
        return False
    return all(
        layer.input_norm.dtype == torch.bfloat16
        and all(isinstance(p.weight, Bf16Weight | Int8Weight | Int4Weight) for p in layer.projections)
        for layer in layers
    )


def _spelled(projection: Projection) -> tuple[Any, ...]:
    """A projection as the C++ side takes it: data, format, scales, bias, out, in, group size."""
    weight, bias = projection.weight, projection.bias
    match weight:
        case Bf16Weight():
            return (weight.data, "bf16", None, bias, weight.out_features, weight.in_features, 0)
        case Int8Weight():
            return (weight.data, "int8", weight.scales, bias, weight.out_features, weight.in_features, 0)
        case Int4Weight():
            return (weight.data, "int4", None, bias, weight.out_features, weight.in_features, weight.group_size)
        case _:
            raise ValueError(f"weight: {type(weight).__name__} has no C++ product")
