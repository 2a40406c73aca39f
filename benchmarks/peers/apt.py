"""APT itself, offline, in each precision that its settings offer."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

from apt_serve.engine.client import GenerationRequest
from apt_serve.engine.config import EngineConfig
from apt_serve.engine.engine import Engine
from apt_serve.engine.sampling_params import SamplingParams
from benchmarks.peers.engine import Variant, Weights
from benchmarks.peers.process import Command, Line
from benchmarks.peers.setup import ROOT
from benchmarks.peers.worker import job_of_this_process, measure, observed, worker_argv
from benchmarks.peers.workload import MAX_BATCHED_TOKENS, Job, Observed, Workload

NAME = "APT"
_BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}
_BLOCK_SIZE = EngineConfig.block_size


class Apt:
    """The engine of this repository, run from its source."""

    @property
    def variants(self) -> tuple[Variant, ...]:
        """What ``dtype`` and, where there is one, ``weight_precision`` allow."""
        offered = {*_choices("dtype"), *_choices("weight_precision")}
        return tuple(Variant(NAME, weights, bits) for weights, bits in _BITS.items() if weights in offered)

    def install(self) -> None:
        """Nothing to do: this process already runs in its environment."""

    def convert(self, variant: Variant, weights: Weights) -> None:
        """Nothing to do: it converts when it loads."""

    def command(self, variant: Variant, weights: Weights, workload: Workload, num_threads: int) -> Command:
        """``main`` below, in this environment."""
        job = Job(weights.source, variant.weights, num_threads, weights.vocab_size, workload)
        argv = worker_argv(sys.executable, "benchmarks.peers.apt", job)
        return Command(argv, {"OMP_NUM_THREADS": str(num_threads)}, ROOT)

    def observed(self, lines: Sequence[Line]) -> Observed:
        """The worker's events."""
        return observed(lines)


def engine_config(job: Job) -> EngineConfig:
    """Settings of a job, with a KV cache for just its largest batch, as the peers have."""
    workload = job.workload
    blocks_per_sequence = -(-workload.max_len // _BLOCK_SIZE)
    return EngineConfig(
        source=job.model,
        num_threads=job.num_threads,
        max_model_len=workload.max_len,
        max_num_seqs=max(workload.batches),
        max_num_batched_tokens=max(MAX_BATCHED_TOKENS, max(workload.batches)),
        num_kv_blocks=blocks_per_sequence * max(workload.batches),
        enable_prefix_caching=False,
        **_precision(job.weights),
    )


def main() -> None:
    """Take the measurements of one job."""
    job = job_of_this_process()
    engine = Engine(engine_config(job))

    def generate(prompts: list[list[int]], output_len: int) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            for sequence in engine.sequences_of(GenerationRequest(str(i), tuple(prompt), sampling)):
                engine.add(sequence)
        while engine.has_work:
            engine.step()

    measure(generate, job)


def _precision(weights: str) -> dict[str, Any]:
    """The settings that make a model of such weights: what is not a float computes in bfloat16."""
    chosen: dict[str, Any] = {"dtype": weights if weights in _choices("dtype") else "bfloat16"}
    if weights in _choices("weight_precision"):
        chosen["weight_precision"] = weights
    return chosen


def _choices(setting: str) -> tuple[str, ...]:
    """Values a setting may have; none if there is no such setting."""
    if setting not in {field.name for field in dataclasses.fields(EngineConfig)}:
        return ()
    return get_args(get_type_hints(EngineConfig)[setting])
