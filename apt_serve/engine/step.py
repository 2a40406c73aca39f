"""What crosses between scheduler and model runner: small picklable dataclasses, no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from apt_core.manifest import UNPUBLISHED
from apt_serve.engine.client import TokenLogprobs
from apt_serve.engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class AddedSequence:
    """A sequence that takes a row of the persistent batch: new, or back after preemption."""

    slot: int
    seq_id: str
    token_ids: tuple[int, ...]
    """Prompt, and output generated before a preemption."""
    num_prompt_tokens: int
    sampling: SamplingParams
    seed: int
    block_ids: tuple[int, ...]
    """Blocks it holds already (from the prefix cache), before ScheduledSequence.new_block_ids."""


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """Tokens [start, start + num_tokens) of one sequence, to be computed in this step."""

    slot: int
    seq_id: str
    start: int
    num_tokens: int
    new_block_ids: tuple[int, ...]
    """Appended to its block table before this step."""
    samples: bool
    """Whether the next token is sampled after the last of these tokens (they reach the sequence's end)."""


@dataclass(frozen=True, slots=True)
class StepInput:
    """One step: what joins, what runs, what has left. Sequences with one token come first in ``scheduled``."""

    added: tuple[AddedSequence, ...]
    scheduled: tuple[ScheduledSequence, ...]
    removed_slots: tuple[int, ...]
    """Rows freed since the last step (finished, aborted, preempted); applied before ``added``."""
    weight_version: str = UNPUBLISHED
    """Of all sequences in ``scheduled``."""

    @property
    def num_tokens(self) -> int:
        """Tokens to compute, of all sequences."""
        return sum(s.num_tokens for s in self.scheduled)

    def last_rows(self, indices: Iterable[int]) -> list[int]:
        """The rows, among the packed tokens, of the last tokens of the scheduled sequences with these indices."""
        ends = list(accumulate(s.num_tokens for s in self.scheduled))
        return [ends[i] - 1 for i in indices]


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """What a step produced for one scheduled sequence."""

    seq_id: str
    token_ids: tuple[int, ...]
    """Accepted tokens; empty where none was sampled, several under speculation."""
    num_computed_tokens: int
    """Leading tokens of the sequence that are computed after this step."""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One per token id, if asked for."""
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    """If asked for: one for each prompt token that follows a token computed in this step."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Outputs in the order of StepInput.scheduled."""

    outputs: tuple[SequenceOutput, ...]
