"""Executor: the seam between scheduling a step and running it.

`launch` starts a step and `collect` waits for its result. Where steps run elsewhere, as on a GPU, the next one can be
scheduled and launched meanwhile. The model runner in the engine's own thread is the placement for a processor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

from apt_core.errors import AptError
from apt_serve.engine.step import StepInput, StepOutput

if TYPE_CHECKING:
    from apt_core.models.decoder import DecoderForCausalLM

Handle = TypeVar("Handle")
"""Of a step under way."""


class EngineBrokenError(AptError):
    """The engine cannot go on: steps fail one after another, or what runs them has gone."""


class Executor(Protocol[Handle]):
    """Runs steps of one model."""

    @property
    def max_steps_in_flight(self) -> int:
        """Steps launched and not yet collected, at most: 1 where `launch` computes, 2 where it only starts a step."""

    def launch(self, step: StepInput) -> Handle:
        """Start a step; steps complete in the order they were launched.

        Like ``collect``, raises EngineBrokenError if no step can be run any more, and anything else if this one cannot.
        """

    def collect(self, handle: Handle) -> StepOutput:
        """Wait for a step's output."""

    def reset(self) -> None:
        """Forget what a failed step may have left behind, so that the next step starts clean."""

    def add_weights(self, weight_version: str, model: DecoderForCausalLM) -> None:
        """Take further weights of the same shapes; steps name the version they run on.

        Raises:
            SwapError: this executor cannot.
        """

    def prepare_weights(self, weight_version: str) -> bool:
        """Do a part of what is to be done before steps run on weights that were added; False if nothing is left.

        What a part takes, running sequences wait.
        """

    def drop_weights(self, weight_version: str) -> None:
        """Free weights on which no step runs any more, if there are such."""

    @property
    def is_alive(self) -> bool:
        """Whether steps can be run, as far as is known; may be asked from any thread."""

    def close(self) -> None:
        """Run no more steps, and end the processes that ran them."""


def num_slots(max_num_seqs: int, max_steps_in_flight: int) -> int:
    """Rows that suffice: any sequence of a step under way may leave, and another come, before the step is taken in."""
    return max_num_seqs * max_steps_in_flight
