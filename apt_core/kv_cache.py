"""Where keys and values of every layer are kept between steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from apt_core.model_config import ModelConfig

HUGE_PAGE = 2 * 1024 * 1024
"""Bytes. Large caches begin on one: what sequences hold lies scattered, and looking up many small pages takes long."""
CACHE_LINE = 64
"""Bytes. Small caches begin on one."""

SCALE_DTYPE = torch.float32
"""Of the scales of an int8 cache."""


@dataclass(frozen=True, slots=True)
class LayerKVCache:
    """Paged keys and values of one layer, each [N, P, K, D]; int8 ones with a scale for each token and head."""

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None = None
    """float32 [N, P, K]; None unless keys are int8."""
    value_scales: torch.Tensor | None = None


def allocate_kv_cache(
    config: ModelConfig, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[LayerKVCache]:
    """An empty cache for every layer. On a processor its memory is taken only as blocks are first used.

    Within a block the tokens of a head lie side by side, and so do their scales: attention reads a head at a time.
    """
    shape = (num_blocks, config.num_kv_heads, block_size, config.head_dim)

    def rows() -> torch.Tensor:
        return _zeros(shape, dtype, device).transpose(1, 2)

    def scales() -> torch.Tensor | None:
        return _zeros(shape[:3], SCALE_DTYPE, device).transpose(1, 2) if dtype == torch.int8 else None

    return [LayerKVCache(rows(), rows(), scales(), scales()) for _ in range(config.num_layers)]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy takes zero pages from the system, huge ones for large arrays, which cost nothing until they are written;
    # torch writes them all.
    num_bytes = math.prod(shape) * dtype.itemsize
    alignment = HUGE_PAGE if num_bytes > 2 * HUGE_PAGE else CACHE_LINE
    memory = np.zeros(num_bytes + alignment, dtype=np.uint8)
    start = -memory.ctypes.data % alignment
    return torch.from_numpy(memory[start : start + num_bytes]).view(dtype).view(shape)


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values one token takes over all layers, with their scales if dtype is int8."""
    scale_bytes = SCALE_DTYPE.itemsize if dtype == torch.int8 else 0
    return 2 * config.num_layers * config.num_kv_heads * (config.head_dim * dtype.itemsize + scale_bytes)
