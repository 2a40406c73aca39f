"""The one order of all documents: a function of seed, files and settings, and of nothing else.

Files are read in an order of their own each epoch. Consecutive records fill a window, the window is shuffled and handed
out whole, then comes the next. So a place in the order is a few numbers: where the window begins, how many of its
documents are done, and how many tokens of the next one. Going on from there reads one window again and tokenizes
nothing twice.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from apt_core.errors import ConfigError
from apt_core.tokenizer import Tokenizer
from apt_train.data.config import DataConfig
from apt_train.data.records import Record, SourceFile, read_records
from apt_train.data.samples import BadRecordError, Sample, read_sample

Split = Literal["train", "validation"]
_BATCH_CHARACTERS = 1 << 18
"""Text that is tokenized in one call, at most."""
_FIRST_BATCH_CHARACTERS = 1 << 12
_LEAST_TOKENS = 2
"""Of a document in which there is something to predict."""
_TOLD = frozenset(10**power for power in range(12))
"""Numbers of skipped records at which the log says so."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the order of documents."""

    epoch: int = 0
    file: int = 0
    """Index in the epoch's order of files of the file in which the window begins."""
    offset: int = 0
    """Where in that file it begins."""
    document: int = 0
    """Documents of the shuffled window that are done."""
    token: int = 0
    """Predictions of the next document that are done."""

    def beginning(self) -> Position:
        """Of the window."""
        return Position(self.epoch, self.file, self.offset)

    def at_token(self, token: int) -> Position:
        """In the same document."""
        return Position(self.epoch, self.file, self.offset, self.document, token)

    def next_document(self) -> Position:
        """Its beginning."""
        return Position(self.epoch, self.file, self.offset, self.document + 1)


@dataclass(frozen=True, slots=True)
class Document:
    """A tokenized document and its place."""

    ids: npt.NDArray[np.int64]
    is_scored: npt.NDArray[np.bool_]
    """Of each token, whether predicting it counts."""
    position: Position
    """Where this document begins, or, when the order is entered within it, the token to go on from."""


@dataclass(frozen=True, slots=True)
class _Window:
    start: Position
    samples: list[Sample]


class DocumentStream:
    """Documents in order, from any position on.

    Args:
        files: in a fixed order.
        split: which documents of them, where ``validation_share`` divides them.
        end_id: token after each document of text, if any.
    """

    def __init__(
        self, files: tuple[SourceFile, ...], config: DataConfig, tokenizer: Tokenizer, split: Split, end_id: int | None
    ) -> None:
        self.num_skipped = 0
        self._files = files
        self._config = config
        self._tokenizer = tokenizer
        self._split = split
        self._end = [] if end_id is None or config.content == "messages" else [end_id]

    def documents(self, start: Position) -> Iterator[Document]:
        """Tokenized documents from a position on, through all epochs.

        Raises:
            ConfigError: a file or, where ``on_bad_record`` is error, a record cannot be read, or there is nothing to
                predict in a whole epoch.
            OSError: of the disk or the network.
        """
        for epoch in itertools.count(start.epoch):
            if self._config.epochs is not None and epoch >= self._config.epochs:
                return
            if epoch > start.epoch:
                start = Position(epoch)
            is_empty = start == Position(epoch)
            for window in self._windows(start):
                for document in self._tokenized(window, start if window.start == start.beginning() else window.start):
                    is_empty = is_empty and len(document.ids) < _LEAST_TOKENS
                    yield document
            if is_empty:
                what = f"no document for {self._split} has {_LEAST_TOKENS} tokens; skipped: {self.num_skipped}"
                raise ConfigError(what, field="data.paths")

    def _windows(self, start: Position) -> Iterator[_Window]:
        limit = self._config.shuffle_mib * (1 << 20)
        begin, samples, num_bytes = start.beginning(), list[Sample](), 0
        for file, record in self._records(start):
            # Records of the other split and those that are skipped count as well: then windows are the same whatever
            # becomes of records, and a few held-out documents are not searched for in a whole data set.
            num_bytes += record.num_bytes
            if (sample := self._read(record)) is not None:
                samples.append(sample)
            if num_bytes >= limit:
                yield _Window(begin, samples)
                begin, samples, num_bytes = Position(start.epoch, file, record.end), [], 0
        if samples:
            yield _Window(begin, samples)

    def _records(self, start: Position) -> Iterator[tuple[int, Record]]:
        order = list(self._files)
        if self._config.shuffle:
            random.Random(f"{self._config.seed} {start.epoch}").shuffle(order)
        for index in range(start.file, len(order)):
            for record in read_records(order[index], start.offset if index == start.file else 0, self._config):
                yield index, record

    def _read(self, record: Record) -> Sample | None:
        """The document of a record, or None where it belongs to the other split or is skipped."""
        try:
            sample = read_sample(record, self._config, self._tokenizer)
        except BadRecordError as error:
            if self._config.on_bad_record == "error":
                raise ConfigError(f"{record.place}: {error}", field="data.paths") from None
            self.num_skipped += 1
            if self.num_skipped in _TOLD:
                log.warning("records skipped so far: %d; the last is %s: %s", self.num_skipped, record.place, error)
            return None
        return sample if not self._config.validation_share or self._is_ours(sample) else None

    def _is_ours(self, sample: Sample) -> bool:
        """By the text alone, so that copies of a document are all on one side."""
        text = "".join(segment.text for segment in sample)
        number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
        return (number < self._config.validation_share * 2**64) == (self._split == "validation")

    def _tokenized(self, window: _Window, start: Position) -> Iterator[Document]:
        order = list(range(len(window.samples)))
        if self._config.shuffle:
            place = (self._config.seed, window.start.epoch, window.start.file, window.start.offset)
            random.Random(repr(place)).shuffle(order)
        position = start
        for batch in _batches([window.samples[index] for index in order[start.document :]]):
            for ids, is_scored in self._encode(batch):
                yield Document(ids, is_scored, position)
                position = position.next_document()

    def _encode(self, samples: list[Sample]) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]]:
        is_text = self._config.content == "text"
        texts = [segment.text for sample in samples for segment in sample]
        encoded = iter(self._tokenizer.encode_batch(texts, add_special_tokens=is_text))
        for sample in samples:
            parts = [next(encoded) for _ in sample]
            ids = np.array([*itertools.chain.from_iterable(parts), *self._end], dtype=np.int64)
            is_scored, begin = np.ones(len(ids), dtype=np.bool_), 0
            for segment, part in zip(sample, parts, strict=True):
                is_scored[begin : begin + len(part)] = segment.is_scored
                begin += len(part)
            yield ids, is_scored


def _batches(samples: list[Sample]) -> Iterator[list[Sample]]:
    """Small ones first, so that the first document does not wait for many."""
    batch, size, limit = list[Sample](), 0, _FIRST_BATCH_CHARACTERS
    for sample in samples:
        batch.append(sample)
        size += sum(len(segment.text) for segment in sample)
        if size >= limit:
            yield batch
            batch, size, limit = [], 0, min(2 * limit, _BATCH_CHARACTERS)
    if batch:
        yield batch
