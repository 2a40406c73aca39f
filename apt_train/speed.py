"""How much of a machine a run uses."""

from __future__ import annotations

import time

import torch

from apt_core.model_config import ModelConfig


def flops_per_token(config: ModelConfig, mean_context: float) -> float:
    """Of forward and backward passes, without recomputation: 6 a weight in a product (arXiv 2001.08361), and attention.

    Args:
        mean_context: tokens a query attends to on average.
    """
    heads = config.num_heads * config.head_dim
    kv = 2 * config.num_kv_heads * config.head_dim
    layer = config.hidden_size * (2 * heads + kv + 3 * config.intermediate_size)
    weights = config.num_layers * layer + config.vocab_size * config.hidden_size
    return 6.0 * weights + 12.0 * config.num_layers * heads * mean_context


def product_rate(dtype: torch.dtype, device: torch.device, size: int = 1024, repeats: int = 5) -> float:
    """Floating-point operations a second of a large square matrix product, the best of some: the machine's peak."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        left @ right
        _wait(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
