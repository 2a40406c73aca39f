"""Where keys and values of every layer are kept between steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from apt_core.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class LayerKVCache:
    """Paged keys and values of one layer, each [N, P, K, D]."""

    keys: torch.Tensor
    values: torch.Tensor


def allocate_kv_cache(
    config: ModelConfig, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[LayerKVCache]:
    """An empty cache for every layer. Memory is touched only as blocks are first used."""
    shape = (num_blocks, block_size, config.num_kv_heads, config.head_dim)

    def zeros() -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return [LayerKVCache(zeros(), zeros()) for _ in range(config.num_layers)]


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values one token takes over all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize
