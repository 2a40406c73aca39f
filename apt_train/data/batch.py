"""What one forward and backward pass of the trainer reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from apt_core.metadata import AttentionMetadata

UNSCORED = -100
"""Label of a token whose prediction does not count."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """T packed tokens of several documents, none of which sees another. All shapes are the same in every micro-batch."""

    input_ids: torch.Tensor
    """[T] int64."""
    labels: torch.Tensor
    """[T] int64: the token that follows in the same document, or UNSCORED. It is there for the last input of a cut
    document as well: the next piece begins with that label as its first input."""
    positions: torch.Tensor
    """[T] int64: place in the sequence; 0 where one begins."""
    cu_seqlens: torch.Tensor
    """[S+1] int32: sequence s owns tokens cu_seqlens[s]:cu_seqlens[s+1]. Unused places repeat T; padding is a sequence
    of its own."""
    max_seqlen: int
    """Tokens of the longest sequence."""
    num_scored: int
    """Labels that are not UNSCORED: may be 0."""

    def metadata(self) -> AttentionMetadata:
        """The layout as the model reads it."""
        return AttentionMetadata(
            cu_seqlens_q=self.cu_seqlens,
            context_lens=self.cu_seqlens.diff(),
            max_seqlen_q=self.max_seqlen,
            max_context_len=self.max_seqlen,
        )

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same on a device; asynchronous from pinned memory."""
        tensors = (self.input_ids, self.labels, self.positions, self.cu_seqlens)
        input_ids, labels, positions, cu_seqlens = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return MicroBatch(input_ids, labels, positions, cu_seqlens, self.max_seqlen, self.num_scored)

    def pin_memory(self) -> MicroBatch:
        """The same in page-locked memory, from which a copy to a GPU does not hold up the processor."""
        tensors = (self.input_ids, self.labels, self.positions, self.cu_seqlens)
        input_ids, labels, positions, cu_seqlens = (tensor.pin_memory() for tensor in tensors)
        return MicroBatch(input_ids, labels, positions, cu_seqlens, self.max_seqlen, self.num_scored)
