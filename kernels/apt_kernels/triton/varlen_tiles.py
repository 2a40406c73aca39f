"""What the kernels of packed causal attention share: where a tile lies, its rows, and which of its scores count.

A tile belongs to one sequence and starts at a multiple of its size in there, so that a sequence's results do not depend
on its company. Positions count from the sequence's first token.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from apt_kernels.triton.launch import require, require_device
from apt_kernels.triton.tuning import Config

LOG2E = 1.4426950408889634
"""Scores are multiplied with it, since a GPU computes powers of 2."""
MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def find_tile(cu_seqlens, num_seqs, tile, BLOCK: tl.constexpr):
    """Where a tile lies: its sequence's first token and length, and its own first position.

    The tiles of sequence b begin with number cu_seqlens[b] // BLOCK + b, which leaves it at least as many as it needs;
    those too many lie behind its end. The last sequence that begins with or before the tile is it.
    """
    low: tl.int32 = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens + middle) // BLOCK + middle <= tile:
            low = middle
        else:
            high = middle
    begin = tl.load(cu_seqlens + low)
    length = tl.load(cu_seqlens + low + 1) - begin
    return begin.to(tl.int64), length, (tile - begin // BLOCK - low) * BLOCK


@triton.jit
def load_rows(
    base,
    first,
    stride,
    length,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows from `first` on of a head, [BLOCK, BLOCK_D]: zeros beyond HEAD_DIM and, if MASKED, beyond the length."""
    rows = tl.arange(0, BLOCK)[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    # One 64-bit offset for all: pointers of full width for each element take registers that sums need.
    pointers = base + tl.cast(first, tl.int64) * stride + (rows * stride + columns)
    if MASKED:
        return tl.load(pointers, mask=(first + rows < length) & (columns < HEAD_DIM), other=0.0)
    if HEAD_DIM < BLOCK_D:
        return tl.load(pointers, mask=columns < HEAD_DIM, other=0.0)
    return tl.load(pointers)


@triton.jit
def store_rows(base, x, first, stride, length, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write [BLOCK, BLOCK_D] into a head's rows from `first` on, as far as the sequence and HEAD_DIM reach."""
    rows = tl.arange(0, BLOCK)[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    pointers = base + tl.cast(first, tl.int64) * stride + (rows * stride + columns)
    tl.store(pointers, x.to(base.dtype.element_ty), mask=(first + rows < length) & (columns < HEAD_DIM))


@triton.jit
def is_visible(query_positions, key_positions, WINDOW: tl.constexpr):
    """Whether a query sees a key, both broadcast: causal, and within the last WINDOW keys unless that is 0."""
    visible = key_positions <= query_positions
    if WINDOW > 0:
        visible &= key_positions > query_positions - WINDOW
    return visible


@triton.jit
def key_range(first, length, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which keys the query tile at `first` sees, in tiles of BLOCK_N: (low, full_low, full_high, high).

    Tiles from full_low to full_high are visible to all of its queries and need no mask.
    """
    high = tl.minimum(first + BLOCK_M, length)
    full_high = (first + 1) // BLOCK_N * BLOCK_N
    low = 0
    full_low = 0
    if WINDOW > 0:
        low = tl.maximum(first - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        full_low = tl.cdiv(tl.maximum(high - WINDOW, 0), BLOCK_N) * BLOCK_N
        full_high = tl.maximum(full_high, low)
        full_low = tl.minimum(full_low, full_high)
    return low, full_low, full_high, high


@triton.jit
def query_range(first, length, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which queries see the key tile at `first`, in tiles of BLOCK_M: (low, high)."""
    low = first // BLOCK_M * BLOCK_M
    high = length
    if WINDOW > 0:
        high = tl.minimum(length, first + BLOCK_N - 1 + WINDOW)
    return low, high


def shape_class(head_dim: int, dtype: torch.dtype) -> str:
    """What the best tiles depend on. Not on lengths: equal sequences must get equal results in all company."""
    return f"d{triton.next_power_of_2(head_dim)}_{dtype.itemsize * 8}bit"


def head_constants(head_dim: int, window: int) -> dict[str, int]:
    """Constants every kernel takes."""
    return {"HEAD_DIM": head_dim, "BLOCK_D": max(16, triton.next_power_of_2(head_dim)), "WINDOW": window}


def default_config(head_dim: int, dtype: torch.dtype, by_row_bytes: Mapping[int, Config]) -> Config:
    """The first configuration whose rows, padded to BLOCK_D, are wide enough; their tiles must fit shared memory."""
    row_bytes = head_constants(head_dim, 0)["BLOCK_D"] * dtype.itemsize
    return next(config for limit, config in by_row_bytes.items() if row_bytes <= limit)


def tile_candidates(sizes: list[tuple[int, int]]) -> list[Config]:
    """Tiles of (queries, keys) with every number of warps and stages worth measuring."""
    return [
        Config({"BLOCK_M": queries, "BLOCK_N": keys}, num_warps=warps, num_stages=stages)
        for queries, keys in sizes
        for warps in (4, 8)
        for stages in (2, 3)
    ]


def check_arguments(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, window: int | None
) -> None:
    """Refuse what the kernels cannot run.

    Raises:
        ValueError: names the argument.
    """
    require_device(query=query, key=key, value=value, cu_seqlens=cu_seqlens)
    require(query.dim() == 3, "query", f"must be [T, H, D], got {tuple(query.shape)}")
    require(query.dtype in DTYPES, "query", f"must be one of {DTYPES}, got {query.dtype}")
    num_tokens, num_heads, head_dim = query.shape
    require(0 < head_dim <= MAX_HEAD_DIM, "query", f"has heads of {head_dim}, more than {MAX_HEAD_DIM}")
    for name, x in (("key", key), ("value", value)):
        fits = x.dim() == 3 and x.shape[0] == num_tokens and x.shape[2] == head_dim and x.dtype == query.dtype
        require(fits, name, f"must be {query.dtype} [{num_tokens}, K, {head_dim}], got {x.dtype} {tuple(x.shape)}")
    require(value.shape == key.shape, "value", "must have key's shape")
    num_kv_heads = key.shape[1]
    divides = num_kv_heads > 0 and num_heads % num_kv_heads == 0
    require(divides, "key", f"has {num_kv_heads} heads, which do not divide the {num_heads} of query")
    for name, x in (("query", query), ("key", key), ("value", value)):
        require(x.stride(2) == 1, name, "must be contiguous within a head")
    fits = cu_seqlens.dim() == 1 and cu_seqlens.shape[0] > 1 and cu_seqlens.dtype == torch.int32
    require(fits and cu_seqlens.is_contiguous(), "cu_seqlens", "must be contiguous int32 [B+1] of one sequence or more")
    require(window is None or window > 0, "window", f"must be positive, got {window}")
