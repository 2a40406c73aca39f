"""Where each packed token stands, and where its keys and values are."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Layout of one packed batch of T tokens from B sequences.

    Passed down explicitly to every attention layer; never a global. Sequences with one query token
    (decode) come first, so that an attention backend can treat them as one dense batch.

    Without a KV cache (training, a naive forward pass) ``block_tables`` and ``slot_mapping`` are None and every
    sequence attends causally to its own tokens only.
    """

    cu_seqlens_q: torch.Tensor
    """[B+1] int32: sequence b owns the packed tokens cu_seqlens_q[b]:cu_seqlens_q[b+1]."""
    context_lens: torch.Tensor
    """[B] int32: keys sequence b sees after this step, its new tokens included."""
    max_seqlen_q: int
    """Most query tokens any sequence has in this batch."""
    max_context_len: int
    """Largest of context_lens."""
    num_decodes: int = 0
    """How many leading sequences have exactly one query token."""
    block_tables: torch.Tensor | None = None
    """[B, max_blocks] int32: KV-cache blocks of sequence b in order; entries past its context are ignored."""
    slot_mapping: torch.Tensor | None = None
    """[T] int64: KV-cache slot (block * block_size + offset) of each token; -1 = padding, stored nowhere."""

    @staticmethod
    def for_full_sequences(lengths: list[int], device: torch.device | str = "cpu") -> AttentionMetadata:
        """Metadata for whole sequences of the given lengths (tokens) without a KV cache."""
        lens = torch.tensor(lengths, dtype=torch.int32, device=device)
        zero = torch.zeros(1, dtype=torch.int32, device=device)
        return AttentionMetadata(
            cu_seqlens_q=torch.cat([zero, lens.cumsum(0, dtype=torch.int32)]),
            context_lens=lens,
            max_seqlen_q=max(lengths),
            max_context_len=max(lengths),
        )
