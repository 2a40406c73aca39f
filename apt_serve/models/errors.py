"""Why a model cannot be had now."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from apt_core.errors import AptError

log = logging.getLogger(__name__)

GIB = 2**30


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

    @classmethod
    def alone(cls, name: str, num_bytes: int, max_bytes: int) -> ModelTooLargeError:
        """Of one model."""
        return cls(
            name,
            f"it needs {num_bytes / GIB:.2f} GiB for weights and KV cache, and models.memory_gib leaves "
            f"{max_bytes / GIB:.2f}: lower its max_num_seqs, max_model_len or kv_cache_gib, or its weight_precision",
        )


class ModelBusyError(AptError):
    """There was no room for a model in time, or it was not loaded in time; try again after ``retry_after_s``."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelInUseError(AptError):
    """A model cannot be unloaded while requests run on it or wait for it."""


@contextmanager
def load_errors(name: str) -> Iterator[None]:
    """Whatever goes wrong inside is a ModelLoadError; of what nobody foresaw it tells the kind alone."""
    try:
        yield
    except ModelLoadError:
        raise
    except AptError as error:
        raise ModelLoadError(name, str(error)) from error
    except Exception as error:
        log.exception("%s could not be loaded, by a fault", name)
        raise ModelLoadError(name, type(error).__name__) from error
