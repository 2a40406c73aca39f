"""Smaller micro-batches of the same tokens, for a machine whose memory one does not fit into."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

import torch

from apt_train.data.batch import UNSCORED, MicroBatch


def divided(batches: Iterable[MicroBatch], num_parts: int) -> list[MicroBatch]:
    """Every micro-batch in up to so many parts, each of its tokens in one of them.

    Parts end where documents do, so gradients stay the same. Only a document longer than a part is cut within: it sees
    less of itself then, as when a micro-batch ends in it.
    """
    return [part for batch in batches for part in (_parts(batch, num_parts) if num_parts > 1 else [batch])]


def _parts(batch: MicroBatch, num_parts: int) -> Iterator[MicroBatch]:
    bounds = batch.cu_seqlens.tolist()
    for begin, end in pairwise(_cuts(bounds, num_parts)):
        inside = [begin, *(bound for bound in bounds if begin < bound < end), end]
        cu_seqlens = torch.tensor(inside, dtype=batch.cu_seqlens.dtype, device=batch.cu_seqlens.device) - begin
        labels = batch.labels[begin:end]
        yield MicroBatch(
            batch.input_ids[begin:end],
            labels,
            batch.positions[begin:end],
            cu_seqlens,
            int(cu_seqlens.diff().max()),
            int((labels != UNSCORED).sum()),
        )


def _cuts(bounds: list[int], num_parts: int) -> list[int]:
    """Where parts begin, and the end of the last."""
    num_tokens = bounds[-1]
    cuts = [0]
    for part in range(1, num_parts):
        target = part * num_tokens // num_parts
        begin = max(bound for bound in bounds if bound <= target)
        is_long = min(bound for bound in bounds if bound > target) - begin > num_tokens // num_parts
        cut = target if is_long else begin
        if cut > cuts[-1]:
            cuts.append(cut)
    return [*cuts, num_tokens]
