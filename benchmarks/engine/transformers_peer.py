"""transformers on the weights of a RandomCheckpoint: its continuous batching, and its plain generation of a batch."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from benchmarks.engine.offline import Timings, Workload, random_prompts
from benchmarks.random_checkpoint import RandomCheckpoint

NO_TOKEN = -1
PROCESSOR_MEMORY = 0.02
"""Share of a processor's memory that continuous batching gets: it fills a mask in proportion, for half a minute if it
chooses itself."""


class TransformersPeer:
    """A model of transformers' in its own hands: it chooses its attention and graphs itself, and a GPU's memory.

    Args:
        config: contents of config.json.
        checkpoint: of the same model.
    """

    def __init__(self, config: dict[str, Any], checkpoint: RandomCheckpoint, dtype: torch.dtype) -> None:
        named = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
        hf_config = AutoConfig.for_model(config["model_type"], **named)
        with torch.device(checkpoint.device):
            self._model: Any = AutoModelForCausalLM.from_config(hf_config, dtype=dtype).eval()
        with torch.no_grad():
            for name, values in checkpoint.tensors():
                self._model.get_parameter(name).copy_(values)
        self._vocab_size = checkpoint.config.vocab_size

    @property
    def attention(self) -> str:
        """What it computes attention with."""
        return str(self._model.config._attn_implementation)

    def next_token(self, prompt: tuple[int, ...]) -> int:
        """The most likely one after a prompt."""
        with torch.inference_mode():
            logits = self._model(torch.tensor([prompt], device=self._model.device)).logits
        return int(logits[0, -1].argmax())

    def continuous(self, workload: Workload, seeds: list[int]) -> list[Timings]:
        """Rounds of a workload by continuous batching, after its warm-up.

        Raises:
            RuntimeError: it gave fewer tokens than it was asked for.
        """
        with self._manager(workload) as manager:
            return [self._continuous_round(manager, workload, seed) for seed in seeds]

    @contextmanager
    def _manager(self, workload: Workload) -> Iterator[Any]:
        generation = GenerationConfig(
            do_sample=False, max_new_tokens=workload.output_len, eos_token_id=NO_TOKEN, pad_token_id=0
        )
        memory = PROCESSOR_MEMORY if self._model.device.type == "cpu" else None
        batching = ContinuousBatchingConfig(allow_block_sharing=False, max_memory_percent=memory)
        with self._model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=batching
        ) as manager:
            yield manager
        gc.collect()

    def _continuous_round(self, manager: Any, workload: Workload, seed: int) -> Timings:
        prompts = [list(prompt) for prompt in random_prompts(workload, self._vocab_size, seed)]
        started = time.perf_counter()
        manager.add_requests(prompts, max_new_tokens=workload.output_len, record_timestamps=True)
        streams: list[list[float]] = []
        while len(streams) < len(prompts):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error is not None or len(result.generated_tokens) != workload.output_len:
                    raise RuntimeError(result.error or f"{len(result.generated_tokens)} tokens")
                streams.append([at - started for at in result.timestamps])
            elif result is None and not manager.is_running():
                raise RuntimeError("it stopped")
        return Timings(streams)

    def plain(self, workload: Workload, seeds: list[int]) -> list[Timings]:
        """Rounds of a workload by `generate`, all prompts as one batch: with one token of output and again with all.

        Raises:
            RuntimeError: it gave fewer tokens than it was asked for.
        """
        return [self._plain_round(workload, seed) for seed in seeds]

    def _plain_round(self, workload: Workload, seed: int) -> Timings:
        first = self._generate(workload, 1, seed)
        whole = self._generate(workload, workload.output_len, seed + 1)
        return Timings([[first] + [whole] * (workload.output_len - 1)] * workload.num_streams)

    def _generate(self, workload: Workload, output_len: int, seed: int) -> float:
        """Seconds until the last token is there."""
        prompts = torch.tensor(random_prompts(workload, self._vocab_size, seed), device=self._model.device)
        generation = GenerationConfig(
            do_sample=False, min_new_tokens=output_len, max_new_tokens=output_len, pad_token_id=0
        )
        started = time.perf_counter()
        with torch.inference_mode():
            tokens = self._model.generate(prompts, generation, attention_mask=torch.ones_like(prompts)).cpu()
        if tokens.shape[1] != workload.prompt_len + output_len:
            raise RuntimeError(f"{tokens.shape[1] - workload.prompt_len} tokens")
        return time.perf_counter() - started
