"""Attention, over the paged KV cache and within packed sequences."""

from __future__ import annotations

import torch

from apt_kernels import reference
from apt_kernels.cpu import attention as cpu_attention
from apt_kernels.cpu import varlen_attention as cpu_varlen_attention
from apt_kernels.ops import backends
from apt_kernels.ops.backends import require
from apt_kernels.ops.kv_cache import check_caches, has_native_cache

# Triton is for NVIDIA's GPUs here: a torch without CUDA does not import it.
if torch.version.cuda is not None:
    from apt_kernels.triton import paged_attention as triton_attention
    from apt_kernels.triton import varlen_attention as triton_varlen_attention


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
    soft_cap: float | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_context_len: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention over a paged KV cache; see `reference.paged_attention`.

    Args:
        num_decodes: how many leading sequences have exactly one query.
        max_seqlen_q, max_context_len: bounds on the queries and the context of any sequence, by which a GPU's work is
            cut; None takes the largest the tensors allow.
        out: [T, H, D], contiguous, written and returned; None makes one.

    Raises:
        ValueError: shapes or dtypes that do not fit together; names the argument.
    """
    _check_heads(query, key_cache.shape[2], "key_cache")
    check_caches(key_cache, value_cache, key_scales, value_scales)
    num_seqs = context_lens.shape[0]
    require(cu_seqlens_q.shape[0] == num_seqs + 1, "cu_seqlens_q", "must have one more entry than context_lens")
    require(block_tables.shape[0] == num_seqs, "block_tables", "must have one row per sequence")
    require(window is None or window > 0, "window", f"must be positive, got {window}")
    require(soft_cap is None or soft_cap > 0, "soft_cap", f"must be positive, got {soft_cap}")
    if out is not None:
        fits = out.shape == query.shape and out.dtype == query.dtype and out.is_contiguous()
        require(fits, "out", f"must be contiguous {query.dtype} {tuple(query.shape)}")
    if backends.is_triton(query) and not backends.wants_gradient(query):
        most_keys = block_tables.shape[1] * key_cache.shape[1]
        return triton_attention.paged_attention(
            query,
            key_cache,
            value_cache,
            cu_seqlens_q=cu_seqlens_q,
            context_lens=context_lens,
            block_tables=block_tables,
            num_decodes=num_decodes,
            max_seqlen_q=max(query.shape[0], 1) if max_seqlen_q is None else max_seqlen_q,
            max_context_len=most_keys if max_context_len is None else max_context_len,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            key_scales=key_scales,
            value_scales=value_scales,
            out=out,
        )
    layout = (cu_seqlens_q, context_lens, block_tables)
    if soft_cap is not None:
        capped = reference.paged_attention(
            query, key_cache, value_cache, *layout, scale, window, key_scales, value_scales, soft_cap
        )
        return _into(out, capped)
    cache = (key_cache, value_cache)
    can_tile = query.shape[2] % 16 == 0 and scale > 0
    if (
        can_tile
        and backends.is_native(query)
        and has_native_cache(query, key_cache, value_cache, key_scales, value_scales)
    ):
        made: torch.Tensor = torch.ops.apt_cpu.paged_attention(
            query, key_cache, value_cache, key_scales, value_scales, *layout, scale, window
        )
        return _into(out, made)
    if query.device.type == "cpu":
        result = cpu_attention.paged_attention(
            query, *cache, *layout, num_decodes, scale, window, key_scales, value_scales
        )
    else:
        result = reference.paged_attention(query, *cache, *layout, scale, window, key_scales, value_scales)
    return _into(out, result)


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
    require(key.shape == value.shape, "value", "must have key's shape")
    if backends.is_triton(query, key, value):
        return triton_varlen_attention.varlen_attention(
            query, key, value, cu_seqlens=cu_seqlens, scale=scale, window=window
        )
    if query.device.type == "cpu":
        out: torch.Tensor = cpu_varlen_attention.varlen_attention(query, key, value, cu_seqlens, scale, window)
        return out
    return reference.varlen_attention(query, key, value, cu_seqlens, scale, window)


def _check_heads(query: torch.Tensor, num_kv_heads: int, name: str) -> None:
    require(query.dim() == 3, "query", f"must be [T, H, D], got {tuple(query.shape)}")
    fits = query.shape[1] % num_kv_heads == 0
    require(fits, name, f"has {num_kv_heads} heads, which do not divide the {query.shape[1]} of query")


def _into(out: torch.Tensor | None, result: torch.Tensor) -> torch.Tensor:
    return result if out is None else out.copy_(result)
