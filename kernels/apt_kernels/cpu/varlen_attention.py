"""Attention within packed sequences on a processor, with gradients.

Made of matrix products over blocks of queries, which see all keys up to their own end: for the sequences that training
packs this takes half the time of torch's fused attention, whose backward pass is slow there. The query heads that share
a kv head are the rows of one product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from apt_kernels.reference import causal_mask

BLOCK = 128
"""Queries of a block: the fewer, the fewer products with keys they do not see."""
KEPT_KEYS = 1024
"""Most keys of a block whose probabilities are kept for the backward pass; those of more are computed again, so that
memory grows with the tokens and not with their square."""


@dataclass(frozen=True, slots=True)
class _Block:
    """Queries first:end of the packed tokens, which see keys from ``keys`` to end."""

    keys: int
    first: int
    end: int


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """As `reference.varlen_attention`; differentiable once."""
    if torch.is_autocast_enabled("cpu"):  # as torch's own attention does
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    out: torch.Tensor = _VarlenAttention.apply(query, key, value, cu_seqlens, scale, window)  # type: ignore[no-untyped-call]
    return out


# As torch.compiler.disable does, which would load the compiler into every server: blocks depend on the lengths.
varlen_attention._torchdynamo_disable = True  # type: ignore[attr-defined]


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        out = torch.empty(query.shape, dtype=query.dtype)
        keys, values = (_heads_first(x) for x in (key, value))
        blocks, kept = list(_blocks(cu_seqlens, window)), []
        for block in blocks:
            probs = _probabilities(query, keys, block, scale, window)
            _put(out, block, torch.bmm(probs, values[:, block.keys : block.end]))
            kept.append(probs if block.end - block.keys <= KEPT_KEYS and any(ctx.needs_input_grad) else None)
        ctx.save_for_backward(query, keys, values, out, *kept)
        ctx.layout = (blocks, scale, window)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, keys, values, out, *kept = ctx.saved_tensors
        blocks, scale, window = ctx.layout
        wide = torch.promote_types(query.dtype, torch.float32)
        query_grad = torch.empty(query.shape, dtype=query.dtype)
        keys_grad, values_grad = (torch.zeros(x.shape, dtype=wide) for x in (keys, values))
        # What the softmax's backward pass subtracts: the mean of the probabilities' gradients (arXiv 2205.14135).
        means = (out_grad * out).sum(-1, keepdim=True, dtype=wide).mul_(scale)  # [T, H, 1]
        for block, probs in zip(blocks, kept, strict=True):
            span = slice(block.keys, block.end)
            if probs is None:
                probs = _probabilities(query, keys, block, scale, window)
            rows_grad = _rows(out_grad, block, len(keys))
            values_grad[:, span] += torch.bmm(probs.transpose(1, 2), rows_grad)
            scores_grad = torch.bmm(rows_grad, values[:, span].transpose(1, 2)).to(wide).mul_(scale)
            scores_grad = scores_grad.sub_(_rows(means, block, len(keys))).mul_(probs).to(query.dtype)
            _put(query_grad, block, torch.bmm(scores_grad, keys[:, span]))
            keys_grad[:, span] += torch.bmm(scores_grad.transpose(1, 2), _rows(query, block, len(keys)))
        key_grad, value_grad = (x.transpose(0, 1).to(query.dtype) for x in (keys_grad, values_grad))
        return query_grad, key_grad, value_grad, None, None, None


def _blocks(cu_seqlens: torch.Tensor, window: int | None) -> Iterator[_Block]:
    for start, end in pairwise(cu_seqlens.tolist()):  # batches are padded with empty sequences, which have no blocks
        for first in range(start, end, BLOCK):
            keys = start if window is None else max(start, first - window + 1)
            yield _Block(keys, first, min(first + BLOCK, end))


def _probabilities(
    query: torch.Tensor, keys: torch.Tensor, block: _Block, scale: float, window: int | None
) -> torch.Tensor:
    """[K, H / K * queries, seen keys], of query's dtype; scores are at least float32, as in torch's attention."""
    num_queries, num_keys = block.end - block.first, block.end - block.keys
    wide = torch.promote_types(query.dtype, torch.float32)
    rows, seen = _rows(query, block, len(keys)).to(wide), keys[:, block.keys : block.end].to(wide)
    scores = torch.bmm(rows * scale, seen.transpose(1, 2))
    hidden = ~causal_mask(num_queries, num_keys, window, query.device)
    scores.view(-1, num_queries, num_keys).masked_fill_(hidden, float("-inf"))
    return scores.softmax(-1).to(query.dtype)


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """[T, K, D] -> [K, T, D]."""
    return x.transpose(0, 1).contiguous()


def _rows(x: torch.Tensor, block: _Block, num_kv_heads: int) -> torch.Tensor:
    """A block's part of [T, H, D], by kv head: [K, H / K * queries, D]."""
    heads_first = x[block.first : block.end].transpose(0, 1)
    return heads_first.reshape(num_kv_heads, -1, x.shape[2])


def _put(out: torch.Tensor, block: _Block, rows: torch.Tensor) -> None:
    """Write what `_rows` would give."""
    num_heads = out.shape[1]
    out[block.first : block.end] = rows.view(num_heads, -1, out.shape[2]).transpose(0, 1)
