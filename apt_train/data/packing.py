"""Documents of any length into micro-batches of exactly T tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from apt_train.data.batch import UNSCORED, MicroBatch
from apt_train.data.stream import Document, Position

PADDING_ID = 0
"""Any id will do: nothing attends to padding but padding."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A micro-batch and the place in the order of documents right behind it."""

    batch: MicroBatch
    end: Position


def pack(documents: Iterable[Document], num_tokens: int, max_documents: int, *, cut: bool) -> Iterator[Packed]:
    """Pack documents in order. Each prediction (of a token by the one before it) is in exactly one micro-batch.

    A micro-batch holds one epoch only. With ``cut`` a document that does not fit fills the micro-batch and goes on
    in the next; without, it moves to the next whole, unless it is longer than T.
    """
    open_batch, end, epoch = _OpenBatch(num_tokens, max_documents), Position(), None
    for document in documents:
        position = document.position
        if epoch != position.epoch and open_batch.length:
            yield Packed(open_batch.close(), end)
            open_batch = _OpenBatch(num_tokens, max_documents)
        epoch, total = position.epoch, len(document.ids) - 1
        while position.token < total:
            left = total - position.token
            if not open_batch.has_room(left if not cut and left <= num_tokens else 1):
                yield Packed(open_batch.close(), end)
                open_batch = _OpenBatch(num_tokens, max_documents)
            taken = open_batch.add(document, position.token)
            position = end = position.at_token(position.token + taken)
        end = position.next_document()
    if open_batch.length:
        yield Packed(open_batch.close(), end)


class _OpenBatch:
    def __init__(self, num_tokens: int, max_documents: int) -> None:
        self.length = 0
        self._size = num_tokens
        self._input_ids = np.full(num_tokens, PADDING_ID, dtype=np.int64)
        self._labels = np.full(num_tokens, UNSCORED, dtype=np.int64)
        self._positions = np.zeros(num_tokens, dtype=np.int64)
        # Document ends, then the end of the padding.
        self._bounds = np.full(max_documents + 2, num_tokens, dtype=np.int32)
        self._bounds[0] = 0
        self._num_documents = 0
        self._max_documents = max_documents

    def has_room(self, tokens: int) -> bool:
        return self._num_documents < self._max_documents and self.length + tokens <= self._size

    def add(self, document: Document, first: int) -> int:
        """Take predictions of a document from ``first`` on, as many as fit; returns how many."""
        count = min(len(document.ids) - 1 - first, self._size - self.length)
        place, after = slice(self.length, self.length + count), slice(first + 1, first + 1 + count)
        self._input_ids[place] = document.ids[first : first + count]
        self._labels[place] = np.where(document.is_scored[after], document.ids[after], UNSCORED)
        self._end_sequence(count)
        self._num_documents += 1
        self._bounds[self._num_documents] = self.length
        return count

    def close(self) -> MicroBatch:
        if self.length < self._size:
            self._end_sequence(self._size - self.length)
        return MicroBatch(
            input_ids=torch.from_numpy(self._input_ids),
            labels=torch.from_numpy(self._labels),
            positions=torch.from_numpy(self._positions),
            cu_seqlens=torch.from_numpy(self._bounds),
            max_seqlen=int(np.diff(self._bounds).max()),
            num_scored=int((self._labels != UNSCORED).sum()),
        )

    def _end_sequence(self, count: int) -> None:
        self._positions[self.length : self.length + count] = np.arange(count)
        self.length += count


def empty_batch(num_tokens: int, max_documents: int) -> MicroBatch:
    """All padding: for ranks that have no data left while others have."""
    return _OpenBatch(num_tokens, max_documents).close()
