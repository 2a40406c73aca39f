"""The process of an engine that is driven from Python: it measures itself and prints events that its parent reads."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence

from benchmarks.peers.process import Line
from benchmarks.peers.workload import Job, Observed, Sample, random_prompts

_MARK = "@peers "
Generate = Callable[[list[list[int]], int], object]
"""Continues these prompts by so many tokens each, greedily, whatever the tokens are."""


def worker_argv(python: str, module: str, job: Job) -> tuple[str, ...]:
    """The command that runs ``main`` of a module on a job.

    Not ``python -m``: an engine that spawns processes would run the module in each of them once more.
    """
    return (python, "-c", f"from {module} import main; main()", job.to_json())


def job_of_this_process() -> Job:
    """The job its parent gave it."""
    return Job.from_json(sys.argv[1])


def measure(generate: Generate, job: Job) -> None:
    """Measure every batch with one token of output and with all of it; what the rest took is decoding."""
    workload = job.workload
    generate(random_prompts(job, 1, seed=0), 1)
    _print(event="first_token")
    for batch in workload.batches:  # whatever an engine does at its first batch of a size is not counted
        generate(random_prompts(job, batch, seed=batch), 4)
    for repeat in range(workload.repeats):
        for batch in workload.batches:
            seed = 1000 * (repeat + 1) + 2 * batch
            first = _seconds(generate, random_prompts(job, batch, seed), 1)
            whole = _seconds(generate, random_prompts(job, batch, seed + 1), workload.output_len)
            _print(event="sample", batch=batch, first_s=first, whole_s=whole)


def observed(lines: Sequence[Line]) -> Observed:
    """What ``measure`` printed.

    Raises:
        ValueError: nothing was generated, or so slowly at times that decoding took no time.
    """
    events = [(line.at_s, json.loads(line.text[len(_MARK) :])) for line in lines if line.text.startswith(_MARK)]
    startup = [at_s for at_s, event in events if event["event"] == "first_token"]
    if not startup:
        raise ValueError("no token was generated")
    return Observed(startup[0], tuple(_sample(event) for _, event in events if event["event"] == "sample"))


def _sample(event: dict[str, float]) -> Sample:
    decode_s = event["whole_s"] - event["first_s"]
    if decode_s <= 0:
        raise ValueError("one token took longer than all: the machine is too busy to measure")
    return Sample(int(event["batch"]), event["first_s"], decode_s)


def _seconds(generate: Generate, prompts: list[list[int]], output_len: int) -> float:
    started = time.perf_counter()
    generate(prompts, output_len)
    return time.perf_counter() - started


def _print(**event: object) -> None:
    print(_MARK + json.dumps(event), flush=True)
