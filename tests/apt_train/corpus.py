"""Packed batches of real text for tests that need no loader."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from apt_core.metadata import AttentionMetadata

TEXT = (
    b"Shall I compare thee to a summer's day? Thou art more lovely and more temperate: "
    b"Rough winds do shake the darling buds of May, And summer's lease hath all too short a date; "
    b"Sometime too hot the eye of heaven shines, And often is his gold complexion dimm'd; "
    b"And every fair from fair sometime declines, By chance or nature's changing course untrimm'd; "
)


@dataclass(frozen=True)
class TextBatch:
    """Bytes of the sonnet, packed."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    lengths: tuple[int, ...]

    @property
    def positions(self) -> torch.Tensor:
        return torch.cat([torch.arange(length) for length in self.lengths])

    @property
    def num_scored(self) -> int:
        return int((self.labels != -100).sum())

    def metadata(self) -> AttentionMetadata:
        return AttentionMetadata.for_full_sequences(list(self.lengths))

    def to(self, device: torch.device | str) -> TextBatch:
        return self


def text_batch(seed: int, lengths: tuple[int, ...] = (13, 7, 12)) -> TextBatch:
    """Sequences of these lengths from places that the seed chooses; the last label of each does not count."""
    text = torch.tensor(list(TEXT))
    starts = torch.randint(len(text) - max(lengths), (len(lengths),), generator=torch.Generator().manual_seed(seed))
    ids = torch.cat([text[s : s + n] for s, n in zip(starts.tolist(), lengths, strict=True)])
    labels = torch.cat([ids[1:], ids[:1]])
    labels[[end - 1 for end in accumulate(lengths)]] = -100
    labels[: seed % 5] = -100  # micro-batches differ in how many tokens count
    return TextBatch(ids, labels, lengths)


def spans(batch: TextBatch) -> list[slice]:
    return [slice(a, b) for a, b in pairwise([0, *accumulate(batch.lengths)])]
