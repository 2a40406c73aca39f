"""The persistent batch: one row per running sequence, from which a step's packed tensors are cut in one go."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from apt_core.metadata import AttentionMetadata
from apt_serve.engine.step import AddedSequence, StepInput
from apt_serve.engine.transfer import to_device

IntArray = npt.NDArray[np.int64]

IN_FLIGHT = -1
"""In place of a token that a step under way is sampling; the device knows it before the host does."""


@dataclass(frozen=True, slots=True)
class ModelInput:
    """What one step feeds the model."""

    input_ids: torch.Tensor
    """[T] int64."""
    positions: torch.Tensor
    """[T] int64."""
    metadata: AttentionMetadata


class PersistentBatch:
    """Token ids and block tables of the running sequences, by slot.

    Kept between steps, so that a step costs work in the number of its sequences, not in the length of their contexts.

    Args:
        num_slots: its rows.
        is_ahead: whether steps are built before the tokens of the step before are known, which then stay on the device.
    """

    def __init__(
        self, *, num_slots: int, max_model_len: int, block_size: int, device: torch.device, is_ahead: bool = False
    ) -> None:
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.device = device
        max_blocks = -(-max_model_len // block_size)
        self.token_ids = np.zeros((num_slots, max_model_len + 1), dtype=np.int64)
        self.num_prompt_tokens = np.zeros(num_slots, dtype=np.int64)
        self.block_tables = np.zeros((num_slots, max_blocks), dtype=np.int32)
        self._newest = torch.zeros(num_slots, dtype=torch.int64, device=device) if is_ahead else None
        """The token each sequence sampled last."""
        self._num_blocks = np.zeros(num_slots, dtype=np.int64)
        self._counting = np.arange(num_slots + 1)

    def add(self, sequence: AddedSequence) -> None:
        """Give a sequence its row."""
        slot = sequence.slot
        self.token_ids[slot, : len(sequence.token_ids)] = sequence.token_ids
        self.num_prompt_tokens[slot] = sequence.num_prompt_tokens
        self._num_blocks[slot] = 0
        self._append_blocks(slot, sequence.block_ids)

    def append_blocks(self, step: StepInput) -> None:
        """Take over the blocks that sequences get with this step."""
        for s in step.scheduled:
            if s.new_block_ids:
                self._append_blocks(s.slot, s.new_block_ids)

    def sample(self, slots: list[int], positions: list[int], token_ids: torch.Tensor) -> None:
        """Sequences sample tokens [R] for these positions; the host will be told by `know`."""
        if self._newest is not None:
            self.token_ids[slots, positions] = IN_FLIGHT
            self._newest[to_device(np.array(slots), self.device)] = token_ids

    def know(self, slots: list[int], positions: list[int], token_ids: list[int]) -> None:
        """Take the tokens that were sampled for these positions."""
        for slot, position, token_id in zip(slots, positions, token_ids, strict=True):
            self.token_ids[slot, position] = token_id

    def build(self, step: StepInput) -> ModelInput:
        """Cut the step's packed tensors."""
        scheduled = step.scheduled
        slots = np.array([s.slot for s in scheduled])
        starts = np.array([s.start for s in scheduled])
        num_decodes = next((i for i, s in enumerate(scheduled) if s.num_tokens != 1), len(scheduled))
        if num_decodes == len(scheduled):
            layout = _Layout(slots, starts, starts + 1, self._counting[: num_decodes + 1])
        else:
            layout = _lay_out(slots, starts, np.array([s.num_tokens for s in scheduled]))
        block, offset = np.divmod(layout.positions, self.block_size)
        slot_mapping = self.block_tables[layout.rows, block] * np.int64(self.block_size) + offset
        max_context = max(s.start + s.num_tokens for s in scheduled)
        metadata = AttentionMetadata(
            cu_seqlens_q=self._tensor(layout.bounds.astype(np.int32)),
            context_lens=self._tensor(layout.contexts.astype(np.int32)),
            max_seqlen_q=max(s.num_tokens for s in scheduled),
            max_context_len=max_context,
            num_decodes=num_decodes,
            block_tables=self._tensor(self.block_tables[slots, : -(-max_context // self.block_size)]),
            slot_mapping=self._tensor(slot_mapping),
        )
        return ModelInput(self._input_ids(layout), self._tensor(layout.positions), metadata)

    def _input_ids(self, layout: _Layout) -> torch.Tensor:
        known = self.token_ids[layout.rows, layout.positions]
        token_ids = self._tensor(known)
        if self._newest is None or (known != IN_FLIGHT).all():
            return token_ids
        return torch.where(token_ids == IN_FLIGHT, self._newest[self._tensor(layout.rows)], token_ids)

    def _append_blocks(self, slot: int, block_ids: tuple[int, ...]) -> None:
        start = self._num_blocks[slot]
        self.block_tables[slot, start : start + len(block_ids)] = block_ids
        self._num_blocks[slot] += len(block_ids)

    def _tensor(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return to_device(array, self.device)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a step's packed tokens come from and belong."""

    rows: IntArray
    """[T]: slot of each token's sequence."""
    positions: IntArray
    """[T]."""
    contexts: IntArray
    """[B]: tokens of each sequence after the step."""
    bounds: IntArray
    """[B+1]: sequence b owns the packed tokens bounds[b]:bounds[b + 1]."""


def _lay_out(slots: IntArray, starts: IntArray, lengths: IntArray) -> _Layout:
    bounds = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=bounds[1:])
    positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1] - starts, lengths)
    return _Layout(np.repeat(slots, lengths), positions, starts + lengths, bounds)
