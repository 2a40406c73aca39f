"""Size and checksum of a file: whether it still is what was written."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from apt_core.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class FileSum:
    """A file's contents."""

    num_bytes: int
    sha256: str
    """In hexadecimal digits."""

    @classmethod
    def of(cls, path: Path) -> FileSum:
        """Read a file.

        Raises:
            OSError: it cannot be read.
        """
        with path.open("rb") as file:
            return cls(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())

    def to_json(self) -> dict[str, int | str]:
        """As manifests have it."""
        return {"bytes": self.num_bytes, "sha256": self.sha256}

    def check(self, path: Path) -> None:
        """Compare a file with it.

        Raises:
            CheckpointError: the file is missing or another; names it.
        """
        try:
            there = path.stat().st_size
            if there != self.num_bytes:
                raise CheckpointError(f"has {there} bytes; the manifest says {self.num_bytes}", file=path)
            if FileSum.of(path).sha256 != self.sha256:
                raise CheckpointError("is not what the manifest says: its SHA-256 differs", file=path)
        except OSError as error:
            raise CheckpointError(f"cannot be read ({error.strerror})", file=path) from None
