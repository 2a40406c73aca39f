"""Errors that name what was wrong, so that every front can say it in its own shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


class AptError(Exception):
    """Base of every error APT raises on purpose; keeps its fields when pickled."""

    def __reduce__(self) -> tuple[Callable[..., AptError], tuple[object, ...]]:
        return _rebuild, (type(self), self.args, dict(self.__dict__))


class ConfigError(AptError, ValueError):
    """A setting that cannot work.

    Args:
        message: what is wrong and what would work.
        field: dotted name of the setting, as the user wrote it.
    """

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class CheckpointError(AptError, ValueError):
    """A checkpoint that is missing something, is damaged, or does not fit the architecture.

    Args:
        message: what is wrong.
        file: the file at fault.
        field: the key or tensor at fault, where there is one.
    """

    def __init__(self, message: str, *, file: Path | str, field: str | None = None) -> None:
        place = f"{file}: {field}" if field else f"{file}"
        super().__init__(f"{place}: {message}")
        self.file = str(file)
        self.field = field


class InvalidRequestError(AptError, ValueError):
    """A request that cannot be served as it was asked.

    Args:
        message: what is wrong and what would be accepted.
        param: name of the request field at fault, as on the wire.
        code: OpenAI's error code where it has one, such as ``context_length_exceeded``.
    """

    def __init__(self, message: str, *, param: str | None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


def _rebuild(cls: type[AptError], args: tuple[object, ...], fields: dict[str, object]) -> AptError:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(fields)
    return error
