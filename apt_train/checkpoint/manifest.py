"""What makes a folder a checkpoint: a list of its files with their checksums, written last."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apt_core.errors import CheckpointError
from apt_core.file_sum import FileSum

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """Of one checkpoint."""

    step: int
    is_temporary: bool
    num_ranks: int
    """That wrote it; any number may read it."""
    files: Mapping[str, FileSum]

    def write(self, folder: Path) -> None:
        """Put it into a folder, safe on disk."""
        values: dict[str, Any] = {
            "format": FORMAT,
            "step": self.step,
            "temporary": self.is_temporary,
            "num_ranks": self.num_ranks,
            "files": {name: each.to_json() for name, each in self.files.items()},
        }
        with (folder / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(values, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(folder)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Of a checkpoint's folder.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise CheckpointError(f"is of format {values['format']}, this is {FORMAT}", file=path)
            files = {name: FileSum(int(each["bytes"]), str(each["sha256"])) for name, each in values["files"].items()}
            return cls(int(values["step"]), bool(values["temporary"]), int(values["num_ranks"]), files)
        except OSError as error:
            raise CheckpointError(f"cannot be read ({error.strerror})", file=path) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"is damaged ({error!r})", file=path) from None

    def check(self, folder: Path) -> None:
        """Compare all files with their checksums.

        Raises:
            CheckpointError: names the file that is missing or differs.
        """
        for name, each in self.files.items():
            each.check(folder / name)


def sync_file(path: Path) -> None:
    """Make a file's contents safe on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make names in a folder safe on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
