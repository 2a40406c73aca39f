"""The public ops: check arguments, then choose triton | cpu | reference by device.

Everything here is made of torch ops, so autograd and torch.compile see through it. Backends that are opaque to them
(C++, Triton) register with torch.library.
"""

from __future__ import annotations

import torch

from apt_kernels import reference
from apt_kernels.cpu import attention as cpu_attention
from apt_kernels.cpu.linear import can_pack, pack_linear_weight, packed_linear
from apt_kernels.reference import apply_rope, fused_add_rms_norm, rms_norm, silu_and_mul, store_kv

__all__ = [
    "apply_rope",
    "can_pack",
    "fused_add_rms_norm",
    "pack_linear_weight",
    "packed_linear",
    "paged_attention",
    "rms_norm",
    "silu_and_mul",
    "store_kv",
    "varlen_attention",
]


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    num_decodes: int,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention over a paged KV cache; see `reference.paged_attention`.

    Args:
        num_decodes: how many leading sequences have exactly one query.

    Raises:
        ValueError: shapes or dtypes that do not fit together; names the argument.
    """
    _check_heads(query, key_cache.shape[2], "key_cache")
    _require(key_cache.shape == value_cache.shape, "value_cache", "must have key_cache's shape")
    num_seqs = context_lens.shape[0]
    _require(cu_seqlens_q.shape[0] == num_seqs + 1, "cu_seqlens_q", "must have one more entry than context_lens")
    _require(block_tables.shape[0] == num_seqs, "block_tables", "must have one row per sequence")
    if query.device.type == "cpu":
        return cpu_attention.paged_attention(
            query, key_cache, value_cache, cu_seqlens_q, context_lens, block_tables, num_decodes, scale, window
        )
    return reference.paged_attention(
        query, key_cache, value_cache, cu_seqlens_q, context_lens, block_tables, scale, window
    )


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention within packed sequences; see `reference.varlen_attention`.

    Raises:
        ValueError: shapes or dtypes that do not fit together; names the argument.
    """
    _check_heads(query, key.shape[1], "key")
    _require(key.shape == value.shape, "value", "must have key's shape")
    if query.device.type == "cpu":
        return cpu_attention.varlen_attention(query, key, value, cu_seqlens, scale, window)
    return reference.varlen_attention(query, key, value, cu_seqlens, scale, window)


def _check_heads(query: torch.Tensor, num_kv_heads: int, name: str) -> None:
    _require(query.dim() == 3, "query", f"must be [T, H, D], got {tuple(query.shape)}")
    fits = query.shape[1] % num_kv_heads == 0
    _require(fits, name, f"has {num_kv_heads} heads, which do not divide the {query.shape[1]} of query")


def _require(ok: bool, name: str, problem: str) -> None:
    if not ok:
        raise ValueError(f"{name} {problem}")
