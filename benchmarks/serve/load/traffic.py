"""What a load test asks for, and what it notes of each request. Locust's process imports it: no torch, no asyncio."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

OUTCOMES = "outcomes.jsonl"
"""File of one test's outcomes."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """A lognormal distribution of token counts, cut off at both ends.

    Real prompts and answers spread over orders of magnitude. Equal lengths would hide what long requests do to the
    others.
    """

    median: int
    sigma: float
    least: int
    most: int

    def draw(self, rng: random.Random) -> int:
        """One length."""
        return min(max(round(rng.lognormvariate(math.log(self.median), self.sigma)), self.least), self.most)


@dataclass(frozen=True, slots=True)
class Traffic:
    """How requests look. The same seed asks for the same."""

    prompt: Lengths = Lengths(median=128, sigma=0.8, least=8, most=1024)
    output: Lengths = Lengths(median=64, sigma=0.6, least=4, most=256)
    vocab_size: int = 49152
    seed: int = 0

    def draw(self, rng: random.Random) -> Ask:
        """One request, of random tokens: none finds another's prefix in the cache."""
        prompt = [rng.randrange(self.vocab_size) for _ in range(self.prompt.draw(rng))]
        return Ask(prompt, self.output.draw(rng))


@dataclass(frozen=True, slots=True)
class Ask:
    """What one request asks for; it gets exactly ``max_tokens``."""

    prompt: list[int]
    max_tokens: int

    def body(self, model: str | None) -> dict[str, object]:
        """As both protocols take it."""
        named = {} if model is None else {"model": model}
        return {**named, "prompt": self.prompt, "max_tokens": self.max_tokens, "temperature": 0, "ignore_eos": True}


@dataclass(frozen=True, slots=True)
class Objectives:
    """What a good answer keeps (goodput as in DistServe, arXiv:2401.09670)."""

    ttft_s: float = 2.0
    """Time to the first token at most."""
    itl_s: float = 0.2
    """Mean time between later tokens at most."""


@dataclass(slots=True)
class Outcome:
    """One request, in seconds since the test began.

    Time counts from ``intended_s``, when the request was to arrive, not from when the client came to send it: else a
    slow server would slow its own test down and be measured in its best moments only (coordinated omission).
    """

    protocol: str
    intended_s: float
    prompt_len: int
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """When tokens came, and how many at once."""
    ended_s: float = 0.0
    error: str | None = None

    @property
    def num_tokens(self) -> int:
        """That came."""
        return sum(count for _, count in self.arrivals)

    @property
    def ttft_s(self) -> float | None:
        """To the first token; None without one."""
        return self.arrivals[0][0] - self.intended_s if self.arrivals else None

    @property
    def e2e_s(self) -> float:
        """To the end."""
        return self.ended_s - self.intended_s

    @property
    def gaps_s(self) -> list[float]:
        """Between tokens: those that came together share the time since the last."""
        gaps = []
        for (before, _), (at, count) in zip(self.arrivals, self.arrivals[1:], strict=False):
            gaps += [(at - before) / count] * count
        return gaps

    def is_good(self, objectives: Objectives) -> bool:
        """Whether it ended well, and in time."""
        if self.error is not None or self.ttft_s is None:
            return False
        gaps = self.gaps_s
        return self.ttft_s <= objectives.ttft_s and sum(gaps) <= objectives.itl_s * len(gaps)


def write_outcomes(path: Path, outcomes: Iterable[Outcome]) -> None:
    """One JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(outcome)) + "\n" for outcome in outcomes)


def read_outcomes(path: Path) -> list[Outcome]:
    """What ``write_outcomes`` wrote, in the order in which the requests were to arrive."""
    with path.open(encoding="utf-8") as file:
        outcomes = [Outcome(**json.loads(line)) for line in file]
    return sorted(outcomes, key=lambda outcome: outcome.intended_s)
