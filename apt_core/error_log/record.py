"""One error as a line of JSON."""

from __future__ import annotations

import json
import re
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

MAX_MESSAGE = 2_000
MAX_TRACEBACK = 20_000
"""Characters; of a longer one the beginning is left out, since the end says where it happened."""
_VARIES = re.compile(r"0x[0-9a-fA-F]+|\d+(\.\d+)?")


@dataclass(frozen=True)
class ErrorRecord:
    """What is kept of an error."""

    kind: str
    """The exception's class, or whatever else tells errors of one sort from others."""
    message: str
    time: float
    """Seconds since 1970."""
    traceback: str = ""
    context: dict[str, Any] = field(default_factory=dict)
    """Where it happened, such as the rank and the step, or the route and the model."""

    @classmethod
    def of(cls, error: BaseException, context: Mapping[str, Any]) -> ErrorRecord:
        """Describe an exception."""
        text = "".join(traceback.format_exception(error))[-MAX_TRACEBACK:]
        return cls(type(error).__name__, str(error)[:MAX_MESSAGE], time.time(), text, dict(context))

    @classmethod
    def said(cls, kind: str, message: str, context: Mapping[str, Any]) -> ErrorRecord:
        """Describe an error that is no exception."""
        return cls(kind, message[:MAX_MESSAGE], time.time(), context=dict(context))

    @property
    def cause(self) -> str:
        """Kind and message without numbers: errors that differ in sizes and addresses only have the same."""
        lines = self.message.splitlines()
        return f"{self.kind}: {_VARIES.sub('#', lines[0] if lines else '')}"

    def to_line(self) -> str:
        """JSON without line breaks."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_line(cls, line: str) -> ErrorRecord | None:
        """None for a line that a crash has cut off, or that is something else."""
        try:
            return cls(**json.loads(line))
        except (ValueError, TypeError):
            return None
