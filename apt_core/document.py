"""JSON documents of a checkpoint, read so that every fault names the file and the key."""

from __future__ import annotations

import json
import math
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apt_core.errors import CheckpointError


@dataclass(frozen=True)
class Document:
    """A JSON object and where it came from. A key whose value is null counts as absent, as in transformers."""

    values: dict[str, Any]
    file: str
    """Named in errors."""
    prefix: str = ""
    """Dotted path of this object inside the file, with its trailing dot."""

    def error(self, key: str, message: str) -> CheckpointError:
        """The error to raise for a bad value of ``key``."""
        return CheckpointError(message, file=self.file, field=f"{self.prefix}{key}")

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        """A whole number. Without a default the key is required."""
        value = self._get(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(key, f"expected a whole number, got {reprlib.repr(value)}")
        if value < minimum:
            raise self.error(key, f"expected at least {minimum}, got {value}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number. Without a default the key is required."""
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise self.error(key, f"expected a number, got {reprlib.repr(value)}")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A finite number, or None where the key is absent."""
        return self.number(key) if self.has(key) else None

    def boolean(self, key: str, default: bool) -> bool:
        """A truth value."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"expected true or false, got {reprlib.repr(value)}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string. Without a default the key is required."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"expected a string, got {reprlib.repr(value)}")
        return value

    def items(self, key: str) -> list[Any]:
        """A list, empty where the key is absent."""
        value = self._get(key, [])
        if not isinstance(value, list):
            raise self.error(key, f"expected a list, got {reprlib.repr(value)}")
        return value

    def child(self, key: str) -> Document | None:
        """A nested object, or None where the key is absent."""
        if not self.has(key):
            return None
        value = self.values[key]
        if not isinstance(value, dict):
            raise self.error(key, f"expected an object, got {reprlib.repr(value)}")
        return Document(value, self.file, f"{self.prefix}{key}.")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "is missing")
        return value


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        CheckpointError: it cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"is not UTF-8 text ({error})", file=path) from None
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror})", file=path) from None


def parse_document(text: str, file: Path | str) -> Document:
    """A Document from JSON text.

    Raises:
        CheckpointError: it is not JSON, or not an object.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is not valid JSON ({error})", file=file) from None
    if not isinstance(values, dict):
        raise CheckpointError("expected a JSON object", file=file)
    return Document(values, str(file))


def read_document(path: Path) -> Document:
    """A Document from a JSON file; raises as ``read_text`` and ``parse_document``."""
    return parse_document(read_text(path), path)


def read_optional_document(path: Path) -> Document | None:
    """As ``read_document``, or None where there is no such file."""
    return read_document(path) if path.is_file() else None
