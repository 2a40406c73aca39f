"""Settings of the data a model is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from apt_core.errors import ConfigError


@dataclass(frozen=True)
class DataConfig:
    """Which documents, in which order, and how they fill micro-batches.

    Raises:
        ConfigError: a value outside its range; ``field`` names it.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    paths: tuple[str, ...] = ()
    """Files, globs (** enters folders) or package:NAME/GLOB for files inside an installed Python package."""
    validation_paths: tuple[str, ...] = ()
    """Files to measure validation loss on."""
    validation_share: float = 0.0
    """Share of the documents in paths that are held out for validation, chosen by a hash of their content."""
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """auto goes by the file's ending: .jsonl and .ndjson, .parquet, and all others are text."""
    encoding: Literal["utf-8", "latin-1"] = "utf-8"
    """Of text files; JSONL is UTF-8."""
    text_documents: Literal["file", "paragraph"] = "file"
    """What one document of a text file is: all of it, or what stands between blank lines. Beyond 1 MiB it is cut after
    a line."""
    content: Literal["text", "messages"] = "text"
    """What JSONL and Parquet hold: text, or chat messages, which the tokenizer's chat template renders."""
    column: str = "text"
    """Field of a JSONL line, or column of a Parquet file, that holds the content."""
    loss_on: Literal["all", "assistant"] = "all"
    """assistant scores only what the assistant says in messages."""
    end_of_document: str | None = None
    """Special token after each document of text, such as <|endoftext|>; None takes the model's own."""
    on_bad_record: Literal["error", "skip"] = "error"
    """What to do about a record that cannot be read: stop and name it, or count it and go on."""
    seed: int = 0
    """Of the order of files and documents."""
    epochs: int | None = None
    """Passes over the documents; None never ends."""
    shuffle: bool = True
    """Read files in a new order each epoch, and shuffle documents within windows of shuffle_mib."""
    shuffle_mib: float = 16.0
    """Size of a shuffled window, in MiB of source: bounds how much is in memory at once."""
    micro_batch_tokens: int = 2048
    """Tokens in each micro-batch (T)."""
    max_documents: int = 256
    """Most documents in one micro-batch; when so many are in, the rest of it is padding."""
    cut_documents: bool = True
    """Cut documents so that no token of a micro-batch is padding. False cuts only those longer than a micro-batch, and
    moves others on whole."""
    prefetch: int = 16
    """Micro-batches kept ready in the background."""

    def __post_init__(self) -> None:
        for name, least in (("shuffle_mib", 0), ("micro_batch_tokens", 1), ("max_documents", 0), ("prefetch", 0)):
            if not getattr(self, name) > least:
                raise ConfigError(f"must be more than {least}, got {getattr(self, name)}", field=f"data.{name}")
        if self.epochs is not None and self.epochs < 1:
            raise ConfigError(f"must be at least 1, got {self.epochs}", field="data.epochs")
        if not 0 <= self.validation_share < 1:
            raise ConfigError(
                f"must be at least 0 and less than 1, got {self.validation_share}", field="data.validation_share"
            )
        if self.validation_paths and self.validation_share:
            raise ConfigError("set this or validation_paths, not both", field="data.validation_share")
        if self.loss_on == "assistant" and self.content != "messages":
            raise ConfigError("assistant needs content: messages", field="data.loss_on")
