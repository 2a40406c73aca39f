"""How much of a machine a run uses."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from apt_core.model_config import ModelConfig
from apt_train.loss import Batch


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a step was, over all processes."""

    seconds: float
    num_tokens: int
    """Padding included."""
    peak_share: float
    """Of the rate at which this machine multiplies large matrices (MFU, arXiv 2204.02311)."""
    waited_s: float
    """Of the seconds, those spent waiting for data."""


class Stopwatch:
    """Times steps.

    Args:
        trains_weights: False where only adapters are trained: a frozen weight has no gradient to compute.
        peak: floating-point operations a second of all processes together.
        num_shares: processes that each read as many tokens of their own.
    """

    def __init__(self, config: ModelConfig, *, trains_weights: bool, peak: float, num_shares: int) -> None:
        self._config, self._trains_weights, self._peak, self._num_shares = config, trains_weights, peak, num_shares
        self._start, self._waited = time.perf_counter(), 0.0

    def start(self, waited_s: float) -> None:
        """A step begins; so much was waited in all steps before."""
        self._start, self._waited = time.perf_counter(), waited_s

    def stop(self, batches: Sequence[Batch], waited_s: float) -> Pace:
        """It has ended; so much was waited in it and in all before."""
        seconds = time.perf_counter() - self._start
        num_tokens = sum(len(batch.input_ids) for batch in batches)
        seen = sum(float(batch.metadata().context_lens.double().square().sum()) / 2 for batch in batches)
        flops = num_tokens * flops_per_token(
            self._config, seen / max(num_tokens, 1), trains_weights=self._trains_weights
        )
        share = flops * self._num_shares / seconds / self._peak
        return Pace(seconds, num_tokens * self._num_shares, share, waited_s - self._waited)


def flops_per_token(config: ModelConfig, mean_context: float, *, trains_weights: bool = True) -> float:
    """Of forward and backward passes, without recomputation: 6 a weight in a product (arXiv 2001.08361), and attention.

    Args:
        mean_context: tokens a query attends to on average.
        trains_weights: without it 4 a weight.
    """
    heads = config.num_heads * config.head_dim
    kv = 2 * config.num_kv_heads * config.head_dim
    layer = config.hidden_size * (2 * heads + kv + 3 * config.intermediate_size)
    weights = config.num_layers * layer + config.vocab_size * config.hidden_size
    return (6.0 if trains_weights else 4.0) * weights + 12.0 * config.num_layers * heads * mean_context


def product_rate(dtype: torch.dtype, device: torch.device, repeats: int = 5) -> float:
    """Floating-point operations a second of a large square matrix product, the best of some: the machine's peak."""
    size = 8192 if device.type == "cuda" else 1024
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
