"""The manifest of published weights: what a trainer hands over, so that a server can check every byte of it."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apt_core.document import Document, read_document
from apt_core.errors import CheckpointError
from apt_core.file_sum import FileSum

MANIFEST = "manifest.json"
UNPUBLISHED = "unpublished"
"""The version of weights without a manifest."""
_FORMAT = 1
_DIGEST_CHARS = 12


@dataclass(frozen=True, slots=True)
class Probe:
    """A short text and what the trainer's model makes of it: whether a server computes the same model."""

    token_ids: tuple[int, ...]
    """[T], at least 2."""
    logprobs: tuple[float, ...]
    """[T - 1]: natural log-probability of each token after the first, given those before it."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of one folder in Hugging Face layout."""

    step: int
    """Of the training run; counts up."""
    files: dict[str, FileSum]
    """By name; all files of the folder but the manifest."""
    probe: Probe | None = None

    @property
    def version(self) -> str:
        """Step and a digest of the checksums: weights of one version are the same bytes."""
        lines = [f"{file.sha256} {file.num_bytes} {name}\n" for name, file in sorted(self.files.items())]
        return f"{self.step}-{hashlib.sha256(''.join(lines).encode()).hexdigest()[:_DIGEST_CHARS]}"

    def to_json(self) -> str:
        """The file's text."""
        document: dict[str, Any] = {"format": _FORMAT, "version": self.version, "step": self.step}
        document["files"] = {name: file.to_json() for name, file in sorted(self.files.items())}
        if self.probe is not None:
            document["probe"] = {"token_ids": self.probe.token_ids, "logprobs": self.probe.logprobs}
        return json.dumps(document, indent=1)

    def check(self, folder: Path) -> None:
        """Read every file of a folder and compare.

        Raises:
            CheckpointError: a file is missing, has changed, or is not in the manifest; names it.
        """
        present = set(_file_names(folder))
        for name in sorted(self.files.keys() - present):
            raise CheckpointError("is in the manifest, but not in the folder", file=folder / name)
        for name in sorted(present - self.files.keys()):
            raise CheckpointError("is in the folder, but not in the manifest", file=folder / name)
        for name, expected in self.files.items():
            expected.check(folder / name)


def make_manifest(folder: Path, step: int, probe: Probe | None = None) -> Manifest:
    """The manifest of a folder as it is now.

    Raises:
        CheckpointError: the folder or a file cannot be read.
    """
    try:
        files = {name: FileSum.of(folder / name) for name in _file_names(folder)}
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror})", file=error.filename or folder) from None
    return Manifest(step, files, probe)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put the manifest into its folder, in the place of an older one."""
    replace_text(folder / MANIFEST, manifest.to_json())


def replace_text(path: Path, text: str) -> None:
    """Write a file that others may be reading: they see what was there before, or all of this."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_manifest(folder: Path) -> Manifest:
    """A folder's manifest; what it says of the files is not yet checked.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    document = read_document(folder / MANIFEST)
    if document.integer("format") != _FORMAT:
        raise document.error("format", f"expected {_FORMAT}")
    files = document.child("files")
    if files is None or not files.values:
        raise document.error("files", "is missing")
    manifest = Manifest(
        document.integer("step", minimum=0), {name: _file_sum(files, name) for name in files.values}, _probe(document)
    )
    if document.text("version") != manifest.version:
        raise document.error("version", f"does not fit the checksums, which give {manifest.version}")
    return manifest


def version_of(path: Path) -> str:
    """The version that a checkpoint's manifest states, UNPUBLISHED if it has none.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    return read_manifest(path).version if (path / MANIFEST).is_file() else UNPUBLISHED


def _file_names(folder: Path) -> list[str]:
    """What lies in a folder itself and is no hidden file; subfolders are nothing a checkpoint is read from."""
    names = [path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    return sorted(name for name in names if name != MANIFEST)


def _file_sum(files: Document, name: str) -> FileSum:
    if name != Path(name).name:
        raise files.error(name, "expected the name of a file in the folder itself")
    entry = files.child(name)
    if entry is None:
        raise files.error(name, "is missing")
    return FileSum(entry.integer("bytes", minimum=0), entry.text("sha256"))


def _probe(document: Document) -> Probe | None:
    probe = document.child("probe")
    if probe is None:
        return None
    token_ids, logprobs = probe.items("token_ids"), probe.items("logprobs")
    if len(token_ids) < 2 or not all(isinstance(token, int) and token >= 0 for token in token_ids):
        raise probe.error("token_ids", "expected at least two token ids")
    if len(logprobs) != len(token_ids) - 1 or not all(isinstance(value, float | int) for value in logprobs):
        raise probe.error("logprobs", f"expected {len(token_ids) - 1} numbers")
    return Probe(tuple(token_ids), tuple(map(float, logprobs)))
