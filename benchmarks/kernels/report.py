"""A case as a row of text: its time, its share of what the machine allows, and the ratio to each peer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.kernels.case import Case, Work
from benchmarks.machine import Limits
from benchmarks.table import aligned

HEADS = ("op", "shape", "us", "rate", "of limit", "x peers")
WIDTHS = (28, 44, -10, -13, -8, 0)


@dataclass(frozen=True, slots=True)
class Row:
    """What came out of a case."""

    case: Case
    seconds: float
    peers: Mapping[str, float]
    """Seconds of a call of each peer."""
    missing: Mapping[str, str]
    """Why a peer has none."""

    def line(self, limits: Limits) -> str:
        """Under HEADS. A ratio above 1 is a peer that takes longer."""
        share = limit_seconds(self.case.work, limits) / self.seconds
        ratios = ", ".join(f"{seconds / self.seconds:.2f} {name}" for name, seconds in self.peers.items())
        cells = (self.case.op, self.case.shape, f"{self.seconds * 1e6:.1f}", self._rate(limits), f"{share:.0%}", ratios)
        return aligned(cells, WIDTHS)

    def _rate(self, limits: Limits) -> str:
        """Of what bounds it: bytes or operations."""
        work = self.case.work
        if is_bound_by_memory(work, limits):
            return f"{work.num_bytes / self.seconds / 1e9:.1f} GB/s"
        unit, scale = ("TFLOP/s", 1e12) if work.num_flop / self.seconds > 1e13 else ("GFLOP/s", 1e9)
        return f"{work.num_flop / self.seconds / scale:.0f} {unit}"


def is_bound_by_memory(work: Work, limits: Limits) -> bool:
    """Whether moving its bytes takes longer than its operations do."""
    return work.num_bytes / limits.read_gb_s >= work.num_flop / limits.gemm_gflop_s


def limit_seconds(work: Work, limits: Limits) -> float:
    """The least a call can take on a machine with these rates."""
    return max(work.num_bytes / (limits.read_gb_s * 1e9), work.num_flop / (limits.gemm_gflop_s * 1e9))
