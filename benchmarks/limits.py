"""What the rates of a machine allow a model at best."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from apt_core.model_config import ModelConfig
from benchmarks.machine import Limits

WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "float8": 1.0, "int4": 0.625}
"""Of one weight by precision; 4 bits have a scale and a minimum in 16 bits for each 32, the others' few scales are left
out."""
MULTIPLIED_IN = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8, "int4": torch.int8}
"""Element type of the products by precision of the weights."""


def num_layer_weights(model: ModelConfig) -> int:
    """Weights of the matrices every token passes, without embedding and output head."""
    attention = model.hidden_size * model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads)
    return model.num_layers * (attention + 3 * model.hidden_size * model.intermediate_size)


@dataclass(frozen=True, slots=True)
class DecodeLimit:
    """What one step needs at least. It is bound by whichever takes longer."""

    num_streams: int
    read_s: float
    """To read all weights once, and all keys and values."""
    multiply_s: float
    """To multiply each weight once for each stream."""

    @property
    def tokens_per_s(self) -> float:
        """Most tokens per second."""
        return self.num_streams / max(self.read_s, self.multiply_s)

    @property
    def bound_by(self) -> str:
        """Reading or multiplying."""
        return "reading" if self.read_s > self.multiply_s else "multiplying"


def decode_limit(
    model: ModelConfig,
    limits: Limits,
    *,
    weight_bytes: float,
    kv_bytes: float,
    num_streams: int,
    context: int,
    head_bytes: float | None = None,
) -> DecodeLimit:
    """What the machine's rates allow.

    Args:
        model: its shape.
        limits: what the machine does.
        weight_bytes: of one weight.
        kv_bytes: of one element of the KV cache.
        num_streams: sequences in a step.
        context: tokens each of them has in the KV cache.
        head_bytes: of one weight of the output head; None: as the others.
    """
    num_head_weights = model.vocab_size * model.hidden_size
    num_weights = num_layer_weights(model) + num_head_weights
    all_bytes = num_layer_weights(model) * weight_bytes
    all_bytes += num_head_weights * (weight_bytes if head_bytes is None else head_bytes)
    all_bytes += num_streams * context * 2 * model.num_layers * model.num_kv_heads * model.head_dim * kv_bytes
    return DecodeLimit(
        num_streams=num_streams,
        read_s=all_bytes / (limits.read_gb_s * 1e9),
        multiply_s=2 * num_weights * num_streams / (limits.gemm_gflop_s * 1e9),
    )


def prefill_limit(model: ModelConfig, limits: Limits) -> float:
    """Most prompt tokens per second: each is multiplied with every layer's weights, few with the output head's."""
    return limits.gemm_gflop_s * 1e9 / (2 * num_layer_weights(model))
