"""Channels between the layers of a decoder, and how to scale them without changing what the model computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from apt_core.layers.norm import RMSNorm
from apt_core.models.decoder import DecoderLayer


@dataclass(frozen=True)
class Junction:
    """Linear layers that read the same input, and what makes that input: a factor of one is undone by the others."""

    readers: dict[str, nn.Linear]
    """By their names within the decoder layer, such as self_attn.q_proj."""
    maker: RMSNorm | nn.Linear
    """Each of its outputs is a factor of one or, where query heads share a value head, of several of the inputs."""
    head_dim: int = 1
    repeats: int = 1
    """How many runs of head_dim inputs, one after the other, come from the same run of the maker's outputs."""

    @property
    def num_channels(self) -> int:
        """How many factors there are."""
        return len(self.maker.weight)

    def per_input(self, factors: torch.Tensor) -> torch.Tensor:
        """Of each channel's factor, those of the readers' inputs [in]."""
        return factors.view(-1, self.head_dim).repeat_interleave(self.repeats, dim=0).flatten()

    def largest(self, per_input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., channels], the largest of each channel's inputs."""
        heads: torch.Tensor = per_input.unflatten(-1, (-1, self.repeats, self.head_dim))
        return heads.amax(-2).flatten(-2)

    @torch.no_grad()
    def scale(self, factors: torch.Tensor) -> None:
        """Multiply the readers' weights by positive factors [channels], and divide what the maker makes by them."""
        if isinstance(self.maker, RMSNorm):
            self.maker.weight.div_(factors)
        else:
            self.maker.weight.mul_((1 / factors).unsqueeze(1))
            if self.maker.bias is not None:
                self.maker.bias.mul_(1 / factors)
        for reader in self.readers.values():
            reader.weight.mul_(self.per_input(factors))


def junctions(layer: DecoderLayer) -> list[Junction]:
    """All four of a layer that is not fused: before q, k and v, the attention's output, gate and up, and down.

    Attention sums values and SwiGLU multiplies by ``up``: a factor passes through both unchanged.
    """
    attention, mlp = layer.self_attn, layer.mlp
    return [
        Junction(_named(attention, "self_attn", "q_proj", "k_proj", "v_proj"), layer.input_layernorm),
        Junction(_named(mlp, "mlp", "gate_proj", "up_proj"), layer.post_attention_layernorm),
        Junction(
            _named(attention, "self_attn", "o_proj"),
            attention.v_proj,
            attention.head_dim,
            attention.num_heads // attention.num_kv_heads,
        ),
        Junction(_named(mlp, "mlp", "down_proj"), mlp.up_proj),
    ]


def _named(parent: nn.Module, prefix: str, *names: str) -> dict[str, nn.Linear]:
    readers: dict[str, nn.Linear] = {}
    for name in names:
        reader = getattr(parent, name)
        assert isinstance(reader, nn.Linear)
        readers[f"{prefix}.{name}"] = reader
    return readers
