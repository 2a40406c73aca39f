"""The scheduler against a simulated runner that remembers which token, after which others, every place of the KV cache
holds: whatever attention would read must have been written for exactly this prefix."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from zlib import crc32

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from apt_serve.engine.block_manager import BlockManager
from apt_serve.engine.executor import num_slots
from apt_serve.engine.policy import make_policy
from apt_serve.engine.sampling_params import SamplingParams
from apt_serve.engine.scheduler import Scheduler
from apt_serve.engine.sequence import Sequence
from apt_serve.engine.step import AddedSequence, ScheduledSequence, SequenceOutput, StepInput, StepOutput

MAX_MODEL_LEN = 40
STOP_TOKEN = 3
Prefix = tuple[tuple[str, ...], tuple[int, ...]]
"""Weight version, extra keys, and all tokens up to a position: what keys and values at that position depend on."""


def keys_of(seq: Sequence) -> tuple[str, ...]:
    """What they depend on beside tokens."""
    return (seq.weight_version, *seq.extra_keys)


def next_token(prefix: Prefix) -> int:
    """The "model": few tokens, so that sequences often coincide; now and then the stop token."""
    return (0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, STOP_TOKEN)[crc32(repr(prefix).encode()) % 12]


def continuation(prompt: list[int], keys: tuple[str, ...], max_tokens: int) -> list[int]:
    """The output that no batching, caching or preemption may change."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens and (len(tokens) == len(prompt) or tokens[-1] != STOP_TOKEN):
        tokens.append(next_token((keys, tuple(tokens))))
    return tokens[len(prompt) :]


class SimulatedFault(Exception):
    """A step that raised."""


@dataclass
class Row:
    added: AddedSequence
    token_ids: list[int]
    block_ids: list[int]
    keys: tuple[str, ...]


@dataclass
class SimulatedRunner:
    """Keeps rows as the model runner does, and prefixes in place of keys and values. It knows the tokens that the
    scheduler does not know yet."""

    max_num_seqs: int
    max_steps_in_flight: int
    budget: int
    block_size: int
    rows: dict[int, Row] = field(default_factory=dict)
    cache: dict[tuple[int, int], Prefix] = field(default_factory=dict)
    """By block and offset."""

    def run(self, step: StepInput, sequences: dict[str, Sequence], fault: int | None = None) -> StepOutput:
        """``fault``: raise before anything (0), with rows updated (1), or with everything written (2)."""
        self.check(step)
        if fault == 0:
            raise SimulatedFault
        for slot in step.removed_slots:
            self.rows.pop(slot, None)
        for added in step.added:
            assert added.slot not in self.rows, "a slot was given away before its row was removed"
            assert added.num_prompt_tokens == sequences[added.seq_id].num_prompt_tokens
            keys = keys_of(sequences[added.seq_id])
            self.rows[added.slot] = Row(added, list(added.token_ids), list(added.block_ids), keys)
        if fault == 1:
            raise SimulatedFault
        for s in step.scheduled:
            self.write(s, step.weight_version, spoil=fault is not None)
        if fault is not None:
            raise SimulatedFault
        return StepOutput(tuple(self.read_and_sample(s) for s in step.scheduled))

    def check(self, step: StepInput) -> None:
        assert 0 < step.num_tokens <= self.budget
        slots = [s.slot for s in step.scheduled]
        assert len(set(slots)) == len(slots) <= self.max_num_seqs
        assert set(slots) <= set(range(num_slots(self.max_num_seqs, self.max_steps_in_flight)))
        is_longer = [s.num_tokens > 1 for s in step.scheduled]
        assert is_longer == sorted(is_longer)
        assert {a.slot for a in step.added} <= set(slots)
        assert len(set(step.removed_slots)) == len(step.removed_slots)

    def write(self, s: ScheduledSequence, weight_version: str, *, spoil: bool) -> None:
        row = self.rows[s.slot]
        assert row.added.seq_id == s.seq_id
        assert row.keys[0] == weight_version, "a step has sequences of one version"
        row.block_ids.extend(s.new_block_ids)
        for position in range(s.start, s.start + s.num_tokens):
            tokens = (-1,) if spoil else tuple(row.token_ids[: position + 1])
            self.cache[self.place(row, position)] = (row.keys, tokens)

    def read_and_sample(self, s: ScheduledSequence) -> SequenceOutput:
        row = self.rows[s.slot]
        end = s.start + s.num_tokens
        for position in range(end):
            expected = (row.keys, tuple(row.token_ids[: position + 1]))
            assert self.cache[self.place(row, position)] == expected, f"{s.seq_id} reads what is not its own"
        assert not s.samples or end == len(row.token_ids)
        if not s.samples:
            return SequenceOutput(s.seq_id, (), end)
        row.token_ids.append(next_token((row.keys, tuple(row.token_ids))))
        return SequenceOutput(s.seq_id, (row.token_ids[-1],), end)

    def place(self, row: Row, position: int) -> tuple[int, int]:
        return row.block_ids[position // self.block_size], position % self.block_size


class SchedulerMachine(RuleBasedStateMachine):
    """Random arrivals, steps, aborts and faults; then everything left must finish, correctly."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[str, Sequence] = {}
        self.in_flight: deque[tuple[StepInput, StepOutput]] = deque()
        self.num_added = 0
        self.num_finished = 0

    @initialize(
        block_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 4),
        extra_budget=st.integers(0, 12),
        extra_blocks=st.integers(0, 6),
        caching=st.booleans(),
        policy=st.sampled_from(["fcfs", "priority", "fair"]),
        max_steps_in_flight=st.integers(1, 3),
    )
    def build(
        self,
        block_size: int,
        max_num_seqs: int,
        extra_budget: int,
        extra_blocks: int,
        caching: bool,
        policy: str,
        max_steps_in_flight: int,
    ) -> None:
        self.budget = max_num_seqs + extra_budget
        # Room for the longest sequence below, alone, and not much more; outputs are long, so that many runs preempt.
        self.blocks = BlockManager(-(-24 // block_size) + extra_blocks, block_size, caching)
        self.runner = SimulatedRunner(max_num_seqs, max_steps_in_flight, self.budget, block_size)
        self.scheduler = Scheduler(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=self.budget,
            max_model_len=MAX_MODEL_LEN,
            block_manager=self.blocks,
            policy=make_policy(policy),
            max_steps_in_flight=max_steps_in_flight,
        )

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=8),
        max_tokens=st.integers(0, 17),
        priority=st.integers(0, 2),
        tenant=st.sampled_from(["a", "a", "b", "c"]),
        keys=st.sampled_from([(), (), ("salt",)]),
        weights=st.sampled_from(["1-a", "1-a", "1-a", "2-b", "3-c"]),
        is_scored=st.booleans(),
        num_choices=st.integers(1, 3),
    )
    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        priority: int,
        tenant: str,
        keys: tuple[str, ...],
        weights: str,
        is_scored: bool,
        num_choices: int,
    ) -> None:
        for index in range(num_choices):
            seq = Sequence(
                f"{self.num_added}-{index}",
                list(prompt),
                len(prompt),
                SamplingParams(prompt_logprobs=0 if is_scored and index == 0 else None),
                seed=0,
                max_tokens=max_tokens,
                index=index,
                priority=priority,
                arrival_order=self.num_added,
                tenant=tenant,
                extra_keys=keys,
                weight_version=weights,
            )
            self.live[seq.seq_id] = seq
            self.scheduler.add(seq)
        self.num_added += 1

    @rule(num_steps=st.integers(1, 6))
    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.step()

    @precondition(lambda self: self.live)
    @rule(fault=st.integers(0, 2))
    def fail(self, fault: int) -> None:
        step = self.scheduler.schedule()
        if step is None:
            return
        with pytest.raises(SimulatedFault):
            self.runner.run(step, self.live, fault)
        under_way = [*(launched for launched, _ in self.in_flight), step]
        self.in_flight.clear()
        affected = {s.seq_id for launched in under_way for s in launched.scheduled if self.is_live(s)}
        failed = [seq for launched in under_way for seq in self.scheduler.fail_step(launched)]
        assert sorted(seq.seq_id for seq in failed) == sorted(affected)
        for seq in failed:
            del self.live[seq.seq_id]

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.live)))
        assert self.scheduler.abort(seq_id) is self.live.pop(seq_id)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort_during_a_step(self, data: st.DataObject) -> None:
        self.launch()
        self.abort(data)
        self.take_in()

    def step(self) -> None:
        """As the engine steps."""
        if not self.launch() or len(self.in_flight) == self.runner.max_steps_in_flight:
            self.take_in()

    def launch(self) -> bool:
        step = self.scheduler.schedule()
        if step is None:
            assert self.in_flight or not self.live, "whenever there is work, a step does some of it"
            return False
        used = {s.slot for launched, _ in self.in_flight for s in launched.scheduled}
        assert used.isdisjoint(added.slot for added in step.added), "a slot was given away while a step names it"
        self.in_flight.append((step, self.runner.run(step, self.live)))
        return True

    def is_live(self, s: ScheduledSequence) -> bool:
        return s.seq_id in self.live and self.live[s.seq_id].slot == s.slot

    def take_in(self) -> None:
        if not self.in_flight:
            return
        step, output = self.in_flight.popleft()
        expected = [s.seq_id for s in step.scheduled if self.is_live(s)]
        results = self.scheduler.update(step, output)
        assert [seq.seq_id for seq, _ in results] == expected
        for seq, result in results:
            is_stopped = result.token_ids == (STOP_TOKEN,)
            if result.num_computed_tokens >= seq.num_prompt_tokens and (
                is_stopped or seq.num_output_tokens == seq.max_tokens
            ):
                self.finish(seq)

    def finish(self, seq: Sequence) -> None:
        prompt, output = seq.token_ids[: seq.num_prompt_tokens], seq.token_ids[seq.num_prompt_tokens :]
        assert output == continuation(prompt, keys_of(seq), seq.max_tokens)
        assert not (seq.wants_prompt_logprobs and seq.num_cached_tokens)
        self.scheduler.finish(seq)
        del self.live[seq.seq_id]
        self.num_finished += 1

    @invariant()
    def what_is_counted_is_there(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        held = Counter(block for seq in self.live.values() for block in seq.block_ids)
        assert self.blocks._num_references == [held[block] for block in range(self.blocks.num_blocks)]
        running = [seq for seq in self.live.values() if seq.slot >= 0]
        assert self.scheduler.num_running == len(running) <= self.runner.max_num_seqs
        assert self.scheduler.num_running + self.scheduler.num_waiting == len(self.live)
        assert self.scheduler._running == sorted(running, key=self.scheduler._policy.rank)
        assert all(seq.block_ids == [] for seq in self.live.values() if seq.slot < 0)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        # Whoever is first in line gets at least a token in every step, and without arrivals nobody comes before it.
        bound = sum(2 * seq.num_prompt_tokens + seq.max_tokens for seq in self.live.values()) * 2
        for _ in range(bound * self.runner.max_steps_in_flight + len(self.in_flight)):
            self.step()
        assert not self.live, "sequences starve"
        assert self.blocks.num_free_blocks == self.blocks.num_blocks
        slots = [*self.scheduler._free_slots, *(slot for _, slot in self.scheduler._retired_slots)]
        assert sorted(slots) == list(range(num_slots(self.runner.max_num_seqs, self.runner.max_steps_in_flight)))


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
