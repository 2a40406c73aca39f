"""A decoder's step as one C++ op, from the rows of running sequences to logits.

At batch 1 a step takes a few milliseconds; calling its hundreds of ops from Python would add one or two.
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
    """Embedding, layers, final norm and output head over a paged KV cache; inference only, bfloat16.

    Args:
        layers: in order.
        head: None leaves logits to the caller.
        embedding: [V, C]. final_norm: [C].
        cos, sin: [positions, D/2], of every position there may be.
    """

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        head: Projection | None,
        *,
        embedding: torch.Tensor,
        final_norm: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        eps: float,
        scale: float,
    ) -> None:
        self._layers: Any = torch.classes.apt_cpu.DecoderLayers(
            num_heads, num_kv_heads, head_dim, eps, scale, embedding, final_norm, cos, sin
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

        if head is not None:
            self._layers.set_head(_spelled(head))

    def bind_caches(
        self,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        key_scales: list[torch.Tensor | None],
        value_scales: list[torch.Tensor | None],
    ) -> None:
        """Work on these caches [N, P, K, D] from now on, one for each layer; scales are those of int8 caches."""
        self._layers.bind_caches(keys, values, key_scales, value_scales)

    def step(
        self,
        token_ids: torch.Tensor,
        block_tables: torch.Tensor,
        *,
        slots: list[int],
        starts: list[int],
        lengths: list[int],
        sampled: list[int],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute tokens starts[b] .. starts[b] + lengths[b] - 1 of the sequence in row slots[b], and store their keys.

        Args:
            token_ids: [S, L] int64, a row for each running sequence.
            block_tables: [S, max_blocks] int32.
            slots, starts, lengths: [B].
            sampled: indices, among the B, of the sequences after whose last token logits are wanted.

        Returns:
            Normed hidden states [T, C], and logits [R, V] float32 if there is a head.
        """
        hidden, logits = self._layers.step(token_ids, block_tables, slots, starts, lengths, sampled)
        return hidden, logits


def has_product(weight: PackedWeight) -> bool:
    """Whether the C++ op multiplies with this format."""
    return isinstance(weight, Bf16Weight | Int8Weight | Int4Weight)


def can_run_layers(layers: Sequence[LayerWeights], head_dim: int) -> bool:
    """Whether the C++ op can run these layers: C++ ops on, their formats, bfloat16, heads of a multiple of 16."""
    if not native.is_enabled() or head_dim % 16 != 0:
        return False
    return all(
        layer.input_norm.dtype == torch.bfloat16 and all(has_product(p.weight) for p in layer.projections)
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
