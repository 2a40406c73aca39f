"""Choosing the next token: ordered logits steps, then exact argmax or a draw from the filtered distribution.

A draw uses one uniform number that depends on the sequence's seed and the token's position only, so a sequence gets the
same tokens whoever shares its batch, and again after a preemption.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from apt_serve.engine.client import Logprob, TokenLogprobs
from apt_serve.engine.logits_steps import LogitBias, LogitsStep, MinTokens, Penalties
from apt_serve.engine.step import AddedSequence

NUM_CANDIDATES = 256
"""Rows with top_k, top_p or min_p look at this many best tokens first; only a row that needs more is sorted whole."""

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """One token a row, with log-probabilities for the rows that asked for them."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


class Sampler:
    """Sampling parameters of the running sequences by slot, and the choice itself."""

    def __init__(self, *, max_num_seqs: int, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._temperature = np.ones(max_num_seqs, dtype=np.float32)
        self._top_k = np.zeros(max_num_seqs, dtype=np.int64)
        self._top_p = np.ones(max_num_seqs, dtype=np.float32)
        self._min_p = np.zeros(max_num_seqs, dtype=np.float32)
        self._seed = np.zeros(max_num_seqs, dtype=np.uint64)
        self._num_logprobs = np.full(max_num_seqs, -1, dtype=np.int64)
        self.steps: tuple[LogitsStep, ...] = (
            LogitBias(),
            Penalties(vocab_size),
            MinTokens(eos_token_ids),
        )

    def add(self, sequence: AddedSequence) -> None:
        """Take over a sequence's parameters for its slot."""
        slot, sampling = sequence.slot, sequence.sampling
        self._temperature[slot] = 0.0 if sampling.is_greedy else sampling.temperature
        self._top_k[slot] = max(sampling.top_k, 0)
        self._top_p[slot] = sampling.top_p
        self._min_p[slot] = sampling.min_p
        self._seed[slot] = sequence.seed & 0xFFFF_FFFF_FFFF_FFFF
        self._num_logprobs[slot] = -1 if sampling.logprobs is None else sampling.logprobs
        for step in self.steps:
            step.add(sequence)

    def remove(self, slot: int) -> None:
        """Forget a slot."""
        for step in self.steps:
            step.remove(slot)

    def sample(self, logits: torch.Tensor, slots: IntArray, positions: IntArray) -> SamplerOutput:
        """Choose one token for each row.

        Args:
            logits: [R, V] float32 or float64; overwritten.
            slots: [R] slot of each row.
            positions: [R] index the new token will have in its sequence.
        """
        wanted = self._num_logprobs[slots]
        raw = logits.clone() if (wanted >= 0).any() and any(step.touches(slots) for step in self.steps) else logits
        for step in self.steps:
            step.apply(logits, slots)
        token_ids = self._choose(logits, slots, positions)
        logprobs: list[TokenLogprobs | None] = [None] * len(slots)
        rows = np.flatnonzero(wanted >= 0)
        if len(rows):
            found = gather_logprobs(raw[rows], token_ids[rows], int(wanted[rows].max()), wanted[rows].tolist())
            for row, value in zip(rows.tolist(), found, strict=True):
                logprobs[row] = value
        for step in self.steps:
            step.accept(slots, token_ids)
        return SamplerOutput(token_ids.tolist(), logprobs)

    def _choose(self, logits: torch.Tensor, slots: IntArray, positions: IntArray) -> torch.Tensor:
        """[R] token ids."""
        random_rows = np.flatnonzero(self._temperature[slots] > 0)
        if len(random_rows) == 0:
            return logits.argmax(-1)
        token_ids = torch.empty(len(slots), dtype=torch.int64, device=logits.device)
        greedy_rows = np.flatnonzero(self._temperature[slots] == 0)
        if len(greedy_rows):
            token_ids[greedy_rows] = logits[greedy_rows].argmax(-1)
        chosen = slots[random_rows]
        filters = Filters(
            top_k=torch.from_numpy(self._top_k[chosen]),
            top_p=torch.from_numpy(self._top_p[chosen]),
            min_p=torch.from_numpy(self._min_p[chosen]),
        )
        temperature = torch.from_numpy(self._temperature[chosen]).unsqueeze(1).to(logits.device)
        uniform = torch.from_numpy(uniform_at(self._seed[chosen], positions[random_rows]))
        probs = torch.softmax(logits[random_rows] / temperature, -1)
        token_ids[random_rows] = draw(probs, filters, uniform)
        return token_ids


@dataclass(frozen=True, slots=True)
class Filters:
    """Which tokens of each row stay in the draw: min_p, then top_k, then top_p, as in vLLM."""

    top_k: torch.Tensor
    """[R] int64; 0 keeps all."""
    top_p: torch.Tensor
    """[R]."""
    min_p: torch.Tensor
    """[R]."""

    def rows(self, index: torch.Tensor) -> Filters:
        """The filters of some rows."""
        return Filters(self.top_k[index], self.top_p[index], self.min_p[index])

    @property
    def is_active(self) -> torch.Tensor:
        """[R] bool: the row filters at all."""
        return (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)


def draw(probs: torch.Tensor, filters: Filters, uniform: torch.Tensor) -> torch.Tensor:
    """Draw one token a row from the filtered distribution by inverting its cumulative sum.

    Args:
        probs: [R, V], rows sum to 1.
        filters: of the R rows.
        uniform: [R] float64 in [0, 1).

    Returns:
        [R] int64.
    """
    out = torch.empty(probs.shape[0], dtype=torch.int64, device=probs.device)
    filters = Filters(*(x.to(probs.device) for x in (filters.top_k, filters.top_p, filters.min_p)))
    uniform = uniform.to(probs.device)
    is_active = filters.is_active
    plain = (~is_active).nonzero().squeeze(1)
    if len(plain):
        out[plain] = _invert(probs[plain], uniform[plain])
    todo = is_active.nonzero().squeeze(1)
    num_candidates = min(max(NUM_CANDIDATES, int(filters.top_k.max())), probs.shape[1])
    while len(todo):
        drawn, is_certain = _draw_filtered(probs[todo], filters.rows(todo), uniform[todo], num_candidates)
        out[todo[is_certain]] = drawn[is_certain]
        todo = todo[~is_certain]
        num_candidates = probs.shape[1]
    return out


def _draw_filtered(
    probs: torch.Tensor, filters: Filters, uniform: torch.Tensor, num_candidates: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw among the best num_candidates tokens: (token ids [R], whether the filters keep none beyond them [R])."""
    best, ids = probs.topk(num_candidates, dim=-1)
    best = best.double()
    rank = torch.arange(num_candidates, device=probs.device)
    limit = torch.where(filters.top_k > 0, filters.top_k, probs.shape[1]).unsqueeze(1)
    kept = (best >= filters.min_p.unsqueeze(1) * best[:, :1]) & (rank < limit)
    # The mass that top_p is a share of is known if min_p or top_k cut here, or if nothing but top_p filters.
    is_cut = ~kept[:, -1] | (limit.squeeze(1) <= num_candidates) | (num_candidates == probs.shape[1])
    mass = torch.where(is_cut, (best * kept).sum(-1), 1.0)
    before = best.cumsum(-1) - best
    in_nucleus = (before < (filters.top_p.double() * mass).unsqueeze(1)) | (rank == 0)
    is_certain = is_cut | (~in_nucleus[:, -1] & (filters.min_p == 0))
    position = _invert(best * (kept & in_nucleus), uniform)
    return ids.gather(1, position.unsqueeze(1)).squeeze(1), is_certain


def _invert(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """[R, n] non-negative weights, [R] uniform numbers -> [R] index of the weight each number falls on."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    target = uniform * cumulative[:, -1]
    index = torch.searchsorted(cumulative, target.unsqueeze(1), right=True).squeeze(1)
    return index.clamp_(max=weights.shape[1] - 1)


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


def gather_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int, wanted: list[int]
) -> list[TokenLogprobs]:
    """Log-probabilities of the given tokens and of the most likely ones.

    Args:
        logits: [R, V], as the model gave them.
        token_ids: [R].
        num_top: most alternatives any row wants. wanted: [R] how many each wants.
    """
    logprobs = torch.log_softmax(logits, -1)
    chosen = logprobs.gather(1, token_ids.to(logits.device).unsqueeze(1)).squeeze(1).tolist()
    values, ids = (x.tolist() for x in logprobs.topk(num_top, dim=-1)) if num_top else ([[]] * len(wanted),) * 2
    return [
        TokenLogprobs(
            chosen=Logprob(token_id, logprob),
            top=tuple(Logprob(i, v) for i, v in zip(row_ids[:count], row_values[:count], strict=True)),
        )
        for token_id, logprob, row_ids, row_values, count in zip(
            token_ids.tolist(), chosen, ids, values, wanted, strict=True
        )
    ]
