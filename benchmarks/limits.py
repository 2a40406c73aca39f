"""What the rates of a machine allow a model at best."""

from __future__ import annotations

from apt_core.model_config import ModelConfig
from benchmarks.machine import Limits


def num_layer_weights(model: ModelConfig) -> int:
    """Weights of the matrices every token passes, without embedding and output head."""
    attention = model.hidden_size * model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads)
    return model.num_layers * (attention + 3 * model.hidden_size * model.intermediate_size)


def decode_limit(
    model: ModelConfig, limits: Limits, *, weight_bytes: float, kv_bytes: float, num_streams: int, context: int
) -> float:
    """Most tokens per second: a step reads all weights and contexts once and multiplies once for each stream.

    Args:
        model: its shape.
        limits: what the machine does.
        weight_bytes: of one weight.
        kv_bytes: of one element of the KV cache.
        num_streams: sequences in a step.
        context: tokens each of them has in the KV cache.
    """
    num_weights = num_layer_weights(model) + model.vocab_size * model.hidden_size
    context_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * kv_bytes * context
    read_s = (num_weights * weight_bytes + num_streams * context_bytes) / (limits.read_gb_s * 1e9)
    multiply_s = 2 * num_weights * num_streams / (limits.gemm_gflop_s * 1e9)
    return num_streams / max(read_s, multiply_s)


def prefill_limit(model: ModelConfig, limits: Limits) -> float:
    """Most prompt tokens per second: each is multiplied with every layer's weights, few with the output head's."""
    return limits.gemm_gflop_s * 1e9 / (2 * num_layer_weights(model))
