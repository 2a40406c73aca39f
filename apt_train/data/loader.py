"""Micro-batches for one data-parallel rank, made ready in the background."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import queue
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from apt_core.errors import ConfigError
from apt_core.tokenizer import Tokenizer
from apt_train.data.batch import MicroBatch
from apt_train.data.config import DataConfig
from apt_train.data.packing import empty_batch, pack
from apt_train.data.records import SourceFile
from apt_train.data.sources import find_files
from apt_train.data.stream import DocumentStream, Position, Split

_FREE_FIELDS = frozenset({"paths", "validation_paths", "epochs", "on_bad_record", "prefetch"}) | frozenset(
    {"micro_batch_tokens", "max_documents", "cut_documents"}
)
"""Settings that may change at a resume: the order of documents stays as it is. Files are compared by themselves."""


@dataclass(frozen=True, slots=True)
class _Ready:
    batch: MicroBatch
    end: Position
    """Place right behind the group of micro-batches, one a rank, that this one belongs to."""


class DataLoader:
    """Iterates over the micro-batches of one rank: every ``num_ranks``-th of the one global order.

    A thread reads, tokenizes and packs ahead; the tokenizer works outside Python's lock. Each rank tokenizes the whole
    order, as where a micro-batch begins depends on the lengths of all before it.

    Args:
        config: what to read and how.
        tokenizer: of the model.
        vocab_size: of the model; ids from it on would have no embedding.
        end_id: the model's own token at the end of a document, if any.
        split: documents to train on, or those held out (one epoch, in the order of the files).
        rank: this rank among those that read different data.
        num_ranks: how many they are.

    Raises:
        ConfigError: files are missing, empty or lack a column, the first document cannot be read, or the tokenizer does
            not fit the model.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        end_id: int | None = None,
        split: Split = "train",
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank must be from 0 to {num_ranks - 1}, got {rank}")
        if split == "validation":
            config = DataConfig(**asdict(config) | {"epochs": 1, "shuffle": False})
        self.wait_seconds = 0.0
        self._config = config
        self._rank, self._num_ranks = rank, num_ranks
        _check_vocabulary(config, tokenizer, vocab_size)
        has_own_files = split == "validation" and bool(config.validation_paths)
        field = "data.validation_paths" if has_own_files else "data.paths"
        self._files = find_files(config.validation_paths if has_own_files else config.paths, config, field=field)
        end = _end_token(config, tokenizer, end_id)
        self._stream = DocumentStream(self._files, config, tokenizer, split, end)
        self._identity = _identity(config, self._files) | {"end_of_document": end, "split": split}
        next(document for document in self._stream.documents(Position()) if len(document.ids) > 1)
        self._stream.num_skipped = 0
        self._position, self._num_consumed = Position(), 0
        self._reader: _Reader | None = None

    @property
    def num_skipped(self) -> int:
        """Records that could not be read, since this loader was made."""
        return self._stream.num_skipped

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        """The next micro-batch.

        Raises:
            ConfigError: a file or a record cannot be read.
            OSError: of the disk or the network; calling again tries again.
        """
        if self._reader is None:
            self._reader = _Reader(self._groups(), self._config.prefetch)
            self._finalizer = weakref.finalize(self, self._reader.stop)
        begin = time.perf_counter()
        try:
            ready = self._reader.get()
        except OSError:
            self.close()
            raise
        finally:
            self.wait_seconds += time.perf_counter() - begin
        self._position = ready.end
        self._num_consumed += self._num_ranks
        return ready.batch

    def state_dict(self) -> dict[str, Any]:
        """The place behind what was handed out: the same on all ranks that took equally many, good for any number."""
        return {
            "epoch": self._position.epoch,
            "micro_batches": self._num_consumed,
            "position": asdict(self._position),
            "identity": dict(self._identity),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a place, whatever the number of ranks was there.

        Raises:
            ConfigError: the place is one in other data, or in another order of it; ``field`` names what differs.
        """
        for name, value in self._identity.items():
            if state["identity"].get(name) != value:
                raise ConfigError(
                    f"differs from the run that is resumed: {state['identity'].get(name)!r} then, {value!r} now",
                    field=f"data.{name}",
                )
        self.close()
        self._position, self._num_consumed = Position(**state["position"]), int(state["micro_batches"])

    def close(self) -> None:
        """Stop reading ahead; the next micro-batch starts it again from the same place."""
        if self._reader is not None:
            self._finalizer.detach()
            self._reader.close()
            self._reader = None

    def _groups(self) -> Iterator[_Ready]:
        """This rank's share of each group of ``num_ranks`` micro-batches; empty ones fill up the last group."""
        return _groups(self._stream, self._position, self._config, self._rank, self._num_ranks)


def _groups(stream: DocumentStream, start: Position, config: DataConfig, rank: int, num_ranks: int) -> Iterator[_Ready]:
    size = (config.micro_batch_tokens, config.max_documents)
    packed = pack(stream.documents(start), *size, cut=config.cut_documents)
    while group := list(itertools.islice(packed, num_ranks)):
        yield _Ready(group[rank].batch if rank < len(group) else empty_batch(*size), group[-1].end)


class _Reader:
    """A thread that runs an iterator a few items ahead."""

    def __init__(self, items: Iterator[_Ready], prefetch: int) -> None:
        self._items = items
        self._queue: queue.Queue[_Ready | BaseException] = queue.Queue(prefetch)
        self._stopped = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="apt-data", daemon=True)
        self._thread.start()

    def get(self) -> _Ready:
        if self._failure is None:
            item = self._queue.get()
            if not isinstance(item, BaseException):
                return item
            self._failure = item
        raise self._failure

    def stop(self) -> None:
        self._stopped.set()
        # Makes room for what the thread may be waiting to put, which is the last it does.
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()

    def close(self) -> None:
        self.stop()
        self._thread.join()

    def _run(self) -> None:
        try:
            for item in self._items:
                self._queue.put(item)
                if self._stopped.is_set():
                    return
            self._queue.put(StopIteration())
        except BaseException as error:
            self._queue.put(error)


def _check_vocabulary(config: DataConfig, tokenizer: Tokenizer, vocab_size: int) -> None:
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model's vocabulary {vocab_size}",
            field="model.tokenizer",
        )
    if config.content == "messages" and not tokenizer.has_chat_template:
        raise ConfigError("messages need a tokenizer with a chat template", field="data.content")


def _end_token(config: DataConfig, tokenizer: Tokenizer, end_id: int | None) -> int | None:
    if config.end_of_document is None:
        return end_id
    ids = tokenizer.encode(config.end_of_document, add_special_tokens=False)
    if len(ids) != 1:
        raise ConfigError(f"{config.end_of_document!r} is no token of the vocabulary", field="data.end_of_document")
    return ids[0]


def _identity(config: DataConfig, files: tuple[SourceFile, ...]) -> dict[str, Any]:
    """What the order of documents depends on. Files count by name and size, so that a folder may move."""
    listing = repr([(file.path.name, file.num_bytes) for file in files])
    fields = {name: value for name, value in asdict(config).items() if name not in _FREE_FIELDS}
    return fields | {"paths": hashlib.sha256(listing.encode()).hexdigest()}
