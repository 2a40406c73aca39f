"""Causal attention within packed sequences, forward and backward: FlashAttention-2 (arXiv 2307.08691).

The forward pass keeps the logarithm of each row's softmax sum, from which the backward pass (varlen_attention_backward)
makes the probabilities again.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from apt_kernels.triton.tuning import Config, tuned
from apt_kernels.triton.varlen_attention_backward import attention_backward
from apt_kernels.triton.varlen_tiles import (
    LOG2E,
    check_arguments,
    default_config,
    find_tile,
    head_constants,
    is_visible,
    key_range,
    load_rows,
    shape_class,
    store_rows,
    tile_candidates,
)

DEFAULTS = {
    128: Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=4, num_stages=3),
    256: Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=2),
    512: Config({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=4, num_stages=2),
    1024: Config({"BLOCK_M": 32, "BLOCK_N": 16}, num_warps=4, num_stages=2),
}
"""Unmeasured, by the bytes of a padded row: at most 96 KiB of shared memory."""


@triton.jit
def _attend(
    state,
    q,
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
    """Take keys low .. high into the state of a query tile: weighted sum, largest score, sum of weights."""
    acc, top, total = state
    for first in tl.range(low, high, BLOCK_N):
        key_positions = first + tl.arange(0, BLOCK_N)
        k = load_rows(key, first, key_stride, length, MASKED, HEAD_DIM, BLOCK_N, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if MASKED:
            scores = tl.where(is_visible(positions[:, None], key_positions[None, :], WINDOW), scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen no key yet has no largest score, and -inf less -inf is no number.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        v = load_rows(value, first, value_stride, length, MASKED, HEAD_DIM, BLOCK_N, BLOCK_D)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=["num_seqs", "num_tokens"])
def _forward_kernel(
    query,
    key,
    value,
    out,
    logsumexp,
    cu_seqlens,
    num_seqs,
    num_tokens,
    scale,
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
    """One tile of queries of one head: out [T, H, D] and logsumexp [H, T], which like scale are to base 2."""
    # The last tiles of a sequence have the most keys: they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    begin, length, first = find_tile(cu_seqlens, num_seqs, tile, BLOCK_M)
    if first >= length:
        return
    positions = first + tl.arange(0, BLOCK_M)
    key += begin * key_stride + head // GROUP * key_head_stride
    value += begin * value_stride + head // GROUP * value_head_stride
    query += begin * query_stride + head * query_head_stride
    q = load_rows(query, first, query_stride, length, True, HEAD_DIM, BLOCK_M, BLOCK_D)

    low, full_low, full_high, high = key_range(first, length, WINDOW, BLOCK_M, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    state = (acc, top, tl.zeros((BLOCK_M,), tl.float32))
    if WINDOW > 0:
        state = _attend(
            state, q, positions, key, value, key_stride, value_stride, low, full_low, length, scale,
            True, WINDOW, HEAD_DIM, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    state = _attend(
        state, q, positions, key, value, key_stride, value_stride, full_low, full_high, length, scale,
        False, WINDOW, HEAD_DIM, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    acc, top, total = _attend(
        state, q, positions, key, value, key_stride, value_stride, full_high, high, length, scale,
        True, WINDOW, HEAD_DIM, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    # Rows behind the sequence's end may have seen no key.
    total = tl.where(total == 0.0, 1.0, total)
    out_stride = tl.num_programs(1) * HEAD_DIM
    out += begin * out_stride + head * HEAD_DIM
    store_rows(out, acc / total[:, None], first, out_stride, length, HEAD_DIM, BLOCK_M, BLOCK_D)
    tl.store(logsumexp + head * num_tokens + begin + positions, top + tl.log2(total), mask=positions < length)


def candidates() -> list[Config]:
    """Configurations worth measuring; some do not fit wide heads and fail to launch."""
    return tile_candidates([(64, 32), (64, 64), (128, 32), (128, 64), (128, 128)])


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention within packed sequences, differentiable in q, k and v; see `reference.varlen_attention`.

    Gradients are the same bits in every run, and a sequence's output and gradients the same in all company.

    Args:
        query: [T, H, D] float32, float16 or bfloat16; D at most 256. key, value: [T, K, D]; K divides H.
        cu_seqlens: [B+1] int32 from 0 to T, which is not checked; equal neighbours are an empty sequence.
        scale: multiplies the scores. window: a query sees at most this many keys, itself included.

    Returns:
        [T, H, D].

    Raises:
        ValueError: an argument the kernels cannot run; names it.
    """
    check_arguments(query, key, value, cu_seqlens, window)
    out: torch.Tensor = _attention(query, key, value, cu_seqlens, scale, window or 0)[0]
    return out


@torch.library.custom_op("apt_triton::varlen_attention", mutates_args=())
def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scale: float, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [T, H, D], logsumexp [H, T] of base-2 scores); window 0 is none."""
    out, logsumexp = _outputs(query)
    num_tokens, num_heads, head_dim = query.shape
    num_seqs = cu_seqlens.shape[0] - 1
    default = default_config(head_dim, query.dtype, DEFAULTS)
    config = tuned("varlen_attention", shape_class(head_dim, query.dtype), query.device, default)
    _forward_kernel[(num_tokens // config.blocks["BLOCK_M"] + num_seqs, num_heads)](
        *(query, key, value, out, logsumexp, cu_seqlens, num_seqs, num_tokens, scale * LOG2E),
        *(*query.stride()[:2], *key.stride()[:2], *value.stride()[:2]),
        GROUP=num_heads // key.shape[1],
        **head_constants(head_dim, window),
        **config.options(),
    )
    return out, logsumexp


@_attention.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scale: float, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return _outputs(query)


def _outputs(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, num_heads, _ = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return out, torch.empty(num_heads, num_tokens, dtype=torch.float32, device=query.device)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, cu_seqlens, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(query, key, value, cu_seqlens, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, out_grad: torch.Tensor, _logsumexp_grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    query_grad, key_grad, value_grad = attention_backward(out_grad, *ctx.saved_tensors, ctx.scale, ctx.window)
    return query_grad, key_grad, value_grad, None, None, None


_attention.register_autograd(_gradients, setup_context=_keep)
