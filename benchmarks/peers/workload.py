"""What every engine is asked to do, and what is kept of how it did. Peers import this: the standard library only."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median

MAX_BATCHED_TOKENS = 2048
"""Token budget of one step, the same for every engine that has one."""


@dataclass(frozen=True)
class Workload:
    """Batches of random prompts that arrive at once and are continued greedily to their full length."""

    batches: tuple[int, ...]
    prompt_len: int
    output_len: int
    repeats: int
    """How often one process measures each batch."""

    @property
    def max_len(self) -> int:
        """Tokens of prompt and output together."""
        return self.prompt_len + self.output_len


@dataclass(frozen=True)
class Job:
    """A workload for one process of one engine."""

    model: str
    """Folder or file of the weights, or a name that the engine knows."""
    weights: str
    """The engine's own word for the precision of its weights."""
    num_threads: int
    vocab_size: int
    workload: Workload

    def to_json(self) -> str:
        """One line of text that ``from_json`` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The job that ``to_json`` wrote."""
        values = json.loads(text)
        workload = values.pop("workload")
        return cls(workload=Workload(**workload | {"batches": tuple(workload["batches"])}), **values)


@dataclass(frozen=True)
class Sample:
    """One batch, measured once."""

    batch: int
    prefill_s: float
    """Until every prompt has its first token."""
    decode_s: float
    """For all tokens after the first."""


@dataclass(frozen=True)
class Observed:
    """What one process of an engine told."""

    startup_s: float
    """From starting the process to its first token."""
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Figures:
    """One process of an engine, reduced to the figures that are compared."""

    decode: dict[int, float]
    """Output tokens after the first per second, by batch."""
    prefill: float
    """Prompt tokens per second, in the largest batch."""
    ttft_s: float
    """Until the first token of the smallest batch."""
    peak_mib: float
    """Most resident memory of all its processes together."""
    startup_s: float
    """From starting the process to its first token."""


def random_prompts(job: Job, batch: int, seed: int) -> list[list[int]]:
    """Prompts of random tokens, equal for every engine; no two share a prefix."""
    rng = random.Random(seed)
    length = job.workload.prompt_len
    return [[rng.randrange(100, job.vocab_size) for _ in range(length)] for _ in range(batch)]


def figures(observed: Observed, workload: Workload, peak_mib: float) -> Figures:
    """Medians over the repeats of one process.

    Raises:
        ValueError: a batch is missing.
    """
    of = {batch: [s for s in observed.samples if s.batch == batch] for batch in workload.batches}
    if missing := [batch for batch, samples in of.items() if not samples]:
        raise ValueError(f"no result for batch {', '.join(map(str, missing))}")
    smallest, largest = min(workload.batches), max(workload.batches)
    decoded = workload.output_len - 1
    return Figures(
        decode={batch: batch * decoded / median(s.decode_s for s in samples) for batch, samples in of.items()},
        prefill=largest * workload.prompt_len / median(s.prefill_s for s in of[largest]),
        ttft_s=median(s.prefill_s for s in of[smallest]),
        peak_mib=peak_mib,
        startup_s=observed.startup_s,
    )


def medians(rounds: Sequence[Figures]) -> Figures:
    """Medians over the rounds."""
    return Figures(
        decode={batch: median(r.decode[batch] for r in rounds) for batch in rounds[0].decode},
        prefill=median(r.prefill for r in rounds),
        ttft_s=median(r.ttft_s for r in rounds),
        peak_mib=median(r.peak_mib for r in rounds),
        startup_s=median(r.startup_s for r in rounds),
    )
