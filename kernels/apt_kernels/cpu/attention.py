"""Paged and variable-length attention on a processor, by torch's fused scaled_dot_product_attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from apt_kernels.reference import causal_mask


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
) -> torch.Tensor:
    """As `reference.paged_attention`; the leading num_decodes sequences, of one query each, run as dense batches."""
    out = torch.empty_like(query)
    contexts = context_lens.tolist()
    for rows in _buckets(contexts[:num_decodes]):
        index = torch.tensor(rows)
        longest = max(contexts[r] for r in rows)
        out[index] = _decode(
            query[index], key_cache, value_cache, context_lens[index], block_tables[index], longest, scale, window
        )
    starts = cu_seqlens_q.tolist()
    for b in range(num_decodes, len(contexts)):
        rows_of_b = slice(starts[b], starts[b + 1])
        keys, values = (
            _gather(cache, block_tables[b : b + 1], contexts[b])[0] for cache in (key_cache, value_cache)
        )
        out[rows_of_b] = _attend(query[rows_of_b], keys, values, scale, window)
    return out


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """As `reference.varlen_attention`."""
    bounds = cu_seqlens.tolist()
    spans = [slice(start, end) for start, end in zip(bounds, bounds[1:], strict=False)]
    return torch.cat([_attend(query[s], key[s], value[s], scale, window) for s in spans])


def _buckets(context_lens: list[int]) -> list[list[int]]:
    """Row numbers grouped so that within a group no context is more than twice as long as another.

    A group is padded to its longest context, so at most half of what it reads is padding.
    """
    buckets: dict[int, list[int]] = {}
    for row, length in enumerate(context_lens):
        buckets.setdefault(max(length, 64).bit_length(), []).append(row)
    return list(buckets.values())


def _gather(cache: torch.Tensor, block_tables: torch.Tensor, longest: int) -> torch.Tensor:
    """Blocks of each sequence side by side: [N, P, K, D] and [B, max_blocks] -> [B, L, K, D], L = longest."""
    num_blocks = -(-longest // cache.shape[1])
    tables = block_tables[:, :num_blocks]
    gathered = cache.index_select(0, tables.reshape(-1))
    return gathered.view(tables.shape[0], -1, *cache.shape[2:])[:, :longest]


def _decode(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """One query a sequence, [B, H, D]: the heads that share a kv head are the rows of one small matrix product."""
    num_kv_heads = key_cache.shape[2]
    keys, values = (_gather(cache, block_tables, longest).transpose(1, 2) for cache in (key_cache, value_cache))
    k_pos = torch.arange(longest)
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
