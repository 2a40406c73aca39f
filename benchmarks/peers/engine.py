"""What the benchmark asks of an engine. Peers import this: the standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.peers.process import Command, Line
from benchmarks.peers.workload import Observed, Workload


@dataclass(frozen=True)
class Weights:
    """The model that all engines run."""

    name: str
    """Of folders that hold what is made of it: another one for other contents."""
    source: str
    """As APT is told."""
    hf_folder: Path
    """In Hugging Face layout, bfloat16."""
    gguf: Path | None
    """The GGUF it came from, if it came from one."""
    vocab_size: int


@dataclass(frozen=True)
class Variant:
    """An engine with its weights in one precision."""

    engine: str
    weights: str
    """The engine's own word for the precision."""
    bits: int
    """Those of the same number are compared with one another."""


class Engine(Protocol):
    """APT or a peer."""

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The precisions it can run in."""
        ...

    def install(self) -> None:
        """Get what it needs, as far as that has not been done before.

        Raises:
            SetupError: it cannot be had on this machine.
        """
        ...

    def convert(self, variant: Variant, weights: Weights) -> None:
        """Write the weights in its own format, as far as that has not been done before.

        Raises:
            SetupError: it cannot run them in this precision.
        """
        ...

    def command(self, variant: Variant, weights: Weights, workload: Workload, num_threads: int) -> Command:
        """The process that takes the measurements, after ``install`` and ``convert``."""
        ...

    def observed(self, lines: Sequence[Line]) -> Observed:
        """What that process told in its output.

        Raises:
            ValueError: something is missing there.
        """
        ...
