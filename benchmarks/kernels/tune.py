"""`python -m benchmarks.kernels.tune`: measure every candidate of every Triton kernel, and keep the best for this GPU.

A class of shapes gets the configuration that is best over all of the benchmark's cases of that class, by the geometric
mean of their times; one that gives other results than the default is not taken. The table is written after each class,
and a class that is in it is left alone, so that a run that was cut short goes on where it ended.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from statistics import geometric_mean, median

import torch

from apt_kernels.triton import tuning
from apt_kernels.triton.tuning import Config
from benchmarks.kernels.case import Call, Case
from benchmarks.kernels.registry import GROUPS, cases
from benchmarks.kernels.sizes import sizes_for
from benchmarks.kernels.timing import cuda_turn, num_inputs
from benchmarks.kernels.tunable import TUNABLE
from benchmarks.machine import describe, device_of

NUM_FINALISTS = 3
FIRST_SECONDS, FINAL_SECONDS = 0.01, 0.05
"""That a case is measured for with each candidate, and with each finalist."""
LEAST_GAIN = 1.01
"""Below which the default stays: differences smaller than this are noise."""
MOST_WORKERS = 8

Timer = Callable[[Sequence[Call], float], float]
"""Seconds of a call, from as many inputs, measured for so long."""


@dataclass(frozen=True)
class Task:
    """A class of shapes to find a configuration for."""

    key: str
    """op/shape class."""
    candidates: tuple[Config, ...]
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class Choice:
    """What came out of a task."""

    config: Config
    gain: float
    """How many times as fast as the default."""
    num_ran: int
    """Candidates that ran and were right."""

    def describe(self, task: Task) -> str:
        """One line."""
        blocks = " ".join(f"{name} {size}" for name, size in self.config.blocks.items())
        what = f"{blocks}, {self.config.num_warps} warps, {self.config.num_stages} stages"
        counts = f"{self.num_ran} of {len(task.candidates)} candidates, {len(task.cases)} cases"
        return f"{task.key:<52} {self.gain:.2f}x  {what} ({counts})"


def tasks(found: Iterable[Case]) -> list[Task]:
    """One for every class that the cases launch."""
    by_key: dict[str, tuple[tuple[Config, ...], list[Case]]] = {}
    for case in found:
        for op, arguments in case.tuning.items():
            key = f"{op}/{TUNABLE[op].shape_class(*arguments)}"
            candidates = tuple(TUNABLE[op].candidates(*arguments))
            by_key.setdefault(key, (candidates, []))[1].append(case)
    return [Task(key, candidates, tuple(its)) for key, (candidates, its) in by_key.items()]


class Tuner:
    """Finds configurations one class after the other; what it found for one holds while it looks at the next."""

    def __init__(self, timer: Timer, device: torch.device, known: dict[str, Config]) -> None:
        self._timer = timer
        self._device = device
        self.known = known
        """By key."""

    def tune(self, task: Task) -> Choice:
        """Measure a class's candidates; `known` has the best afterwards."""
        calls = [[case.ours() for _ in range(num_inputs(case.work.num_bytes, self._device))] for case in task.cases]
        default, expected = self._default(task, calls)
        times = self._first(task, calls, expected)
        finalists = sorted(times, key=lambda number: times[number])[:NUM_FINALISTS]
        baseline = self._times(task, calls, default, FINAL_SECONDS)
        best, gain = default, 1.0
        for number in finalists:
            config = task.candidates[number]
            found = self._times(task, calls, config, FINAL_SECONDS)
            faster = geometric_mean(b / t for b, t in zip(baseline, found, strict=True))
            if faster > max(gain, LEAST_GAIN):
                best, gain = config, faster
        self.known[task.key] = best
        return Choice(best, gain, len(times))

    def _default(self, task: Task, calls: Sequence[Sequence[Call]]) -> tuple[Config, list[list[torch.Tensor]]]:
        """The op's own configuration, and what each case returns with it."""
        defaults: list[Config] = []

        def choose(key: str, default: Config) -> Config:
            if key != task.key:
                return self.known.get(key, default)
            defaults.append(default)
            return default

        with tuning.trying(choose):
            expected = [_tensors(its[0]()) for its in calls]
        assert defaults, f"no case of {task.key} looks it up"
        return defaults[0], expected

    def _first(
        self, task: Task, calls: Sequence[Sequence[Call]], expected: list[list[torch.Tensor]]
    ) -> dict[int, float]:
        """Mean seconds of each candidate that runs and is right, by its number."""
        times: dict[int, float] = {}
        for number, config in enumerate(task.candidates):
            try:
                with self._trying(task, config):
                    results = [_tensors(its[0]()) for its in calls]
                if all(is_close(result, wanted) for result, wanted in zip(results, expected, strict=True)):
                    times[number] = geometric_mean(self._times(task, calls, config, FIRST_SECONDS))
                else:
                    print(f"{task.key}: {config} gives other results", flush=True)
            except Exception as error:  # such as more shared memory than there is
                self._require_alive(task, config, error)
        return times

    def _times(self, task: Task, calls: Sequence[Sequence[Call]], config: Config, seconds: float) -> list[float]:
        with self._trying(task, config):
            return [self._timer(its, seconds) for its in calls]

    def _trying(self, task: Task, config: Config) -> AbstractContextManager[None]:
        return tuning.trying(lambda key, default: config if key == task.key else self.known.get(key, default))

    def _require_alive(self, task: Task, config: Config, error: Exception) -> None:
        """A launch that was refused costs nothing; after one that broke the GPU's context nothing can be measured."""
        if self._device.type == "cuda":
            try:
                torch.cuda.synchronize(self._device)
            except RuntimeError:
                raise RuntimeError(f"{task.key}: {config} broke the GPU's context") from error


def is_close(results: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    """Whether results differ by rounding at most; tokens drawn at a rounding's edge may differ."""
    for result, wanted in zip(results, expected, strict=True):
        if not wanted.is_floating_point():
            if (result == wanted).double().mean() < 0.9:
                return False
        elif not (result.double() - wanted.double()).norm() <= 0.02 * wanted.double().norm() + 1e-6:
            return False
    return True


def _tensors(output: object) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output.detach()]
    return [x for part in output for x in _tensors(part)] if isinstance(output, tuple | list) else []


def gpu_timer(calls: Sequence[Call], seconds: float) -> float:
    """The median of a short turn."""
    return median(cuda_turn(calls, seconds)())


def compile_candidates(todo: Sequence[Task], shard: int, num_shards: int) -> None:
    """Launch every so many-th candidate once: what it compiles to stays in Triton's cache on disk."""
    for task in todo:
        for case in task.cases:
            call = case.ours()
            for config in task.candidates[shard::num_shards]:
                with suppress(Exception), tuning.trying(_only(task.key, config)):
                    call()


def _only(key: str, config: Config) -> tuning.Choose:
    return lambda other, default: config if other == key else default


def _compile_in_parallel(seconds: float) -> None:
    """This command once more in several processes, which compile. A kernel takes a second of one core."""
    count = max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) // 2))
    command = [sys.executable, "-m", "benchmarks.kernels.tune", *sys.argv[1:]]
    workers = [subprocess.Popen([*command, "--shard", str(number), str(count)]) for number in range(count)]
    deadline = time.perf_counter() + seconds
    for worker in workers:
        try:
            worker.wait(max(deadline - time.perf_counter(), 0.1))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def main() -> None:
    """Tune what the table has not."""
    args = _parse()
    started = time.perf_counter()
    device = device_of("cuda")
    name = tuning.device_name(device)
    known = dict(tuning.stored(name))
    todo = tasks(cases(sizes_for(device), device, args.groups, args.only))
    todo = [task for task in todo if args.again or task.key not in known]
    if args.shard:
        compile_candidates(todo, *args.shard)
        return
    print(describe(device))
    print(f"classes   {len(todo)} to tune, {len(known)} known of {name}", flush=True)
    _compile_in_parallel(args.seconds / 2)
    print(f"compiled  in {time.perf_counter() - started:.0f} s", flush=True)
    tuner = Tuner(gpu_timer, device, known)
    for number, task in enumerate(todo):
        if time.perf_counter() - started > args.seconds:
            print(f"{len(todo) - number} classes left out after {args.seconds:.0f} s; run it again for them")
            break
        print(tuner.tune(task).describe(task), flush=True)
        tuning.save(name, known)
        torch.cuda.empty_cache()
    print(f"table     {tuning.FOLDER / name}.json")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.tune", description=__doc__)
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--only", default="", help="cases whose op or shape contains this")
    parser.add_argument("--seconds", type=float, default=240, help="begin no class after so long")
    parser.add_argument("--again", action="store_true", help="tune known classes as well")
    parser.add_argument("--shard", type=int, nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
