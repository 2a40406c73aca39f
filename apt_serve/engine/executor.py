"""Executor: the seam between scheduling a step and running it.

`launch` starts a step and `collect` waits for its result, so that placements which run elsewhere (another process, a
GPU) can overlap with scheduling. The model runner in the engine's own thread is the placement for a processor.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from apt_core.errors import AptError
from apt_serve.engine.step import StepInput, StepOutput

Handle = TypeVar("Handle")
"""Of a step under way."""


class EngineBrokenError(AptError):
    """The engine cannot go on: steps fail one after another, or what runs them has gone."""


class Executor(Protocol[Handle]):
    """Runs steps of one model."""

    def launch(self, step: StepInput) -> Handle:
        """Start a step; steps complete in the order they were launched.

        Like ``collect``, raises EngineBrokenError if no step can be run any more, and anything else if this one cannot.
        """

    def collect(self, handle: Handle) -> StepOutput:
        """Wait for a step's output."""

    def reset(self) -> None:
        """Forget what a failed step may have left behind, so that the next step starts clean."""

    @property
    def is_alive(self) -> bool:
        """Whether steps can be run, as far as is known; may be asked from any thread."""

    def close(self) -> None:
        """Run no more steps, and end the processes that ran them."""
