"""Executor: the seam between scheduling a step and running it.

`launch` starts a step and `collect` waits for its result, so that placements which run elsewhere (another process, a
GPU) can overlap with scheduling. The model runner in the engine's own thread is the placement for a processor.
"""

from __future__ import annotations

from typing import Protocol

from apt_serve.engine.step import StepInput, StepOutput


class StepHandle(Protocol):
    """A step under way."""


class Executor(Protocol):
    """Runs steps of one model."""

    def launch(self, step: StepInput) -> StepHandle:
        """Start a step; steps complete in the order they were launched."""

    def collect(self, handle: StepHandle) -> StepOutput:
        """Wait for a step's output."""

    def reset(self) -> None:
        """Forget what a failed step may have left behind, so that the next step starts clean."""
