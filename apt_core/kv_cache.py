"""Where keys and values of every layer are kept between steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from apt_core.model_config import ModelConfig

CACHE_LINE = 64
"""Bytes; keys and values begin on one."""


@dataclass(frozen=True, slots=True)
class LayerKVCache:
    """Paged keys and values of one layer, each [N, P, K, D]."""

    keys: torch.Tensor
    values: torch.Tensor


def allocate_kv_cache(
    config: ModelConfig, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[LayerKVCache]:
    """An empty cache for every layer. On a processor its memory is taken only as blocks are first used."""
    shape = (num_blocks, block_size, config.num_kv_heads, config.head_dim)
    return [LayerKVCache(_zeros(shape, dtype, device), _zeros(shape, dtype, device)) for _ in range(config.num_layers)]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy takes zero pages from the system, which cost nothing until they are written; torch writes them all.
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.zeros(num_bytes + CACHE_LINE, dtype=np.uint8)
    start = -memory.ctypes.data % CACHE_LINE
    return torch.from_numpy(memory[start : start + num_bytes]).view(dtype).view(shape)


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values one token takes over all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize
