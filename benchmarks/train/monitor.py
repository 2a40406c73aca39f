"""`python -m benchmarks.train.monitor`: what looking at every gradient costs of a step. The bar is 5 %.

Beside it stands the norm over all gradients, which clipping would need without the monitor.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from apt_train.config import read_config
from apt_train.loop import StepResult, Sums, Trainer
from apt_train.monitor.gradients import GradientMonitor
from apt_train.parallel.clipping import l2_norm
from apt_train.train import train
from benchmarks.machine import describe
from benchmarks.table import print_table

CONFIGS = ("configs/debug.toml", "configs/smollm2-finetune.toml")
FIRST = 3
"""Steps that are not counted: they allocate."""


def main() -> None:
    """Train for some steps with each file of settings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", nargs="*", default=CONFIGS, metavar="CONFIG")
    parser.add_argument("--steps", type=int, default=13)
    options = parser.parse_args()
    print(describe(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    rows = [_row(path, options.steps) for path in options.configs]
    print_table(("settings", "step ms", "monitor ms", "share", "norm alone ms"), rows)


def _row(path: str, steps: int) -> tuple[str, ...]:
    step, monitor, norm = _seconds(path, steps)
    milliseconds = [f"{1e3 * seconds:.2f}" for seconds in (step, monitor, norm)]
    return Path(path).stem, *milliseconds[:2], f"{monitor / step:.2%}", milliseconds[2]


def _seconds(path: str, steps: int) -> tuple[float, float, float]:
    """Medians of a step, of the monitor in it, and of the norm over all gradients."""
    begins: list[float] = []
    ends: list[float] = []
    checks: list[float] = []
    norms: list[float] = []
    update = Trainer.update

    def timed_update(self: Trainer, index: int, sums: Sums) -> StepResult:
        _wait()
        result = update(self, index, sums)
        _wait()
        ends.append(time.perf_counter())
        norms.append(_timed(lambda: float(l2_norm(p.grad for p in self._parameters if p.grad is not None))))
        return result

    backward = Trainer.backward

    def timed_backward(self: Trainer, *arguments: Any, **options: Any) -> Sums:
        begins.append(time.perf_counter())
        return backward(self, *arguments, **options)

    with tempfile.TemporaryDirectory() as folder, _timed_calls(checks):
        overrides = {"run.folder": folder, "run.steps": str(steps), "run.evaluate_every": "0"}
        with patch.object(Trainer, "update", timed_update), patch.object(Trainer, "backward", timed_backward):
            train(read_config(path, overrides | {"schedule.warmup_steps": "0", "metrics.details_every": "0"}))
    whole = [end - begin for begin, end in zip(begins, ends, strict=True)]
    return median(whole[FIRST:]), median(checks[FIRST:]), median(norms[FIRST:])


@contextmanager
def _timed_calls(seconds: list[float]) -> Iterator[None]:
    check = GradientMonitor.check_gradient_flow

    def timed(self: GradientMonitor, *arguments: Any, **options: Any) -> Any:
        found: list[Any] = []
        seconds.append(_timed(lambda: found.append(check(self, *arguments, **options))))
        return found[0]

    with patch.object(GradientMonitor, "check_gradient_flow", timed):
        yield


def _timed(call: Callable[[], object]) -> float:
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
