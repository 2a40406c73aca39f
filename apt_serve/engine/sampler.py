"""Choosing the next token: ordered logits steps, then exact argmax or a draw from the filtered distribution.

A draw uses one uniform number that depends on the sequence's seed and the token's position only, so a sequence gets the
same tokens whoever shares its batch, and again after a preemption.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from apt_kernels import ops
from apt_serve.engine.client import Logprob, TokenLogprobs
from apt_serve.engine.logits_steps import LogitBias, LogitsStep, MinTokens, Penalties
from apt_serve.engine.step import AddedSequence
from apt_serve.engine.transfer import HostCopy, select_rows, to_device

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """One token a row, with log-probabilities for the rows that asked for them."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


class PendingLogprobs:
    """Log-probabilities on their way to the host."""

    def __init__(self, found: HostCopy, wanted: list[int]) -> None:
        self._found = found
        self._wanted = wanted

    def read(self) -> list[TokenLogprobs]:
        """Wait for them: one for each row."""
        token_ids, chosen, values, ids = (tensor.tolist() for tensor in self._found.read())
        return [
            TokenLogprobs(
                chosen=Logprob(token_id, logprob),
                top=tuple(Logprob(i, v) for i, v in zip(row_ids[:count], row_values[:count], strict=True)),
            )
            for token_id, logprob, row_ids, row_values, count in zip(
                token_ids, chosen, ids, values, self._wanted, strict=True
            )
        ]


class Sampled:
    """What a step samples, on its way to the host."""

    def __init__(self, token_ids: torch.Tensor, rows: list[int], logprobs: PendingLogprobs | None) -> None:
        self.token_ids = token_ids
        """[R], on the device."""
        self._copy = HostCopy(token_ids)
        self._rows = rows
        """Those with log-probabilities."""
        self._logprobs = logprobs

    def read(self) -> SamplerOutput:
        """Wait for it."""
        token_ids = self._copy.read()[0].tolist()
        logprobs: list[TokenLogprobs | None] = [None] * len(token_ids)
        if self._logprobs is not None:
            for row, found in zip(self._rows, self._logprobs.read(), strict=True):
                logprobs[row] = found
        return SamplerOutput(token_ids, logprobs)


class Sampler:
    """Sampling parameters of the running sequences by slot, and the choice itself, which waits for no device."""

    def __init__(self, *, num_slots: int, vocab_size: int, eos_token_ids: frozenset[int], device: torch.device) -> None:
        self._temperature = np.ones(num_slots, dtype=np.float32)
        self._top_k = np.zeros(num_slots, dtype=np.int64)
        self._top_p = np.ones(num_slots, dtype=np.float32)
        self._min_p = np.zeros(num_slots, dtype=np.float32)
        self._seed = np.zeros(num_slots, dtype=np.uint64)
        self._num_logprobs: dict[int, int] = {}
        """By slot, of the sequences that want any."""
        self._drawing: set[int] = set()
        """Slots of the sequences whose temperature is above 0."""
        self.steps: tuple[LogitsStep, ...] = (
            LogitBias(device),
            Penalties(vocab_size, device),
            MinTokens(eos_token_ids, device),
        )

    def add(self, sequence: AddedSequence) -> None:
        """Take over a sequence's parameters for its slot."""
        slot, sampling = sequence.slot, sequence.sampling
        self._forget(slot)
        if not sampling.is_greedy:
            self._drawing.add(slot)
        if sampling.logprobs is not None:
            self._num_logprobs[slot] = sampling.logprobs
        self._temperature[slot] = 0.0 if sampling.is_greedy else sampling.temperature
        self._top_k[slot] = max(sampling.top_k, 0)
        self._top_p[slot] = sampling.top_p
        self._min_p[slot] = sampling.min_p
        self._seed[slot] = sequence.seed & 0xFFFF_FFFF_FFFF_FFFF
        for step in self.steps:
            step.add(sequence)

    def remove(self, slot: int) -> None:
        """Forget a slot."""
        self._forget(slot)
        for step in self.steps:
            step.remove(slot)

    def _forget(self, slot: int) -> None:
        self._drawing.discard(slot)
        self._num_logprobs.pop(slot, None)

    def sample(self, logits: torch.Tensor, slots: list[int], positions: list[int]) -> Sampled:
        """Choose one token for each row.

        Args:
            logits: [R, V] float32 or float64; overwritten.
            slots: [R] slot of each row.
            positions: [R] index the new token will have in its sequence.
        """
        rows = [row for row, slot in enumerate(slots) if slot in self._num_logprobs]
        raw = logits.clone() if rows and any(step.touches(slots) for step in self.steps) else logits
        for step in self.steps:
            step.apply(logits, slots)
        token_ids = self._choose(logits, slots, positions)
        logprobs = None
        if rows:
            wanted = [self._num_logprobs[slots[row]] for row in rows]
            logprobs = gather_logprobs(select_rows(raw, rows), select_rows(token_ids, rows), wanted)
        for step in self.steps:
            step.accept(slots, token_ids)
        return Sampled(token_ids, rows, logprobs)

    def _choose(self, logits: torch.Tensor, slots: list[int], positions: list[int]) -> torch.Tensor:
        """[R] token ids."""
        if self._drawing.isdisjoint(slots):
            return ops.argmax(logits)
        return ops.sample(
            logits,
            temperature=to_device(self._temperature[slots], logits.device),
            top_k=to_device(self._top_k[slots], logits.device),
            top_p=to_device(self._top_p[slots], logits.device),
            min_p=to_device(self._min_p[slots], logits.device),
            uniform=to_device(uniform_at(self._seed[slots], np.array(positions)), logits.device),
        )


def uniform_at(seeds: npt.NDArray[np.uint64], positions: IntArray) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each (seed, position): two rounds of splitmix64 (Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        bits = _splitmix64(_splitmix64(seeds) + positions.astype(np.uint64))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def gather_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, wanted: list[int]) -> PendingLogprobs:
    """Log-probabilities of the given tokens and of the most likely ones.

    Args:
        logits: [R, V], as the model gave them.
        token_ids: [R].
        wanted: [R] how many of the most likely tokens each row wants.
    """
    return PendingLogprobs(HostCopy(token_ids, *ops.top_logprobs(logits, token_ids, max(wanted))), wanted)
