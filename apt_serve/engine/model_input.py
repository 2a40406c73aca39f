"""The persistent batch: one row per running sequence, from which a step's packed tensors are cut in one go."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from apt_core.metadata import AttentionMetadata
from apt_serve.engine.step import AddedSequence, StepInput

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ModelInput:
    """What one step feeds the model."""

    input_ids: torch.Tensor
    """[T] int64."""
    positions: torch.Tensor
    """[T] int64."""
    metadata: AttentionMetadata
    last_rows: IntArray
    """[B]: the row, among the T packed tokens, of each sequence's last token."""
    slots: IntArray
    """[B]."""
    context_lens: IntArray
    """[B]: tokens computed after this step, and so the position of the next one."""


class PersistentBatch:
    """Token ids and block tables of the running sequences, by slot.

    Kept between steps, so that a step costs work in the number of its sequences, not in the length of their contexts.
    """

    def __init__(self, *, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.device = device
        max_blocks = -(-max_model_len // block_size)
        self.token_ids = np.zeros((max_num_seqs, max_model_len + 1), dtype=np.int32)
        self.num_prompt_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self._block_tables = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self._num_blocks = np.zeros(max_num_seqs, dtype=np.int64)

    def add(self, sequence: AddedSequence) -> None:
        """Give a sequence its row."""
        slot = sequence.slot
        self.token_ids[slot, : len(sequence.token_ids)] = sequence.token_ids
        self.num_prompt_tokens[slot] = sequence.num_prompt_tokens
        self._num_blocks[slot] = 0
        self._append_blocks(slot, sequence.block_ids)

    def build(self, step: StepInput) -> ModelInput:
        """Apply the step's new blocks and cut its packed tensors."""
        for s in step.scheduled:
            if s.new_block_ids:
                self._append_blocks(s.slot, s.new_block_ids)
        slots = np.array([s.slot for s in step.scheduled])
        starts = np.array([s.start for s in step.scheduled])
        lengths = np.array([s.num_tokens for s in step.scheduled])
        contexts = starts + lengths

        cu_seqlens = np.zeros(len(lengths) + 1, dtype=np.int32)
        np.cumsum(lengths, out=cu_seqlens[1:])
        sequence_of = np.repeat(np.arange(len(lengths)), lengths)  # [T]
        positions = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1] - starts, lengths)
        rows = slots[sequence_of]
        blocks = self._block_tables[rows, positions // self.block_size].astype(np.int64)
        slot_mapping = blocks * self.block_size + positions % self.block_size
        max_context = int(contexts.max())
        tables = self._block_tables[slots, : -(-max_context // self.block_size)]

        metadata = AttentionMetadata(
            cu_seqlens_q=self._tensor(cu_seqlens),
            context_lens=self._tensor(contexts.astype(np.int32)),
            max_seqlen_q=int(lengths.max()),
            max_context_len=max_context,
            num_decodes=_leading_ones(lengths),
            block_tables=self._tensor(tables),
            slot_mapping=self._tensor(slot_mapping),
        )
        input_ids = self._tensor(self.token_ids[rows, positions].astype(np.int64))
        return ModelInput(
            input_ids,
            self._tensor(positions),
            metadata,
            last_rows=cu_seqlens[1:].astype(np.int64) - 1,
            slots=slots,
            context_lens=contexts,
        )

    def _append_blocks(self, slot: int, block_ids: tuple[int, ...]) -> None:
        start = self._num_blocks[slot]
        self._block_tables[slot, start : start + len(block_ids)] = block_ids
        self._num_blocks[slot] += len(block_ids)

    def _tensor(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def _leading_ones(lengths: IntArray) -> int:
    longer = np.flatnonzero(lengths != 1)
    return int(longer[0]) if len(longer) else len(lengths)
