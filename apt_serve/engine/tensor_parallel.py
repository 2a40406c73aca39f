"""The Executor of a model that several ranks share: each runs the same runner on its part of the weights."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic

from apt_core.models.decoder import DecoderForCausalLM
from apt_serve.engine.executor import EngineBrokenError, Executor, Handle
from apt_serve.engine.handover import SwapError
from apt_serve.engine.rank_worker import Order
from apt_serve.engine.ranks import Ranks
from apt_serve.engine.step import StepInput, StepOutput


class TensorParallelExecutor(Generic[Handle]):
    """Sends each step to the other ranks and runs rank 0's part of it in the caller's thread.

    What crosses between the processes is the StepInput. Every rank keeps the rows of all sequences and chooses all
    tokens by itself: the gathered logits are the same bits everywhere, and so is what follows from them. No result has
    to be sent back, nor a token before the next step can start.

    Any error of a step is the end, as it leaves the ranks at different places: EngineBrokenError.
    """

    def __init__(self, runner: Executor[Handle], ranks: Ranks) -> None:
        self._runner = runner
        self._ranks = ranks
        self._num_under_way = 0
        self._stop = weakref.finalize(self, ranks.stop)
        self._stop.atexit = False  # the ranks see to that themselves

    @property
    def max_steps_in_flight(self) -> int:
        """See Executor."""
        return self._runner.max_steps_in_flight

    def launch(self, step: StepInput) -> Handle:
        """See Executor."""
        with self._errors_told():
            self._ranks.send(Order(step, self._num_under_way))
            self._num_under_way += 1
            return self._runner.launch(step)

    def collect(self, handle: Handle) -> StepOutput:
        """See Executor."""
        with self._errors_told():
            output = self._runner.collect(handle)
        self._num_under_way -= 1
        self._ranks.note_progress(is_idle=self._num_under_way == 0)
        return output

    def reset(self) -> None:
        """See Executor: after a failed step there is no next one."""

    def add_weights(self, weight_version: str, model: DecoderForCausalLM) -> None:
        """See Executor: the other ranks would have to load theirs too."""
        raise SwapError("a model that several ranks share cannot change its weights: replace the replica")

    def prepare_weights(self, weight_version: str) -> bool:
        """See Executor: none can be added."""
        return False

    def drop_weights(self, weight_version: str) -> None:
        """See Executor: none can be added."""

    @property
    def is_alive(self) -> bool:
        """See Executor."""
        return self._ranks.is_alive

    def close(self) -> None:
        """See Executor."""
        self._stop()

    @contextmanager
    def _errors_told(self) -> Iterator[None]:
        try:
            yield
        except EngineBrokenError:
            raise
        except Exception as error:
            raise self._ranks.broken(error) from error
