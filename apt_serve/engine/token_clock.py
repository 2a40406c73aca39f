"""When sequences got their tokens."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from apt_serve.engine.sequence import Sequence


@dataclass(slots=True)
class TokenTimes:
    """What happened since it was last asked."""

    num_generated: int = 0
    first_token_waits_s: list[float] = field(default_factory=list)
    """For each sequence that got its first token: seconds since its request arrived."""
    token_gaps_s: list[float] = field(default_factory=list)
    """For each sequence that got a token after its first: seconds since the one before."""


class TokenClock:
    """Times the tokens of running sequences."""

    def __init__(self) -> None:
        self._last_token_at: dict[str, float] = {}
        """Per sequence that has generated: time.monotonic() of its newest token."""
        self._times = TokenTimes()

    def advance(self, seq: Sequence, num_tokens: int) -> None:
        """A sequence has just got so many new tokens."""
        if num_tokens == 0:
            return
        now = time.monotonic()
        last = self._last_token_at.get(seq.seq_id)
        if last is None:
            self._times.first_token_waits_s.append(now - seq.arrival_time)
        else:
            self._times.token_gaps_s.append((now - last) / num_tokens)
        self._last_token_at[seq.seq_id] = now
        self._times.num_generated += num_tokens

    def forget(self, seq: Sequence) -> None:
        """A sequence has ended."""
        self._last_token_at.pop(seq.seq_id, None)

    def take(self) -> TokenTimes:
        """What happened since the last call."""
        times, self._times = self._times, TokenTimes()
        return times
