"""Why a model cannot be had now."""

from __future__ import annotations

from apt_core.errors import AptError


class ModelLoadError(AptError):
    """A model cannot be loaded; the next who asks for it lets it be tried again.

    Args:
        name: of the model, on the wire.
        reason: for whoever runs the server; it may name files.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"The model {name!r} could not be loaded: {reason}")
        self.name = name
        self.reason = reason


class ModelTooLargeError(ModelLoadError):
    """It would not even fit if no other model were loaded."""


class ModelBusyError(AptError):
    """There was no room for a model in time, or it was not loaded in time; try again after ``retry_after_s``."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelInUseError(AptError):
    """A model cannot be unloaded while requests run on it or wait for it."""
