"""What runs in the next step: tokens of which sequences, in which blocks, in which rows. No torch."""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from dataclasses import dataclass, field

from apt_core.errors import InvalidRequestError
from apt_serve.engine.block_manager import BlockManager
from apt_serve.engine.executor import num_slots
from apt_serve.engine.policy import Policy
from apt_serve.engine.sequence import Sequence
from apt_serve.engine.step import AddedSequence, ScheduledSequence, SequenceOutput, StepInput, StepOutput


@dataclass(slots=True)
class _Plan:
    """The step under construction."""

    weight_version: str
    """Only sequences that run on these weights can be part of it."""
    budget: int
    """Tokens it can still take."""
    added: list[AddedSequence] = field(default_factory=list)
    single: list[ScheduledSequence] = field(default_factory=list)
    """Sequences with one token, which come first."""
    chunks: list[ScheduledSequence] = field(default_factory=list)
    has_preempted: bool = False
    is_closed: bool = False
    """Nobody else may join: the next in line does not fit, and nobody overtakes."""

    def take(self, seq: Sequence, num_tokens: int, new_block_ids: tuple[int, ...]) -> None:
        """Schedule the sequence's next tokens."""
        start, num_there = seq.num_computed_tokens, seq.num_tokens
        samples = start + num_tokens == num_there and num_there - seq.num_prompt_tokens < seq.max_tokens
        scheduled = ScheduledSequence(seq.slot, seq.seq_id, start, num_tokens, new_block_ids, samples)
        (self.single if num_tokens == 1 else self.chunks).append(scheduled)
        self.budget -= num_tokens
        seq.num_computed_tokens += num_tokens
        seq.num_in_flight += samples


class Scheduler:
    """Fills each step's token budget; there is no prefill phase and no decode phase.

    A step serves sequences in the policy's order: running ones first, then waiting ones while budget, slots and blocks
    last. Each takes as many of its uncomputed tokens as the budget allows, less one for every running sequence after
    it, so that no stream stands still while another's long prompt is computed.

    When a running sequence finds no block for even one token, the last running sequence is preempted: its blocks are
    freed and it waits again, to be recomputed. The last one itself pauses in place of being preempted; it holds what it
    has until a sequence before it finishes or needs it. Whoever is served first can take every block there is, and
    ``add`` refuses what would not fit even then, so there is always progress.

    A waiting sequence joins when all of its tokens fit, with a block to spare for each running sequence, lest a
    preemption undo it at once. If the policy lets it displace running ones, it is served before them, and preempts from
    the last one on if it lacks a place or blocks that they can supply. Nobody overtakes the first that does not fit.

    A step has sequences of one weight version. While there are several, versions take turns; whose turn it is not keeps
    what it holds, but ranks with all others where room is made. As the first of all can take every block in its turn,
    there is progress then, too.

    A step may be scheduled while steps before it are under way: sequences count the tokens in flight, and a slot that
    was given up goes to nobody until every step that names it has been taken in.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        block_manager: BlockManager,
        policy: Policy,
        max_steps_in_flight: int = 1,
    ) -> None:
        assert 0 < max_num_seqs <= max_num_batched_tokens, "every running sequence must get a token in every step"
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._blocks = block_manager
        self._policy = policy
        self._sequences: dict[str, Sequence] = {}
        self._num_on: dict[str, int] = {}
        """Sequences on each weight version that has any, the version whose turn comes next first."""
        self._waiting = policy.make_queue()
        self._running: list[Sequence] = []
        """In the policy's order."""
        self._free_slots = list(range(num_slots(max_num_seqs, max_steps_in_flight)))
        """A heap: low slots are used first, so that rows stay dense."""
        self._retired_slots: deque[tuple[int, int]] = deque()
        """Given up while steps were under way: the number of the last of these, and the slot."""
        self._num_scheduled_steps = 0
        self._num_finished_steps = 0
        """Taken in, or failed."""
        self._removed_slots: list[int] = []
        self._refusal: tuple[Sequence, int] | None = None
        """Who last found no blocks to join, and how many were free."""

        self.num_preemptions = 0
        self.num_prefix_cache_queries = 0
        """Prompt tokens looked up in the prefix cache, once for each sequence."""
        self.num_prefix_cache_hits = 0
        """Of these, tokens found."""
        self.first_scheduled: list[Sequence] = []
        """Sequences that the latest step schedules for the first time."""

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a slot, new or preempted."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether any sequence runs or waits."""
        return bool(self._sequences)

    def add(self, seq: Sequence) -> None:
        """Let a new sequence wait for its turn.

        Raises:
            InvalidRequestError: the KV cache could not hold it even if it ran alone.
        """
        assert seq.seq_id not in self._sequences, f"{seq.seq_id} exists already"
        longest = seq.num_prompt_tokens + seq.max_tokens
        assert seq.num_prompt_tokens > 0 and longest <= self._max_model_len
        # The last token is only read: its keys and values are never computed.
        num_blocks = self._blocks.num_blocks_for(max(seq.num_tokens, longest - 1))
        if num_blocks > self._blocks.num_blocks:
            raise InvalidRequestError(
                f"prompt ({seq.num_prompt_tokens}) and max_tokens ({seq.max_tokens}) need {num_blocks} KV-cache blocks "
                f"of {self._blocks.block_size} tokens; there are {self._blocks.num_blocks}",
                param="max_tokens",
            )
        self._sequences[seq.seq_id] = seq
        self._num_on[seq.weight_version] = self._num_on.get(seq.weight_version, 0) + 1
        self._waiting.push(seq)

    def abort(self, seq_id: str) -> Sequence | None:
        """Drop a sequence wherever it is and free all it holds; None if it is not here (any more)."""
        seq = self._sequences.get(seq_id)
        if seq is not None:
            self.finish(seq)
        return seq

    def finish(self, seq: Sequence) -> None:
        """Free the blocks and the slot of a sequence that needs no further step."""
        del self._sequences[seq.seq_id]
        self._num_on[seq.weight_version] -= 1
        if not self._num_on[seq.weight_version]:
            del self._num_on[seq.weight_version]
        if seq.slot < 0:
            self._waiting.discard(seq)
        else:
            self._stop_running(seq)

    def schedule(self) -> StepInput | None:
        """The next step, or None if there is nothing to compute."""
        self.first_scheduled = []
        while self._retired_slots and self._retired_slots[0][0] <= self._num_finished_steps:
            heapq.heappush(self._free_slots, self._retired_slots.popleft()[1])
        for weight_version in list(self._num_on):
            plan = self._fill(_Plan(weight_version, self._max_num_batched_tokens))
            if plan.single or plan.chunks:
                self._end_turn(weight_version)
                self._num_scheduled_steps += 1
                removed, self._removed_slots = tuple(self._removed_slots), []
                return StepInput(tuple(plan.added), (*plan.single, *plan.chunks), removed, weight_version)
        return None

    def num_on(self, weight_version: str) -> int:
        """Sequences, running and waiting, on these weights."""
        return self._num_on.get(weight_version, 0)

    def _end_turn(self, weight_version: str) -> None:
        if len(self._num_on) > 1:
            self._num_on[weight_version] = self._num_on.pop(weight_version)

    def _fill(self, plan: _Plan) -> _Plan:
        """Schedule what can run on the plan's weights."""
        pending = deque(self._running)
        is_mixed = len(self._num_on) > 1
        while True:
            newcomer = self._next_to_join(pending, plan)
            if newcomer is not None:
                self._join(newcomer, pending, plan)
            elif pending:
                seq = pending.popleft()
                if not is_mixed or seq.weight_version == plan.weight_version:
                    self._continue(seq, pending, plan)
            else:
                return plan

    def update(self, step: StepInput, output: StepOutput) -> list[tuple[Sequence, SequenceOutput]]:
        """Take in what the oldest step under way computed; sequences that have left meanwhile are skipped."""
        self._num_finished_steps += 1
        results = []
        for scheduled, result in zip(step.scheduled, output.outputs, strict=True):
            seq = self._sequences.get(scheduled.seq_id)
            if seq is None or seq.slot != scheduled.slot:
                continue
            assert result.seq_id == seq.seq_id and (scheduled.samples or not result.token_ids)
            if scheduled.samples:
                seq.num_in_flight -= 1
                seq.token_ids.extend(result.token_ids)
                self._blocks.learn(seq, len(result.token_ids))
                self._waiting.charge(seq, num_output_tokens=len(result.token_ids))
            results.append((seq, result))
        return results

    def fail_step(self, step: StepInput) -> list[Sequence]:
        """Drop every sequence of a step that raised, and all cached prefixes: some may never have been computed.

        The next step names the failed one's removed slots again, as it is unknown whether the runner got to them. So
        the steps launched after it must be failed as well.
        """
        self._num_finished_steps += 1
        failed = [seq for s in step.scheduled if (seq := self._sequences.get(s.seq_id)) and seq.slot == s.slot]
        for seq in failed:
            self.finish(seq)
        self._blocks.reset_prefix_cache()
        self._removed_slots = list(dict.fromkeys((*step.removed_slots, *self._removed_slots)))
        return failed

    def _next_to_join(self, pending: deque[Sequence], plan: _Plan) -> Sequence | None:
        """The waiting sequence that is served before ``pending``, the running sequences not yet served."""
        if plan.is_closed or (plan.has_preempted and not pending):
            return None
        first = self._waiting.peek()
        if first is None or (pending and not self._policy.may_displace(first, pending[0])):
            return None
        return first if first.weight_version == plan.weight_version else None

    def _join(self, seq: Sequence, pending: deque[Sequence], plan: _Plan) -> None:
        """Let a waiting sequence run, if it can be given what it needs."""
        matched = self._make_room(seq, pending, plan)
        if matched is None:
            plan.is_closed = True
            return
        self._waiting.pop()
        self._blocks.acquire(seq, matched)
        seq.slot = heapq.heappop(self._free_slots)
        insort(self._running, seq, key=self._policy.rank)
        if not seq.has_been_scheduled:
            self._note_first_schedule(seq)
        plan.added.append(
            AddedSequence(
                slot=seq.slot,
                seq_id=seq.seq_id,
                token_ids=tuple(seq.token_ids),
                num_prompt_tokens=seq.num_prompt_tokens,
                sampling=seq.sampling,
                seed=seq.seed,
                block_ids=tuple(matched),
            )
        )
        num_tokens = min(seq.num_uncomputed_tokens, plan.budget - len(pending))
        new_blocks = self._blocks.allocate(seq, num_tokens)
        assert new_blocks is not None
        plan.take(seq, num_tokens, new_blocks)

    def _make_room(self, seq: Sequence, pending: deque[Sequence], plan: _Plan) -> list[int] | None:
        """Cached blocks from which the sequence can start now, or None if it has to wait on.

        Preempts from the end of ``pending`` where the policy lets the sequence go before them; not if that would not
        be enough.
        """
        if plan.budget <= len(pending) or not (self._has_place or pending):
            return None
        if self._was_refused(seq):
            return None
        while True:
            matched = self._blocks.match_prefix(seq)
            num_spare = len(self._running)
            missing = self._blocks.num_blocks_to_take(seq, matched) + num_spare - self._blocks.num_free_blocks
            if self._has_place and missing <= 0:
                return matched
            if not pending or missing > sum(len(other.block_ids) + 1 for other in pending):
                self._refusal = (seq, self._blocks.num_free_blocks)
                return None
            self._preempt(pending.pop(), plan)

    @property
    def _has_place(self) -> bool:
        return len(self._running) < self._max_num_seqs

    def _was_refused(self, seq: Sequence) -> bool:
        """Whether it lacked blocks before and no more are free now: saves looking up a long prefix in every step."""
        if self._refusal is None:
            return False
        refused, num_free = self._refusal
        return refused is seq and self._blocks.num_free_blocks <= num_free

    def _continue(self, seq: Sequence, pending: deque[Sequence], plan: _Plan) -> None:
        """Give a running sequence its share; if there is no block for it, preempt from the end of ``pending``."""
        if seq.awaits_its_end:
            return
        num_tokens = min(seq.num_uncomputed_tokens, plan.budget - len(pending))
        assert num_tokens > 0
        while (new_blocks := self._blocks.allocate(seq, num_tokens)) is None:
            if num_fitting := self._blocks.num_tokens_that_fit(seq):
                num_tokens = num_fitting
            elif pending:
                self._preempt(pending.pop(), plan)
            else:
                return  # it pauses; as no block is free, nobody else can join either
        plan.take(seq, num_tokens, new_blocks)

    def _note_first_schedule(self, seq: Sequence) -> None:
        seq.has_been_scheduled = True
        seq.num_cached_tokens = seq.num_computed_tokens
        self.first_scheduled.append(seq)
        self._waiting.charge(seq, num_prompt_tokens=seq.num_prompt_tokens - seq.num_cached_tokens)
        if self._blocks.is_looked_up(seq):
            self.num_prefix_cache_queries += seq.num_prompt_tokens
            self.num_prefix_cache_hits += seq.num_cached_tokens

    def _preempt(self, seq: Sequence, plan: _Plan) -> None:
        plan.has_preempted = True
        self.num_preemptions += 1
        self._stop_running(seq)
        self._waiting.push(seq)

    def _stop_running(self, seq: Sequence) -> None:
        self._blocks.free(seq)
        seq.num_computed_tokens = seq.num_in_flight = 0
        self._running.remove(seq)
        if self._num_finished_steps == self._num_scheduled_steps:
            heapq.heappush(self._free_slots, seq.slot)
        else:
            self._retired_slots.append((self._num_scheduled_steps, seq.slot))
        self._removed_slots.append(seq.slot)
        seq.slot = -1
