"""New weights for a running engine: what may be asked, and what is said of how it goes. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal

from apt_core.errors import AptError

SwapMode = Literal["overlap", "drain", "abort"]
"""What becomes of requests that run on the old weights: they finish beside new ones on the new weights; they finish,
and new ones wait for that; they end with an error."""


class SwapPhase(StrEnum):
    """How far a swap has come."""

    CHECKING = "checking"
    """Files and configuration."""
    LOADING = "loading"
    PREPARING = "preparing"
    """The engine takes the new weights in; on a GPU it captures graphs."""
    DRAINING = "draining"
    """The new weights are in use or, with ``drain``, wait for it; requests on the old ones have not all ended."""
    DONE = "done"
    FAILED = "failed"
    """The old weights serve as before."""


class SwapError(AptError):
    """Weights that cannot take the place of those that serve."""


class SwapRunningError(SwapError):
    """Another swap has not ended."""


@dataclass(frozen=True, slots=True)
class SwapOrder:
    """Which weights to take, and how."""

    path: Path
    """Folder with a manifest."""
    mode: SwapMode
    timeout_s: float
    """Of those that run on the old weights: who has not finished so long after the change ends with an error."""


@dataclass(frozen=True, slots=True)
class SwapReport:
    """One swap."""

    order: SwapOrder
    from_version: str
    phase: SwapPhase = SwapPhase.CHECKING
    to_version: str | None = None
    """None until the manifest has been read."""
    seconds: float = 0.0
    """From the order to the end or, while it goes on, to the beginning of this phase."""
    num_ended: int = 0
    """Sequences on the old weights that ended with an error."""
    error: str | None = None
    """Why it failed."""

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen."""
        return self.phase in (SwapPhase.DONE, SwapPhase.FAILED)
