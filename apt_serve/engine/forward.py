"""The ways to compute a step: as one linked op, or op by op from packed tensors; `cuda_graph.py` has a third."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from apt_core.kv_cache import LayerKVCache
from apt_core.models.decoder import DecoderForCausalLM
from apt_kernels import ops
from apt_serve.engine.model_input import PersistentBatch
from apt_serve.engine.step import StepInput
from apt_serve.engine.transfer import select_rows


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """What a step's tokens give."""

    hidden: torch.Tensor
    """[T, C], normed."""
    logits: torch.Tensor
    """[R, V] in at least float32, after the last tokens of the sequences that sample."""


class Forward(Protocol):
    """Computes a step for the rows of the persistent batch; new keys and values are stored."""

    @property
    def model(self) -> DecoderForCausalLM:
        """Whose steps these are."""

    def __call__(self, step: StepInput, sampling: list[int]) -> ForwardOutput:
        """Compute the step; ``sampling`` are the indices of the scheduled sequences that sample."""


class LinkedForward:
    """One op, which reads the persistent batch itself."""

    def __init__(self, linked: ops.DecoderLayers, model: DecoderForCausalLM, batch: PersistentBatch) -> None:
        self._linked = linked
        self.model = model
        self._token_ids = torch.from_numpy(batch.token_ids)
        self._block_tables = torch.from_numpy(batch.block_tables)

    def __call__(self, step: StepInput, sampling: list[int]) -> ForwardOutput:
        """See Forward."""
        scheduled = step.scheduled
        hidden, logits = self._linked.step(
            self._token_ids,
            self._block_tables,
            slots=[s.slot for s in scheduled],
            starts=[s.start for s in scheduled],
            lengths=[s.num_tokens for s in scheduled],
            sampled=sampling,
        )
        if logits is None:
            logits = wide_logits(self.model, select_rows(hidden, step.last_rows(sampling)))
        return ForwardOutput(hidden, logits)


class PackedForward:
    """The model's own ops over packed tensors."""

    def __init__(self, model: DecoderForCausalLM, kv_cache: list[LayerKVCache], batch: PersistentBatch) -> None:
        self.model = model
        self._kv_cache = kv_cache
        self._batch = batch

    def __call__(self, step: StepInput, sampling: list[int]) -> ForwardOutput:
        """See Forward."""
        inputs = self._batch.build(step)
        hidden = self.model(self.model.embed(inputs.input_ids), inputs.positions, inputs.metadata, self._kv_cache)
        return ForwardOutput(hidden, wide_logits(self.model, select_rows(hidden, step.last_rows(sampling))))


def wide_logits(model: DecoderForCausalLM, hidden: torch.Tensor) -> torch.Tensor:
    """[R, C] -> [R, V] in at least float32."""
    logits = model.logits(hidden)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
