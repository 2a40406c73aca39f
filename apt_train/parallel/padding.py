"""Micro-batches made longer by tokens that count for nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from apt_train.data.batch import UNSCORED, MicroBatch
from apt_train.loss import Batch


def padded_to_multiple(batch: Batch, multiple: int) -> Batch:
    """T a multiple of this."""
    num_tokens = len(batch.input_ids)
    return padded(batch, -(-num_tokens // multiple) * multiple)


def padded(batch: Batch, num_tokens: int) -> Batch:
    """Exactly so many tokens, at least as many as there are; the new ones are a sequence of their own."""
    metadata = batch.metadata()
    missing = num_tokens - len(batch.input_ids)
    if not missing:
        return batch
    bounds = metadata.cu_seqlens_q
    return MicroBatch(
        F.pad(batch.input_ids, (0, missing)),
        F.pad(batch.labels, (0, missing), value=UNSCORED),
        torch.cat((batch.positions, torch.arange(missing, device=bounds.device))),
        torch.cat((bounds, bounds.new_tensor([num_tokens]))),
        max(metadata.max_seqlen_q, missing),
        batch.num_scored,
    )


def unscored(batch: Batch) -> MicroBatch:
    """The same tokens, none of which counts."""
    metadata = batch.metadata()
    labels = torch.full_like(batch.labels, UNSCORED)
    return MicroBatch(
        batch.input_ids, labels, batch.positions, metadata.cu_seqlens_q, metadata.max_seqlen_q, num_scored=0
    )
