"""Causal attention of packed queries over a paged KV cache; the twin is `reference.paged_attention`.

One kernel serves decodes, chunks of prompts and whole prompts: the rows of a tile are queries times the query heads
that share a kv head, as in vLLM's unified kernel (arXiv 2511.11581). The leading sequences of one query each have a
launch of their own, so that each kind gets tiles of its size. A launch with too few programs for the device cuts every
context into segments, whose results a second kernel merges (flash decoding). All decisions follow from numbers the host
knows, and grids from their bounds: nothing waits for the device, and a captured graph stays right as contexts grow.
Sequences without queries or without context, which pad such a graph, cost a program that does nothing.

A row does not depend on its company, bit for bit, as long as launches have the same tile sizes and number of segments:
a context is cut into the same tiles, and into segments by its own length. But the load decides how many segments there
are, and `max_seqlen_q` the tiles of a prompt; give `num_segments` where a decode must not depend on the load either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton

from apt_kernels.triton.kv_cache import require_cache
from apt_kernels.triton.launch import require, require_device
from apt_kernels.triton.paged_attention_cut import MAX_ROWS, MAX_SEGMENTS, Cut, Layer, Load, cut_launch
from apt_kernels.triton.paged_attention_kernels import attend, merge

BLOCK_SIZES = (16, 32, 64, 128, 256)
MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True)
class Cache:
    """Paged keys and values [N, P, K, D]; int8 ones with scales [N, P, K]."""

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None
    value_scales: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Sequences:
    """Consecutive sequences of a step that one launch serves."""

    cu_seqlens_q: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    first_token: int
    load: Load


@dataclass(frozen=True, slots=True)
class Scores:
    """What becomes of the product of a query and a key."""

    scale: float
    window: int | None
    soft_cap: float | None

    def multipliers(self) -> tuple[float, float]:
        """Of the product before a soft cap, which makes it an exponent of 2, and of the score, which does the same."""
        log2_e = math.log2(math.e)
        if self.soft_cap is None:
            return 1.0, self.scale * log2_e
        return 2 * self.scale / self.soft_cap * log2_e, self.soft_cap * log2_e


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    num_decodes: int,
    max_seqlen_q: int,
    max_context_len: int,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    num_segments: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `reference.paged_attention`. Rows of tokens that belong to no sequence are not written.

    Args:
        query: [T, H, D] float32, bfloat16 or float16; D a multiple of 8, at most 256.
        key_cache, value_cache: [N, P, K, D] of query's dtype, int8 or float8_e4m3fn, strided alike, and in any way but
            for D. P is a power of two in 16 .. 256.
        num_decodes: how many leading sequences have one query each.
        max_seqlen_q, max_context_len: bounds on the queries and the context of any sequence. Both decide how the work
            is cut; a context longer than its bound is still read whole.
        num_segments: parts of every context, a power of two; None chooses by load.
        out: [T, H, D], contiguous, written and returned; None makes one.

    Returns:
        [T, H, D]; 0 for a query that sees no key.

    Raises:
        ValueError: an argument the kernel does not take, or that does not fit the others; names it.
    """
    cache, scores = Cache(key_cache, value_cache, key_scales, value_scales), Scores(scale, window, soft_cap)
    load = Load(query.shape[0], context_lens.shape[0], max_seqlen_q, max_context_len)
    sequences = Sequences(cu_seqlens_q, context_lens, block_tables, 0, load)
    _check_cache(query, cache)
    _check_sequences(query, sequences, num_decodes)
    _check_scores(scores)
    fits = num_segments is None or (0 < num_segments <= MAX_SEGMENTS and num_segments.bit_count() == 1)
    require(fits, "num_segments", f"must be a power of two up to {MAX_SEGMENTS}, got {num_segments}")

    layer = Layer(query.shape[1], key_cache.shape[2], query.shape[2], query.dtype, key_cache.dtype, window)
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    require_device(query=query, out=out)
    fits = out.shape == query.shape and out.dtype == query.dtype and out.is_contiguous()
    require(fits, "out", f"must be contiguous {query.dtype} {list(query.shape)}")
    for part in _by_kind(sequences, num_decodes):
        cut = cut_launch(layer, part.load, query.device)
        if num_segments is not None:
            cut = replace(cut, num_segments=num_segments)
        _launch(out, query, cache, part, scores, layer, cut)
    return out


def _by_kind(sequences: Sequences, num_decodes: int) -> list[Sequences]:
    """The leading decodes and the other sequences, each if there are any."""
    load = sequences.load
    if num_decodes == load.num_seqs:
        parts = [_part(sequences, 0, load.num_seqs, load.num_tokens, 1)]
    else:
        parts = [
            _part(sequences, 0, num_decodes, num_decodes, 1),
            _part(sequences, num_decodes, load.num_seqs, load.num_tokens, load.max_seqlen_q),
        ]
    return [part for part in parts if part.load.num_seqs > 0 and part.load.num_tokens > 0]


def _part(sequences: Sequences, first: int, end: int, end_token: int, max_seqlen_q: int) -> Sequences:
    """Sequences first .. end, before which there are decodes only."""
    return Sequences(
        sequences.cu_seqlens_q[first : end + 1],
        sequences.context_lens[first:end],
        sequences.block_tables[first:end],
        first,
        Load(end_token - first, end - first, max_seqlen_q, sequences.load.max_context_len),
    )


def _launch(
    out: torch.Tensor,
    query: torch.Tensor,
    cache: Cache,
    sequences: Sequences,
    scores: Scores,
    layer: Layer,
    cut: Cut,
) -> None:
    num_tokens, num_seqs = sequences.load.num_tokens, sequences.load.num_seqs
    dims = max(triton.next_power_of_2(layer.head_dim), 16)
    num_partials = num_tokens * layer.num_heads * cut.num_segments if cut.num_segments > 1 else 0
    acc = torch.empty(num_partials * layer.head_dim, dtype=torch.float32, device=query.device)
    stats = torch.empty(2 * num_partials, dtype=torch.float32, device=query.device)
    scale_strides = (0, 0, 0) if cache.key_scales is None else cache.key_scales.stride()
    attend[(cut.num_tiles * layer.num_kv_heads, cut.num_segments)](
        *(out, acc, stats, query, cache.keys, cache.values, cache.key_scales, cache.value_scales),
        *(sequences.cu_seqlens_q, sequences.context_lens, sequences.block_tables),
        *(sequences.first_token, num_seqs, num_partials, *scores.multipliers(), scores.window or 0),
        *(*query.stride()[:2], sequences.block_tables.stride(0), *cache.keys.stride()[:3], *scale_strides),
        NUM_KV_HEADS=layer.num_kv_heads,
        GROUP=layer.group,
        HEAD_DIM=layer.head_dim,
        DIMS=dims,
        BLOCK=cache.keys.shape[1],
        IS_SCALED=cache.key_scales is not None,
        HAS_CAP=scores.soft_cap is not None,
        HAS_WINDOW=scores.window is not None,
        HAS_SEARCH=cut.has_search,
        enable_fp_fusion=True,
        **cut.config.options(),
    )
    if num_partials > 0:
        merge[(num_tokens, layer.num_heads)](
            *(out, acc, stats, sequences.cu_seqlens_q, sequences.first_token, num_seqs, num_partials),
            cut.num_segments,
            NUM_HEADS=layer.num_heads,
            HEAD_DIM=layer.head_dim,
            DIMS=dims,
            SEGMENTS=MAX_SEGMENTS,
            enable_fp_fusion=True,
        )


def _check_cache(query: torch.Tensor, cache: Cache) -> None:
    keys, scales = cache.keys, {"key_scales": cache.key_scales, "value_scales": cache.value_scales}
    require_device(query=query, key_cache=keys, value_cache=cache.values, **scales)
    require_cache(query, "query", keys, cache.values, cache.key_scales, cache.value_scales)
    require(query.dim() == 3 and query.stride(2) == 1, "query", f"must be [T, H, D], D dense: {tuple(query.shape)}")
    _, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, cached_dim = keys.shape
    fits = head_dim % 8 == 0 and 0 < head_dim <= MAX_HEAD_DIM
    require(fits, "query", f"must have a head size that is a multiple of 8 up to {MAX_HEAD_DIM}, not {head_dim}")
    require(cached_dim == head_dim, "key_cache", f"has heads of {cached_dim}, query of {head_dim}")
    require(block_size in BLOCK_SIZES, "key_cache", f"must have blocks of {BLOCK_SIZES} tokens, not {block_size}")
    fits = num_heads % num_kv_heads == 0 and num_heads // num_kv_heads <= MAX_ROWS
    require(fits, "key_cache", f"has {num_kv_heads} heads, which the {num_heads} of query cannot share")


def _check_sequences(query: torch.Tensor, sequences: Sequences, num_decodes: int) -> None:
    cu_seqlens, contexts, tables = sequences.cu_seqlens_q, sequences.context_lens, sequences.block_tables
    require_device(query=query, cu_seqlens_q=cu_seqlens, context_lens=contexts, block_tables=tables)
    num_seqs = sequences.load.num_seqs
    for name, x, shape in (("cu_seqlens_q", cu_seqlens, (num_seqs + 1,)), ("context_lens", contexts, (num_seqs,))):
        fits = x.shape == shape and x.dtype == torch.int32 and x.is_contiguous()
        require(fits, name, f"must be contiguous int32 {list(shape)}")
    fits = tables.dim() == 2 and tables.shape[0] == num_seqs and tables.dtype == torch.int32 and tables.stride(1) == 1
    require(fits, "block_tables", f"must be int32 [{num_seqs}, max_blocks] with dense rows")
    require(0 <= num_decodes <= num_seqs, "num_decodes", f"must be in 0 .. {num_seqs}, got {num_decodes}")
    require(sequences.load.max_seqlen_q > 0, "max_seqlen_q", "must be positive")
    require(sequences.load.max_context_len >= 0, "max_context_len", "must not be negative")


def _check_scores(scores: Scores) -> None:
    for name, value in (("scale", scores.scale), ("window", scores.window), ("soft_cap", scores.soft_cap)):
        require(value is None or value > 0, name, f"must be positive, got {value}")
