"""Print the kernels that steps launch on a GPU but `warm_up` does not: they would be compiled while serving.

No GPU is needed: nothing runs and nothing is compiled, launches only say which kernel they would take, and every token
is 0. Triton must not be interpreting, so this is a process of its own.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

torch.version.cuda = "13.0"  # before ops decides whether to import Triton

from apt_core.kv_cache import allocate_kv_cache  # noqa: E402
from apt_core.models.decoder import pack_linears  # noqa: E402
from apt_core.quantization import WeightPrecision  # noqa: E402
from apt_kernels.ops import backends  # noqa: E402
from apt_kernels.triton import launch, linear_tile, paged_attention_cut  # noqa: E402
from apt_serve.engine.cuda_graph import PaddedForward  # noqa: E402
from apt_serve.engine.model_runner import ModelRunner  # noqa: E402
from apt_serve.engine.sampling_params import SamplingParams  # noqa: E402
from apt_serve.engine.step import AddedSequence, ScheduledSequence, StepInput  # noqa: E402
from tests.apt_serve.engine.tiny_engine import CONFIG, tiny_model  # noqa: E402

BLOCK_SIZE, MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS = 16, 20, 1500
NUM_STEPS = 100


@dataclass(frozen=True)
class Case:
    """A kind of model."""

    num_heads: int
    num_kv_heads: int
    max_model_len: int = 1024
    cache_dtype: torch.dtype = torch.bfloat16
    precision: WeightPrecision | None = None

    @property
    def block_ids(self) -> tuple[int, ...]:
        """Of every sequence."""
        return tuple(range(self.max_model_len // BLOCK_SIZE))


CASES = (
    Case(4, 2),
    Case(3, 1, cache_dtype=torch.int8),
    Case(8, 8, precision="int8"),
    Case(8, 8, max_model_len=256, precision="int4"),
)


class Hopper:
    """What a launch asks a driver for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def kernels_of(run: Callable[[], object]) -> set[str]:
    """The specialized kernels that are launched."""
    found = set()

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        binder = self.device_caches[0][-1]
        arguments, specialization, launched = binder(*args, debug=False, **options)
        if self.fn.__name__ in ("argmax_kernel", "sample_kernel"):
            arguments["out"].zero_()  # a token
        found.add(f"{self.fn.__name__} {specialization} {sorted(launched.items())}")

    launch_it, JITFunction.run = JITFunction.run, note
    try:
        run()
    finally:
        JITFunction.run = launch_it
    return found


def runner_of(case: Case) -> ModelRunner:
    """As for a GPU."""
    heads = {"num_heads": case.num_heads, "num_kv_heads": case.num_kv_heads}
    config = replace(CONFIG, max_position_embeddings=case.max_model_len, **heads)
    model = tiny_model(torch.bfloat16, config)
    if case.precision is not None:
        pack_linears(model, case.precision)
    device = torch.device("cpu")
    kv_cache = allocate_kv_cache(
        config, num_blocks=len(case.block_ids), block_size=BLOCK_SIZE, dtype=case.cache_dtype, device=device
    )
    return ModelRunner(
        model,
        kv_cache,
        max_num_seqs=MAX_NUM_SEQS,
        max_model_len=case.max_model_len,
        eos_token_ids=frozenset(),
        pads_decodes=True,
    )


@torch.inference_mode()
def warm_up(runner: ModelRunner) -> None:
    """As `load` does on a GPU."""
    runner.warm_up(MAX_NUM_BATCHED_TOKENS)
    assert isinstance(runner._forward, PaddedForward)
    for size in runner._forward._sizes:  # what `capture` runs
        runner._forward._compute(size)


def random_step(case: Case, rng: random.Random) -> StepInput:
    """Decodes and chunks of prompts, of all lengths at all places."""
    num_seqs, room = rng.randint(1, MAX_NUM_SEQS), MAX_NUM_BATCHED_TOKENS
    longest = rng.choice([1, 1, 2, 10, 100, case.max_model_len])
    lengths = []
    for _ in range(num_seqs):
        lengths.append(min(rng.randint(1, longest), max(room, 1)))
        room -= lengths[-1]
    added, scheduled = [], []
    for slot, length in enumerate(sorted(lengths)):
        start = rng.randint(0, case.max_model_len - length)
        sampling = rng.choice([SamplingParams(temperature=0.0), SamplingParams(top_k=3), SamplingParams(logprobs=4)])
        sampling = replace(sampling, prompt_logprobs=rng.choice([None, None, 0, 2]))
        tokens = (0,) * (start + length)
        added.append(AddedSequence(slot, str(slot), tokens, len(tokens), sampling, 0, case.block_ids))
        scheduled.append(ScheduledSequence(slot, str(slot), start, length, (), rng.random() < 0.8))
    return StepInput(tuple(added), tuple(scheduled), removed_slots=tuple(range(MAX_NUM_SEQS)))


def serve(runner: ModelRunner, case: Case) -> None:
    """Many steps."""
    rng = random.Random(0)
    for _ in range(NUM_STEPS):
        runner.collect(runner.launch(random_step(case, rng)))


def main() -> None:
    """See above."""
    driver.set_active(Hopper())
    launch.INTERPRETED = True  # so that tensors on a processor pass for a GPU's
    for module in (paged_attention_cut, linear_tile):
        module.num_processors = lambda _: 132  # type: ignore[attr-defined]
    backends.is_on_gpu = lambda _: True  # type: ignore[assignment]
    backends.is_native = lambda *_: False  # type: ignore[assignment]
    for case in CASES:
        runner = runner_of(case)
        warm = kernels_of(partial(warm_up, runner))
        cold = kernels_of(partial(serve, runner, case)) - warm
        print(f"{case}: {len(warm)} kernels", file=sys.stderr)
        for kernel in sorted(cold):
            print(case, kernel)


if __name__ == "__main__":
    main()
