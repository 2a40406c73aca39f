"""A line of JSON for each request."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

from apt_serve.telemetry.exchange import Exchange


class AccessLog:
    """Writes lines to stdout, where whoever runs the server collects them."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def write(self, exchange: Exchange) -> None:
        """Write what is known of an exchange that has ended."""
        stream = self._stream or sys.stdout
        stream.write(json.dumps(_fields(exchange)) + "\n")
        stream.flush()


def _fields(exchange: Exchange) -> dict[str, Any]:
    caller = exchange.caller
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": exchange.request_id,
        "method": exchange.method,
        "route": exchange.route,
        "status": exchange.status,
        "duration_s": _rounded(exchange.seconds_to(exchange.ended_at)),
        "time_to_first_token_s": _rounded(exchange.seconds_to(exchange.first_token_at)),
        "prompt_tokens": exchange.num_prompt_tokens,
        "completion_tokens": exchange.num_generated_tokens,
        "model": exchange.model,
        "owner": caller and caller.owner,
        "key_id": caller and caller.key_id,
        "client": exchange.client,
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
