"""Paged attention on a processor, by torch's fused scaled_dot_product_attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from apt_kernels.reference import causal_mask, dequantize_kv


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    num_decodes: int,
    scale: float,
    window: int | None,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
) -> torch.Tensor:
    """As `reference.paged_attention`; the leading num_decodes sequences, of one query each, run as dense batches."""
    out = torch.empty_like(query)
    contexts = context_lens.tolist()
    caches = ((key_cache, key_scales), (value_cache, value_scales))

    def gather(tables: torch.Tensor, length: int) -> list[torch.Tensor]:
        return [_gather(cache, scales, tables, length, query.dtype) for cache, scales in caches]

    for padded_len, rows in _buckets(contexts[:num_decodes]).items():
        index = torch.tensor(rows)
        keys, values = gather(block_tables[index], padded_len)
        out[index] = _decode(query[index], keys, values, context_lens[index], scale, window)
    starts = cu_seqlens_q.tolist()
    for b in range(num_decodes, len(contexts)):
        rows_of_b = slice(starts[b], starts[b + 1])
        keys, values = gather(block_tables[b : b + 1], contexts[b])
        out[rows_of_b] = _attend(query[rows_of_b], keys[0], values[0], scale, window)
    return out


def _buckets(context_lens: list[int]) -> dict[int, list[int]]:
    """Row numbers by the length their contexts are padded to: 64, 128, 256, ...

    A context's padding depends on its own length only, so a sequence's result does not depend on its batch mates, and
    at most half of what is read is padding.
    """
    buckets: dict[int, list[int]] = {}
    for row, length in enumerate(context_lens):
        buckets.setdefault(max(64, 1 << (length - 1).bit_length()), []).append(row)
    return buckets


def _gather(
    cache: torch.Tensor, scales: torch.Tensor | None, block_tables: torch.Tensor, length: int, dtype: torch.dtype
) -> torch.Tensor:
    """Blocks of each sequence side by side: [N, P, K, D] and [B, max_blocks] -> [B, length, K, D].

    An int8 cache comes in dtype. Where a table is shorter than the length, its sequence is padded with block 0, which
    the caller masks.
    """
    num_blocks = -(-length // cache.shape[1])
    tables = F.pad(block_tables, (0, max(num_blocks - block_tables.shape[1], 0)))[:, :num_blocks]
    blocks = tables.reshape(-1)
    gathered = dequantize_kv(
        cache.index_select(0, blocks), None if scales is None else scales.index_select(0, blocks), dtype
    )
    return gathered.reshape(tables.shape[0], -1, *cache.shape[2:])[:, :length]


def _decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """One query a sequence, [B, H, D], over padded keys and values [B, L, K, D].

    The heads that share a kv head are the rows of one small matrix product.
    """
    num_kv_heads = keys.shape[2]
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    k_pos = torch.arange(keys.shape[2])
    mask = k_pos < context_lens.unsqueeze(1)
    if window is not None:
        mask &= k_pos >= context_lens.unsqueeze(1) - window
    grouped = query.view(query.shape[0], num_kv_heads, -1, query.shape[2])
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask[:, None, None, :], scale=scale)
    return out.reshape(query.shape)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
    """One sequence, q [t, H, D] over k, v [L, K, D]: kv heads are the batch, the heads that share one its heads."""
    num_queries, num_heads, head_dim = q.shape
    context_len, num_kv_heads, _ = k.shape
    group = num_heads // num_kv_heads
    queries = q.view(num_queries, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    keys, values = (x.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1) for x in (k, v))
    if num_queries == context_len and window is None:
        out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale)
    else:
        mask = causal_mask(num_queries, context_len, window, q.device)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    return out.permute(2, 0, 1, 3).reshape(q.shape)
