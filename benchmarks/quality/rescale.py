"""The same function with other weights: each input channel of a layer scaled at random, what feeds it scaled back.

Weights that were in 4 bits once, as the embedded model's, lie on a grid that quantizing finds again. Scaled by channel
they lie on none, with outliers where they were: this shows what 4 bits cost a model that never had them.
"""

from __future__ import annotations

import torch

from apt_core.layers.norm import RMSNorm
from apt_core.models.decoder import MLP, Attention, DecoderForCausalLM, DecoderLayer

LARGEST = 1.25
"""Factors lie between this and its inverse, evenly on a logarithmic scale: enough to move large weights by whole steps
of 4 bits, and too little to widen the range of a group much."""


@torch.no_grad()
def rescale(model: DecoderForCausalLM) -> None:
    """Scale the layers of a plain model, not yet fused, in place. The output head stays: 8 bits are its least."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        assert isinstance(layer, DecoderLayer)
        attention, mlp = layer.self_attn, layer.mlp
        _scale_behind_norm(layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj], generator)
        _scale_behind_norm(layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj], generator)
        _scale_values(attention, generator)
        _scale_inner(mlp, generator)


def _scale_behind_norm(norm: RMSNorm, linears: list[torch.nn.Linear], generator: torch.Generator) -> None:
    factors = _factors(len(norm.weight), generator)
    norm.weight.div_(factors)
    for linear in linears:
        linear.weight.mul_(factors)


def _scale_values(attention: Attention, generator: torch.Generator) -> None:
    """Each dimension of the values, which every query head of a group gets a weighted sum of."""
    factors = _factors(attention.num_kv_heads * attention.head_dim, generator)
    _scale_outputs(attention.v_proj, 1 / factors)
    group = attention.num_heads // attention.num_kv_heads
    attention.o_proj.weight.mul_(factors.view(-1, attention.head_dim).repeat_interleave(group, dim=0).flatten())


def _scale_inner(mlp: MLP, generator: torch.Generator) -> None:
    factors = _factors(mlp.up_proj.out_features, generator)
    _scale_outputs(mlp.up_proj, 1 / factors)
    mlp.down_proj.weight.mul_(factors)


def _scale_outputs(linear: torch.nn.Linear, factors: torch.Tensor) -> None:
    linear.weight.mul_(factors.unsqueeze(1))
    if linear.bias is not None:
        linear.bias.mul_(factors)


def _factors(count: int, generator: torch.Generator) -> torch.Tensor:
    return LARGEST ** (2 * torch.rand(count, generator=generator) - 1)
