"""OpenVINO GenAI: its pipeline with continuous batching, on weights exported by optimum-intel."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.engine import Variant, Weights
from benchmarks.peers.process import Command, Line
from benchmarks.peers.setup import Setup
from benchmarks.peers.worker import job_of_this_process, measure, observed, worker_argv
from benchmarks.peers.workload import MAX_BATCHED_TOKENS, Job, Observed, Workload

NAME = "OpenVINO"
_TORCH = "torch==2.13.0"
_PACKAGES = ("openvino-genai==2026.4.1.0", "optimum-intel[openvino]==2.2.0", "nncf==3.4.0")
_REQUIREMENTS = ((_TORCH,), (_TORCH, *_PACKAGES))
_UNWANTED = ("torchvision",)
"""A build of it for CUDA fails when imported, and language models do not need it."""
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
_EXPORT_OPTIONS = {"int4": ("--group-size", "64")}
"""The default group, 128 weights, does not divide every model's rows."""
_CACHE_GIB = 2


class OpenVino:
    """OpenVINO GenAI in an environment of its own, with the exported weights beside it."""

    def __init__(self, folder: Path) -> None:
        self._setup = Setup(NAME, folder)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Weights as they are stored; all compute in bfloat16."""
        return (Variant(NAME, "fp16", 16), Variant(NAME, "int8", 8), Variant(NAME, "int4", 4))

    def install(self) -> None:
        """Make its environment."""
        self._setup.environment(_REQUIREMENTS, _UNWANTED)

    def convert(self, variant: Variant, weights: Weights) -> None:
        """Export with optimum-intel."""
        place = self._exported(variant, weights)
        if place.is_dir():
            return
        temporary = place.with_name(f"{place.name}.{os.getpid()}.tmp")
        temporary.mkdir(parents=True)
        export = [str(Path(self._setup.python).with_name("optimum-cli")), "export", "openvino"]
        model = ["--model", str(weights.hf_folder), "--task", "text-generation-with-past"]
        options = ["--weight-format", variant.weights, *_EXPORT_OPTIONS.get(variant.weights, ())]
        try:
            what = f"converting the weights ({variant.weights})"
            self._setup.run(what, [*export, *model, *options, str(temporary)], _ENVIRONMENT)
            temporary.rename(place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def command(self, variant: Variant, weights: Weights, workload: Workload, num_threads: int) -> Command:
        """``main`` below, in the peer's environment."""
        model = str(self._exported(variant, weights))
        job = Job(model, variant.weights, num_threads, weights.vocab_size, workload)
        argv = worker_argv(self._setup.python, "benchmarks.peers.openvino", job)
        return Command(argv, _ENVIRONMENT | {"OMP_NUM_THREADS": str(num_threads)}, self._setup.import_folder)

    def observed(self, lines: Sequence[Line]) -> Observed:
        """The worker's events."""
        return observed(lines)

    def _exported(self, variant: Variant, weights: Weights) -> Path:
        return self._setup.folder / "models" / weights.name / variant.weights


def main() -> None:
    """Take the measurements of one job."""
    import numpy as np  # these three are only there in the peer's environment
    import openvino_genai as genai
    from openvino import Tensor

    job = job_of_this_process()
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = _CACHE_GIB
    scheduler.max_num_batched_tokens = MAX_BATCHED_TOKENS
    scheduler.max_num_seqs = max(job.workload.batches)
    scheduler.enable_prefix_caching = False
    properties = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": job.num_threads}
    pipeline = genai.ContinuousBatchingPipeline(job.model, scheduler, "CPU", properties)

    def generate(prompts: list[list[int]], output_len: int) -> None:
        config = genai.GenerationConfig(max_new_tokens=output_len, ignore_eos=True, do_sample=False)
        tensors = [Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        pipeline.generate(tensors, [config] * len(tensors))

    measure(generate, job)
