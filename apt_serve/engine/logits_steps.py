"""Changes to the logits before a token is chosen, each a step of its own, applied in the sampler's order.

A step keeps state only for the slots that use it, on the device, so a request without it costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from apt_serve.engine.sampling_params import SamplingParams
from apt_serve.engine.step import AddedSequence
from apt_serve.engine.transfer import to_device

State = TypeVar("State")


class LogitsStep(Protocol):
    """One change to the logits of the slots that ask for it."""

    def add(self, sequence: AddedSequence) -> None:
        """A sequence took its slot (also after a preemption)."""

    def remove(self, slot: int) -> None:
        """The slot was given up."""

    def touches(self, slots: list[int]) -> bool:
        """Whether any of these slots uses this step."""

    def apply(self, logits: torch.Tensor, slots: list[int]) -> None:
        """Change logits [R, V] in place; slots [R] names each row's slot."""

    def accept(self, slots: list[int], token_ids: torch.Tensor) -> None:
        """The tokens [R] that were chosen for these slots."""


class SlotStates(Generic[State]):
    """State by slot, for the slots that use a step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._states: dict[int, State] = {}

    def remove(self, slot: int) -> None:
        """See LogitsStep."""
        self._states.pop(slot, None)

    def touches(self, slots: list[int]) -> bool:
        """See LogitsStep."""
        return bool(self._states) and any(slot in self._states for slot in slots)

    def accept(self, slots: list[int], token_ids: torch.Tensor) -> None:
        """See LogitsStep."""

    def _rows(self, slots: list[int]) -> list[tuple[int, State]]:
        """(row, state) of the rows that use this step."""
        if not self._states:
            return []
        states = self._states
        return [(row, states[slot]) for row, slot in enumerate(slots) if slot in states]


@dataclass(frozen=True, slots=True)
class _Bias:
    token_ids: torch.Tensor
    values: torch.Tensor


class LogitBias(SlotStates[_Bias]):
    """logit_bias: add a number to some tokens' logits."""

    def add(self, sequence: AddedSequence) -> None:
        """See LogitsStep."""
        bias = sequence.sampling.logit_bias
        self.remove(sequence.slot)
        if bias:
            token_ids = torch.tensor(list(bias.keys()), dtype=torch.int64)
            values = torch.tensor(list(bias.values()))
            self._states[sequence.slot] = _Bias(to_device(token_ids, self._device), to_device(values, self._device))

    def apply(self, logits: torch.Tensor, slots: list[int]) -> None:
        """See LogitsStep."""
        for row, bias in self._rows(slots):
            logits[row].index_add_(0, bias.token_ids, bias.values.to(logits))


@dataclass(slots=True)
class _Counts:
    sampling: SamplingParams
    in_prompt: torch.Tensor
    """[V] bool."""
    in_output: torch.Tensor
    """[V] int32: how often each token was generated."""


class Penalties(SlotStates[_Counts]):
    """Repetition penalty over prompt and output; presence and frequency penalties over the output."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        super().__init__(device)
        self._vocab_size = vocab_size

    def add(self, sequence: AddedSequence) -> None:
        """See LogitsStep."""
        sampling = sequence.sampling
        self.remove(sequence.slot)
        if sampling.repetition_penalty == 1 and sampling.presence_penalty == 0 and sampling.frequency_penalty == 0:
            return
        token_ids = torch.tensor(sequence.token_ids, dtype=torch.int64)
        prompt, output = token_ids.tensor_split([sequence.num_prompt_tokens])
        in_prompt = torch.zeros(self._vocab_size, dtype=torch.bool)
        in_prompt[prompt] = True
        in_output = torch.bincount(output, minlength=self._vocab_size).to(torch.int32)
        self._states[sequence.slot] = _Counts(
            sampling, to_device(in_prompt, self._device), to_device(in_output, self._device)
        )

    def apply(self, logits: torch.Tensor, slots: list[int]) -> None:
        """See LogitsStep."""
        for row, counts in self._rows(slots):
            values, sampling, in_output = logits[row], counts.sampling, counts.in_output
            was_seen = counts.in_prompt | (in_output > 0)
            if sampling.repetition_penalty != 1:
                penalty = sampling.repetition_penalty
                values = torch.where(was_seen, torch.where(values > 0, values / penalty, values * penalty), values)
            values = values - sampling.frequency_penalty * in_output - sampling.presence_penalty * (in_output > 0)
            logits[row] = values

    def accept(self, slots: list[int], token_ids: torch.Tensor) -> None:
        """See LogitsStep."""
        for row, counts in self._rows(slots):
            chosen = token_ids[row : row + 1]
            counts.in_output.scatter_add_(0, chosen, torch.ones_like(chosen, dtype=torch.int32))


@dataclass(slots=True)
class _Remaining:
    num_tokens: int
    stop_ids: torch.Tensor


class MinTokens(SlotStates[_Remaining]):
    """min_tokens: nothing that ends a generation is chosen before so many tokens."""

    def __init__(self, eos_token_ids: frozenset[int], device: torch.device) -> None:
        super().__init__(device)
        self._eos_token_ids = eos_token_ids

    def add(self, sequence: AddedSequence) -> None:
        """See LogitsStep."""
        self.remove(sequence.slot)
        num_output = len(sequence.token_ids) - sequence.num_prompt_tokens
        remaining = sequence.sampling.min_tokens - num_output
        stop_ids = sorted(self._eos_token_ids | set(sequence.sampling.stop_token_ids))
        if remaining > 0 and stop_ids:
            stop_ids_tensor = to_device(torch.tensor(stop_ids, dtype=torch.int64), self._device)
            self._states[sequence.slot] = _Remaining(remaining, stop_ids_tensor)

    def apply(self, logits: torch.Tensor, slots: list[int]) -> None:
        """See LogitsStep."""
        for row, remaining in self._rows(slots):
            logits[row].index_fill_(0, remaining.stop_ids, float("-inf"))

    def accept(self, slots: list[int], token_ids: torch.Tensor) -> None:
        """See LogitsStep."""
        for row, remaining in self._rows(slots):
            remaining.num_tokens -= 1
            if remaining.num_tokens == 0:
                self.remove(slots[row])
