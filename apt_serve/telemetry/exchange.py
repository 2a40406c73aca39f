"""What is known of one request, gathered on its way: the source of access log, trace and request metrics.

It holds counts, times and names alone. Prompts, answers, headers and query strings never enter it.
"""

from __future__ import annotations

import time
from collections import Counter
from contextvars import ContextVar
from dataclasses import dataclass, field

from apt_serve.access.identity import Identity


@dataclass(slots=True)
class Exchange:
    """One HTTP request, or one message on a WebSocket. Times are ``time.monotonic()``."""

    request_id: str
    method: str
    client: str | None = None
    """Address of the peer."""
    route: str = "unmatched"
    """The route's template: an id in a path would give each request a name of its own."""
    status: int = 0
    arrived_at: float = field(default_factory=time.monotonic)
    submitted_at: float | None = None
    """When the engine was asked, once the limits allowed it."""
    scheduled_at: float | None = None
    """When the engine's first step for it began, as far as its first token tells."""
    first_token_at: float | None = None
    last_token_at: float | None = None
    first_byte_at: float | None = None
    """When the first bytes of the answer's body were handed to the server's socket."""
    is_streamed: bool = False
    """Whether the first bytes go out with the first tokens."""
    traceparent: str | None = None
    """Names its span, where it is traced."""
    ended_at: float | None = None
    caller: Identity | None = None
    model: str | None = None
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)
    """How choices ended; "abort" for those that did not."""

    def seconds_to(self, moment: float | None) -> float | None:
        """From the arrival to a moment; None if it never came."""
        return None if moment is None else moment - self.arrived_at


CURRENT: ContextVar[Exchange | None] = ContextVar("apt_exchange", default=None)
"""The exchange that the running task works for. Tasks it starts inherit it."""
