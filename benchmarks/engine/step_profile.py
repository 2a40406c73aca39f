"""Where the time of a step goes: the model, sampling, and the Python around them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any
from unittest.mock import patch

from apt_serve.engine.cuda_graph import PaddedForward
from apt_serve.engine.engine import Engine
from apt_serve.engine.forward import LinkedForward, PackedForward
from apt_serve.engine.sampler import Sampler
from benchmarks.engine.offline import Workload, run_offline


@dataclass(frozen=True, slots=True)
class StepProfile:
    """Medians over the steps of a run, in seconds: of decoding, where outputs have more tokens than prompts chunks."""

    step_s: float
    model_s: float
    """From the sequences' rows to logits."""
    sampling_s: float

    def describe(self, num_streams: int) -> str:
        """One line."""
        model, sampling = self.model_s / self.step_s, self.sampling_s / self.step_s
        return (
            f"profile   {num_streams:>2} streams: step {self.step_s * 1e3:.1f} ms, {model:.1%} model, "
            f"{sampling:.1%} sampling, {1 - model - sampling:.1%} Python around"
        )


def profile_steps(engine: Engine, workload: Workload, seed: int) -> StepProfile:
    """Run a workload with a timer around each part: two looks at the clock a call, and nothing in the engine itself."""
    steps: list[float] = []
    model: list[float] = []
    sampling: list[float] = []
    with ExitStack() as timers:
        timers.enter_context(_timed(Engine, "step", steps))
        for forward in (LinkedForward, PackedForward, PaddedForward):
            timers.enter_context(_timed(forward, "__call__", model))
        timers.enter_context(_timed(Sampler, "sample", sampling))
        run_offline(engine, workload, seed)
    return StepProfile(median(steps), median(model), median(sampling))


@contextmanager
def _timed(owner: type, name: str, seconds: list[float]) -> Iterator[None]:
    """Note how long each call of a method takes."""
    method: Callable[..., Any] = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - started)

    with patch.object(owner, name, timed):
        yield
