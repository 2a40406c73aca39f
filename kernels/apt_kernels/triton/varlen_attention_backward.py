"""The backward pass of packed causal attention: one kernel for the queries' gradient, one for the keys' and values'.

Each program owns the tile it writes and takes all sums in one order: no atomics, equal bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from apt_kernels.triton.tuning import Config, tuned
from apt_kernels.triton.varlen_tiles import (
    LOG2E,
    default_config,
    find_tile,
    head_constants,
    is_visible,
    key_range,
    load_rows,
    query_range,
    shape_class,
    store_rows,
    tile_candidates,
)

QUERY_DEFAULTS = {
    128: Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=2),
    256: Config({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=4, num_stages=2),
    512: Config({"BLOCK_M": 64, "BLOCK_N": 16}, num_warps=8, num_stages=2),
    1024: Config({"BLOCK_M": 16, "BLOCK_N": 16}, num_warps=4, num_stages=2),
}
KEY_DEFAULTS = {
    256: Config({"BLOCK_M": 32, "BLOCK_N": 128}, num_warps=8, num_stages=2),
    512: Config({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=8, num_stages=2),
    1024: Config({"BLOCK_M": 16, "BLOCK_N": 16}, num_warps=4, num_stages=2),
}
"""Unmeasured, by the bytes of a padded row: at most 96 KiB of shared memory."""


@triton.jit
def _query_gradient(
    acc,
    q,
    grad,
    logsumexp,
    delta,
    positions,
    key,
    value,
    key_stride,
    value_stride,
    low,
    high,
    length,
    scale,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add what keys low .. high contribute to a query tile's gradient."""
    for first in tl.range(low, high, BLOCK_N):
        key_positions = first + tl.arange(0, BLOCK_N)
        k = load_rows(key, first, key_stride, length, MASKED, HEAD_DIM, BLOCK_N, BLOCK_D)
        v = load_rows(value, first, value_stride, length, MASKED, HEAD_DIM, BLOCK_N, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if MASKED:
            scores = tl.where(is_visible(positions[:, None], key_positions[None, :], WINDOW), scores, float("-inf"))
        weights = tl.exp2(scores - logsumexp[:, None])
        weights_grad = tl.dot(grad, tl.trans(v), input_precision="ieee")
        scores_grad = weights * (weights_grad - delta[:, None])
        acc += tl.dot(scores_grad.to(k.dtype), k, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["num_seqs", "num_tokens"])
def _query_kernel(
    query,
    key,
    value,
    out,
    grad,
    logsumexp,
    delta,
    query_grad,
    cu_seqlens,
    num_seqs,
    num_tokens,
    scale,
    scale2,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of queries of one head: their gradient, and delta [H, T], each row's product of out and its gradient."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    begin, length, first = find_tile(cu_seqlens, num_seqs, tile, BLOCK_M)
    if first >= length:
        return
    positions = first + tl.arange(0, BLOCK_M)
    key += begin * key_stride + head // GROUP * key_head_stride
    value += begin * value_stride + head // GROUP * value_head_stride
    query += begin * query_stride + head * query_head_stride
    out_stride = tl.num_programs(1) * HEAD_DIM
    out_offset = begin * out_stride + head * HEAD_DIM
    row_offset = head * num_tokens + begin

    q = load_rows(query, first, query_stride, length, True, HEAD_DIM, BLOCK_M, BLOCK_D)
    o = load_rows(out + out_offset, first, out_stride, length, True, HEAD_DIM, BLOCK_M, BLOCK_D)
    do = load_rows(grad + out_offset, first, out_stride, length, True, HEAD_DIM, BLOCK_M, BLOCK_D)
    d = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + row_offset + positions, d, mask=positions < length)
    lse = tl.load(logsumexp + row_offset + positions, mask=positions < length, other=float("inf"))

    low, full_low, full_high, high = key_range(first, length, WINDOW, BLOCK_M, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if WINDOW > 0:
        acc = _query_gradient(
            acc, q, do, lse, d, positions, key, value, key_stride, value_stride, low, full_low, length, scale2,
            True, WINDOW, HEAD_DIM, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    acc = _query_gradient(
        acc, q, do, lse, d, positions, key, value, key_stride, value_stride, full_low, full_high, length, scale2,
        False, WINDOW, HEAD_DIM, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    acc = _query_gradient(
        acc, q, do, lse, d, positions, key, value, key_stride, value_stride, full_high, high, length, scale2,
        True, WINDOW, HEAD_DIM, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    store_rows(query_grad + out_offset, acc * scale, first, out_stride, length, HEAD_DIM, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=["num_seqs", "num_tokens"])
def _key_kernel(
    query,
    key,
    value,
    grad,
    logsumexp,
    delta,
    key_grad,
    value_grad,
    cu_seqlens,
    num_seqs,
    num_tokens,
    scale,
    scale2,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of keys and values of one kv head, over all query heads that share it."""
    kv_head = tl.program_id(1).to(tl.int64)
    begin, length, first = find_tile(cu_seqlens, num_seqs, tl.program_id(0), BLOCK_N)
    if first >= length:
        return
    key_positions = first + tl.arange(0, BLOCK_N)
    key += begin * key_stride + kv_head * key_head_stride
    value += begin * value_stride + kv_head * value_head_stride
    k = load_rows(key, first, key_stride, length, True, HEAD_DIM, BLOCK_N, BLOCK_D)
    v = load_rows(value, first, value_stride, length, True, HEAD_DIM, BLOCK_N, BLOCK_D)

    low, high = query_range(first, length, WINDOW, BLOCK_M, BLOCK_N)
    key_acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    value_acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_stride = tl.num_programs(1) * GROUP * HEAD_DIM
    for member in range(GROUP):
        head = kv_head * GROUP + member
        head_query = query + begin * query_stride + head * query_head_stride
        head_grad = grad + begin * grad_stride + head * HEAD_DIM
        row_offset = head * num_tokens + begin
        # All tiles are masked: a loop of its own for those that need no mask takes registers that the sums need.
        for start in tl.range(low, high, BLOCK_M):
            positions = start + tl.arange(0, BLOCK_M)
            q = load_rows(head_query, start, query_stride, length, True, HEAD_DIM, BLOCK_M, BLOCK_D)
            do = load_rows(head_grad, start, grad_stride, length, True, HEAD_DIM, BLOCK_M, BLOCK_D)
            lse = tl.load(logsumexp + row_offset + positions, mask=positions < length, other=float("inf"))
            d = tl.load(delta + row_offset + positions, mask=positions < length, other=0.0)
            scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale2
            scores = tl.where(is_visible(positions[None, :], key_positions[:, None], WINDOW), scores, float("-inf"))
            weights = tl.exp2(scores - lse[None, :])
            value_acc += tl.dot(weights.to(do.dtype), do, input_precision="ieee")
            weights_grad = tl.dot(v, tl.trans(do), input_precision="ieee")
            scores_grad = weights * (weights_grad - d[None, :])
            key_acc += tl.dot(scores_grad.to(q.dtype), q, input_precision="ieee")
    out_stride = tl.num_programs(1) * HEAD_DIM
    out_offset = begin * out_stride + kv_head * HEAD_DIM
    store_rows(key_grad + out_offset, key_acc * scale, first, out_stride, length, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_rows(value_grad + out_offset, value_acc, first, out_stride, length, HEAD_DIM, BLOCK_N, BLOCK_D)


def query_candidates() -> list[Config]:
    """Configurations of the queries' kernel worth measuring, as `varlen_attention.candidates`."""
    return tile_candidates([(32, 32), (64, 32), (64, 64), (128, 32), (128, 64)])


def key_candidates() -> list[Config]:
    """Configurations of the keys' kernel worth measuring, as `varlen_attention.candidates`."""
    return tile_candidates([(32, 32), (32, 64), (64, 64), (32, 128), (64, 128)])


@torch.library.custom_op("apt_triton::varlen_attention_backward", mutates_args=())
def attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query [T, H, D], key and value [T, K, D] from out's; window 0 is none."""
    gradients = _outputs(query, key, value)
    grad, delta = grad.contiguous(), torch.empty_like(logsumexp)
    num_tokens, num_heads, head_dim = query.shape
    num_seqs, num_kv_heads = cu_seqlens.shape[0] - 1, key.shape[1]
    layout = (cu_seqlens, num_seqs, num_tokens, scale, scale * LOG2E)
    strides = (*query.stride()[:2], *key.stride()[:2], *value.stride()[:2])
    constants = {"GROUP": num_heads // num_kv_heads, **head_constants(head_dim, window)}
    kind = shape_class(head_dim, query.dtype)

    # It comes first: the other kernel reads its delta.
    default = default_config(head_dim, query.dtype, QUERY_DEFAULTS)
    config = tuned("varlen_attention_query_grad", kind, query.device, default)
    _query_kernel[(num_tokens // config.blocks["BLOCK_M"] + num_seqs, num_heads)](
        *(query, key, value, out, grad, logsumexp, delta, gradients[0], *layout, *strides),
        **constants,
        **config.options(),
    )
    default = default_config(head_dim, query.dtype, KEY_DEFAULTS)
    config = tuned("varlen_attention_key_grad", kind, query.device, default)
    _key_kernel[(num_tokens // config.blocks["BLOCK_N"] + num_seqs, num_kv_heads)](
        *(query, key, value, grad, logsumexp, delta, gradients[1], gradients[2], *layout, *strides),
        **constants,
        **config.options(),
    )
    return gradients


@attention_backward.register_fake
def _(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _outputs(query, key, value)


def _outputs(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query_grad, key_grad, value_grad = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)
    )
    return query_grad, key_grad, value_grad
