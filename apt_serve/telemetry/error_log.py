"""Faults of the server, kept with the request they befell: what `apt-serve errors` counts by its causes."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import Any, Final

from apt_core.error_log.log import ErrorLogger
from apt_core.error_log.record import ErrorRecord
from apt_serve.telemetry.exchange import CURRENT

PLACES: Final = ("route", "model")
"""What reports count by."""
_MAX_BYTES: Final = 2_000_000
_MAX_FILES: Final = 40
"""Two of each process; those of the last ones stay."""
_LOGGERS: Final = ("apt_serve", "apt_core", "apt_kernels")


def server_errors(records: Path) -> ErrorLogger:
    """The errors of all servers and workers that keep their records in a folder."""
    name = f"{socket.gethostname()}-{os.getpid()}"
    return ErrorLogger(records / "errors", name, PLACES, max_bytes=_MAX_BYTES, max_files=_MAX_FILES)


class ErrorLog(logging.Handler):
    """Keeps whatever APT logs as an error in this process, from ``start`` to ``stop``.

    Requests that are refused are no errors. Nothing is written before there is one.
    """

    def __init__(self, records: Path) -> None:
        super().__init__(logging.ERROR)
        self._errors = server_errors(records)

    def start(self) -> None:
        """Begin to listen."""
        for name in _LOGGERS:
            logging.getLogger(name).addHandler(self)

    def stop(self) -> None:
        """The end of ``start``."""
        for name in _LOGGERS:
            logging.getLogger(name).removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep an error, if the disk takes it: that it failed is on stderr anyway."""
        try:
            self._errors.keep(_describe(record))
        except OSError:
            self.handleError(record)


def _describe(record: logging.LogRecord) -> ErrorRecord:
    context = {"logger": record.name, "process": record.process} | _request()
    error = record.exc_info[1] if record.exc_info else None
    if error is None:
        return ErrorRecord.said(record.name, record.getMessage(), context)
    return ErrorRecord.of(error, context | {"said": record.getMessage()})


def _request() -> dict[str, Any]:
    """What the running task works for, if that is a request: names alone, as in the access log."""
    exchange = CURRENT.get()
    if exchange is None:
        return {}
    caller = exchange.caller
    return {
        "request_id": exchange.request_id,
        "route": f"{exchange.method} {exchange.route}",
        "model": exchange.model,
        "owner": caller and caller.owner,
    }
