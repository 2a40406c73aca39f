"""Decode steps at padded sizes over buffers that never move, so that a GPU replays each size as one CUDA graph.

A decode step of a small model is hundreds of kernels of a few microseconds each: if the processor launched them one by
one, the GPU would wait for it. Without graphs the same padded steps run op by op, on any device.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import torch

from apt_core.kv_cache import LayerKVCache
from apt_core.metadata import AttentionMetadata
from apt_core.models.decoder import DecoderForCausalLM
from apt_serve.engine.forward import ForwardOutput, PackedForward
from apt_serve.engine.model_input import ModelInput, PersistentBatch
from apt_serve.engine.step import StepInput
from apt_serve.engine.transfer import select_rows

WARM_UP_RUNS = 2
"""Before a capture: the first run compiles kernels, and libraries take their workspaces."""


def padded_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes that are captured: 1, 2, 4, from 8 on multiples of 8, from 256 on of 32, and the most."""
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, max_num_seqs + 32, 32)]
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs]


class DecodeBuffers:
    """A decode step's inputs, each of which stays where it is; a step of B sequences is padded to one of the sizes.

    A padding row stands for a sequence of one token, which reads the first place of block 0 and is stored nowhere.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self._max_model_len = max_model_len
        self.input_ids = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self.positions = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self.slot_mapping = torch.full((max_num_seqs,), -1, dtype=torch.int64, device=device)
        self.context_lens = torch.ones(max_num_seqs, dtype=torch.int32, device=device)
        self.cu_seqlens_q = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)
        max_blocks = -(-max_model_len // block_size)
        self.block_tables = torch.zeros((max_num_seqs, max_blocks), dtype=torch.int32, device=device)

    def fill(self, inputs: ModelInput, size: int) -> None:
        """Copy a step's inputs; the rows from there to ``size`` become padding."""
        metadata = inputs.metadata
        assert metadata.slot_mapping is not None and metadata.block_tables is not None
        count = len(inputs.input_ids)
        self.input_ids[:count].copy_(inputs.input_ids, non_blocking=True)
        self.positions[:count].copy_(inputs.positions, non_blocking=True)
        self.slot_mapping[:count].copy_(metadata.slot_mapping, non_blocking=True)
        self.context_lens[:count].copy_(metadata.context_lens, non_blocking=True)
        self.block_tables[:count, : metadata.block_tables.shape[1]].copy_(metadata.block_tables, non_blocking=True)
        if count < size:
            self._pad(count, size)

    def clear(self) -> None:
        """All rows become padding."""
        self._pad(0, len(self.input_ids))

    def _pad(self, start: int, end: int) -> None:
        self.input_ids[start:end] = 0
        self.positions[start:end] = 0
        self.slot_mapping[start:end] = -1
        self.context_lens[start:end] = 1
        self.block_tables[start:end, 0] = 0

    def metadata(self, size: int) -> AttentionMetadata:
        """Of the first ``size`` rows, for any contexts there may be."""
        return AttentionMetadata(
            cu_seqlens_q=self.cu_seqlens_q[: size + 1],
            context_lens=self.context_lens[:size],
            max_seqlen_q=1,
            max_context_len=self._max_model_len,
            num_decodes=size,
            block_tables=self.block_tables[:size],
            slot_mapping=self.slot_mapping[:size],
        )


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    output: ForwardOutput


def output_bytes(model: DecoderForCausalLM, max_num_seqs: int) -> int:
    """Bytes of what the largest padded step leaves in its buffers, and of the logits before they were widened."""
    dtype = model.model.embed_tokens.weight.dtype
    width = dtype.itemsize + torch.promote_types(dtype, torch.float32).itemsize
    return max_num_seqs * (model.config.vocab_size * width + model.config.hidden_size * dtype.itemsize)


class PaddedForward:
    """Decode steps padded, as graphs once `capture` has run; all others by the packed tensors."""

    def __init__(
        self,
        model: DecoderForCausalLM,
        kv_cache: list[LayerKVCache],
        batch: PersistentBatch,
        *,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        self.model = model
        self._kv_cache = kv_cache
        self._batch = batch
        self._packed = PackedForward(model, kv_cache, batch)
        self._sizes = padded_sizes(max_num_seqs)
        self._buffers = DecodeBuffers(max_num_seqs, max_model_len, batch.block_size, batch.device)
        # All sizes leave their results in one place: kept by each graph, the logits of all would take gigabytes.
        dtype, rows = model.model.embed_tokens.weight.dtype, (max_num_seqs, model.config.hidden_size)
        self._hidden = torch.zeros(rows, dtype=dtype, device=batch.device)
        rows, dtype = (max_num_seqs, model.config.vocab_size), torch.promote_types(dtype, torch.float32)
        self._logits = torch.zeros(rows, dtype=dtype, device=batch.device)
        self._captured: dict[int, _Captured] = {}
        self._pool: Any = None
        """Memory of all graphs."""

    @torch.inference_mode()
    def capture_next(self) -> bool:
        """Record the graph of one more size, the largest first, so that the smaller ones find room in its memory.

        Returns:
            Whether there are more.
        """
        missing = [size for size in self._sizes if size not in self._captured]
        if not missing:
            return False
        size = missing[-1]
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # Of no sequence: what the last step left in the buffers would be computed, and stored, once more.
        self._buffers.clear()
        for _ in range(WARM_UP_RUNS):
            self._compute(size)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = self._compute(size)
        self._captured[size] = _Captured(graph, output)
        return len(missing) > 1

    def __call__(self, step: StepInput, sampling: list[int]) -> ForwardOutput:
        """See Forward."""
        count = len(step.scheduled)
        if step.num_tokens > count:
            return self._packed(step, sampling)
        size = self._sizes[bisect_left(self._sizes, count)]
        self._buffers.fill(self._batch.build(step), size)
        output = self._run(size)
        return ForwardOutput(output.hidden[:count], select_rows(output.logits[:count], sampling))

    def _run(self, size: int) -> ForwardOutput:
        captured = self._captured.get(size)
        if captured is None:
            return self._compute(size)
        captured.graph.replay()
        return captured.output

    def _compute(self, size: int) -> ForwardOutput:
        buffers = self._buffers
        embedded = self.model.embed(buffers.input_ids[:size])
        hidden = self.model(embedded, buffers.positions[:size], buffers.metadata(size), self._kv_cache)
        logits = self._logits[:size].copy_(self.model.logits(hidden))
        return ForwardOutput(self._hidden[:size].copy_(hidden), logits)
