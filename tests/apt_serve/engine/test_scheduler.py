from __future__ import annotations

from itertools import count

import pytest

from apt_core.errors import InvalidRequestError
from apt_serve.engine.block_manager import BlockManager
from apt_serve.engine.policy import make_policy
from apt_serve.engine.sampling_params import SamplingParams
from apt_serve.engine.scheduler import Scheduler
from apt_serve.engine.sequence import Sequence
from apt_serve.engine.step import SequenceOutput, StepInput, StepOutput

_order = count()


def make_scheduler(
    *,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 16,
    max_model_len: int = 64,
    num_blocks: int = 32,
    block_size: int = 4,
    caching: bool = True,
    policy: str = "fcfs",
) -> Scheduler:
    return Scheduler(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        block_manager=BlockManager(num_blocks, block_size, caching),
        policy=make_policy(policy),
    )


def make_sequence(num_tokens: int, max_tokens: int = 8, *, priority: int = 0, first: int | None = None) -> Sequence:
    """A prompt like no other, unless ``first`` says where its numbers begin."""
    order = next(_order)
    first = 1000 * (order + 1) if first is None else first
    prompt = list(range(first, first + num_tokens))
    return Sequence(
        f"seq-{order}",
        prompt,
        num_tokens,
        SamplingParams(),
        seed=0,
        max_tokens=max_tokens,
        priority=priority,
        arrival_order=order,
    )


def add(scheduler: Scheduler, *sequences: Sequence) -> None:
    for seq in sequences:
        scheduler.add(seq)


def schedule(scheduler: Scheduler) -> StepInput:
    step = scheduler.schedule()
    assert step is not None
    return step


def run(scheduler: Scheduler, *, finish: bool = True) -> StepInput:
    """One step whose every sampled token is 7; sequences that have all their tokens finish."""
    step = schedule(scheduler)
    outputs = tuple(SequenceOutput(s.seq_id, (7,) if s.samples else (), s.start + s.num_tokens) for s in step.scheduled)
    for seq, _ in scheduler.update(step, StepOutput(outputs)):
        if finish and seq.num_output_tokens >= seq.max_tokens and seq.num_computed_tokens >= seq.num_prompt_tokens:
            scheduler.finish(seq)
    return step


def tokens_of(step: StepInput) -> dict[str, int]:
    return {s.seq_id: s.num_tokens for s in step.scheduled}


def test_nothing_to_do_gives_no_step() -> None:
    scheduler = make_scheduler()
    assert scheduler.schedule() is None
    assert not scheduler.has_work


def test_a_short_prompt_is_computed_at_once_and_then_one_token_a_step() -> None:
    scheduler, seq = make_scheduler(), make_sequence(5, max_tokens=3)
    add(scheduler, seq)
    first, second, third = run(scheduler), run(scheduler), run(scheduler)
    assert [(s.start, s.num_tokens, s.samples) for step in (first, second, third) for s in step.scheduled] == [
        (0, 5, True),
        (5, 1, True),
        (6, 1, True),
    ]
    assert seq.token_ids[5:] == [7, 7, 7]
    assert scheduler.schedule() is None and not scheduler.has_work


def test_a_long_prompt_is_computed_in_chunks_and_samples_after_the_last() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add(scheduler, make_sequence(20))
    assert [(s.num_tokens, s.samples) for s in (run(scheduler).scheduled[0] for _ in range(3))] == [
        (8, False),
        (8, False),
        (4, True),
    ]


def test_running_sequences_and_chunks_share_a_step_with_single_tokens_first() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    short, long = make_sequence(3), make_sequence(20)
    add(scheduler, short)
    run(scheduler)
    add(scheduler, long)
    step = run(scheduler)
    assert [(s.seq_id, s.num_tokens) for s in step.scheduled] == [(short.seq_id, 1), (long.seq_id, 7)]


def test_a_single_token_prompt_comes_before_chunks() -> None:
    scheduler = make_scheduler()
    chunk, single = make_sequence(5), make_sequence(1)
    add(scheduler, chunk, single)
    assert [s.seq_id for s in schedule(scheduler).scheduled] == [single.seq_id, chunk.seq_id]


def test_no_stream_stands_still_while_a_prompt_before_it_is_computed() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8, policy="priority")
    stream, prompt = make_sequence(2, priority=1), make_sequence(30, priority=0)
    add(scheduler, stream)
    run(scheduler)
    add(scheduler, prompt)
    for _ in range(4):
        assert tokens_of(run(scheduler)) == {prompt.seq_id: 7, stream.seq_id: 1}


def test_sequences_beyond_the_slots_wait() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    first, second, third = (make_sequence(2, max_tokens=2) for _ in range(3))
    add(scheduler, first, second, third)
    assert [a.slot for a in run(scheduler).added] == [0, 1]
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
    run(scheduler)
    step = run(scheduler)
    assert step.removed_slots == (0, 1)
    assert [(a.seq_id, a.slot) for a in step.added] == [(third.seq_id, 0)]


def test_the_lowest_free_slot_is_used_first() -> None:
    scheduler = make_scheduler()
    sequences = [make_sequence(2) for _ in range(3)]
    add(scheduler, *sequences)
    run(scheduler)
    scheduler.abort(sequences[2].seq_id)
    scheduler.abort(sequences[0].seq_id)
    add(scheduler, make_sequence(2), make_sequence(2))
    assert [a.slot for a in run(scheduler).added] == [0, 2]


def test_removed_slots_wait_for_a_step_that_has_something_to_compute() -> None:
    scheduler, seq = make_scheduler(), make_sequence(2)
    add(scheduler, seq)
    run(scheduler)
    assert scheduler.abort(seq.seq_id) is seq
    assert scheduler.schedule() is None
    add(scheduler, make_sequence(2))
    assert schedule(scheduler).removed_slots == (0,)


def test_max_tokens_zero_never_samples() -> None:
    scheduler = make_scheduler()
    add(scheduler, make_sequence(5, max_tokens=0))
    assert [s.samples for s in run(scheduler).scheduled] == [False]
    assert not scheduler.has_work


def test_abort_frees_everything_at_once_wherever_the_sequence_is() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    running, waiting = make_sequence(5), make_sequence(5)
    add(scheduler, running, waiting)
    run(scheduler)
    assert scheduler.abort(waiting.seq_id) is waiting
    assert scheduler.abort(running.seq_id) is running
    assert scheduler.abort(running.seq_id) is None
    assert scheduler.abort("unknown") is None
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.has_work) == (0, 0, False)
    assert scheduler._blocks.num_used_blocks == 0


def test_outputs_of_sequences_that_left_meanwhile_are_skipped() -> None:
    scheduler = make_scheduler()
    stays, leaves = make_sequence(3), make_sequence(3)
    add(scheduler, stays, leaves)
    step = schedule(scheduler)
    scheduler.abort(leaves.seq_id)
    output = StepOutput(tuple(SequenceOutput(s.seq_id, (7,), 3) for s in step.scheduled))
    assert [seq for seq, _ in scheduler.update(step, output)] == [stays]
    assert leaves.num_output_tokens == 0


def test_a_new_sequence_of_the_same_name_has_no_part_in_the_old_ones_step() -> None:
    scheduler, seq = make_scheduler(), make_sequence(3)
    add(scheduler, seq)
    step = schedule(scheduler)
    scheduler.abort(seq.seq_id)
    add(scheduler, seq)
    assert scheduler.update(step, StepOutput((SequenceOutput(seq.seq_id, (7,), 3),))) == []
    assert scheduler.fail_step(step) == []
    assert tokens_of(schedule(scheduler)) == {seq.seq_id: 3}


def test_several_accepted_tokens_are_taken_in() -> None:
    scheduler, seq = make_scheduler(), make_sequence(3)
    add(scheduler, seq)
    scheduler.update(schedule(scheduler), StepOutput((SequenceOutput(seq.seq_id, (7, 8), 3),)))
    assert seq.token_ids[3:] == [7, 8]
    assert tokens_of(schedule(scheduler)) == {seq.seq_id: 2}


def test_what_could_never_fit_is_refused() -> None:
    scheduler = make_scheduler(num_blocks=3, block_size=4)
    scheduler.add(make_sequence(10, max_tokens=3))  # 12 tokens are computed, the 13th is only read
    with pytest.raises(InvalidRequestError, match="need 4 KV-cache blocks of 4 tokens; there are 3") as error:
        scheduler.add(make_sequence(10, max_tokens=4))
    assert error.value.param == "max_tokens"
    with pytest.raises(InvalidRequestError):
        scheduler.add(make_sequence(13, max_tokens=0))
    assert scheduler.num_waiting == 1


def test_known_prefixes_are_not_computed_again() -> None:
    scheduler = make_scheduler()
    first, second = make_sequence(10, first=1), make_sequence(10, first=1)
    add(scheduler, first)
    run(scheduler)
    add(scheduler, second)
    step = run(scheduler)
    assert tokens_of(step) == {first.seq_id: 1, second.seq_id: 2}
    assert step.added[0].block_ids == tuple(first.block_ids[:2])
    assert second.num_cached_tokens == 8
    assert (scheduler.num_prefix_cache_queries, scheduler.num_prefix_cache_hits) == (20, 8)


def test_choices_of_one_prompt_share_it_within_the_same_step() -> None:
    scheduler = make_scheduler()
    choices = [make_sequence(9, first=1) for _ in range(3)]
    add(scheduler, *choices)
    assert [s.num_tokens for s in schedule(scheduler).scheduled] == [1, 1, 9]


def test_first_scheduled_names_each_sequence_once() -> None:
    scheduler = make_scheduler(num_blocks=4, max_num_batched_tokens=8)
    first, second = make_sequence(7), make_sequence(7)
    add(scheduler, first, second)
    seen = []
    while scheduler.has_work:
        run(scheduler)
        seen += scheduler.first_scheduled
    assert seen == [first, second]
    assert scheduler.schedule() is None and scheduler.first_scheduled == []


def test_a_newcomer_leaves_a_spare_block_to_each_running_sequence() -> None:
    scheduler = make_scheduler(num_blocks=4)
    running, newcomer = make_sequence(4), make_sequence(8)
    add(scheduler, running)
    run(scheduler)  # holds 1 block, and its next token needs another
    add(scheduler, newcomer)
    for _ in range(4):
        assert tokens_of(run(scheduler)) == {running.seq_id: 1}
    assert scheduler.num_preemptions == 0


def test_nobody_overtakes_the_first_that_does_not_fit() -> None:
    scheduler = make_scheduler(num_blocks=4)
    running, large, small = make_sequence(4), make_sequence(12, max_tokens=1), make_sequence(1)
    add(scheduler, running, large, small)
    assert tokens_of(run(scheduler)) == {running.seq_id: 4}
    assert tokens_of(run(scheduler)) == {running.seq_id: 1}


def fill_cache(policy: str = "fcfs") -> tuple[Scheduler, Sequence, Sequence]:
    """Two running sequences that have filled their blocks, of which there are no more."""
    scheduler = make_scheduler(num_blocks=4, caching=False, policy=policy)
    first, second = make_sequence(4, max_tokens=9), make_sequence(3, max_tokens=9, priority=1)
    add(scheduler, first, second)
    for _ in range(5):
        run(scheduler)
    assert scheduler._blocks.num_free_blocks == 0 and scheduler.num_preemptions == 0
    return scheduler, first, second


def test_the_last_running_sequence_gives_way_when_blocks_run_out() -> None:
    scheduler, first, second = fill_cache()
    step = run(scheduler)
    assert tokens_of(step) == {first.seq_id: 1}
    assert step.removed_slots == (1,) and scheduler.num_preemptions == 1
    assert (second.slot, second.num_computed_tokens, second.block_ids) == (-1, 0, [])
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)


def test_a_preempted_sequence_comes_back_with_what_it_had_generated() -> None:
    scheduler, first, second = fill_cache()
    run(scheduler)
    scheduler.abort(first.seq_id)
    generated = list(second.token_ids)
    step = run(scheduler)
    assert step.added[0].token_ids == tuple(generated) and step.added[0].num_prompt_tokens == 3
    assert tokens_of(step) == {second.seq_id: len(generated)}
    assert scheduler.first_scheduled == []


def test_a_preempted_sequence_keeps_its_place_in_the_queue() -> None:
    scheduler, first, second = fill_cache()
    later = make_sequence(1)
    add(scheduler, later)
    run(scheduler)
    scheduler.abort(first.seq_id)
    assert [a.seq_id for a in run(scheduler).added] == [second.seq_id, later.seq_id]


def test_nobody_joins_a_step_that_preempts() -> None:
    scheduler = make_scheduler(num_blocks=5, caching=False)
    early = make_sequence(1)
    first, second = make_sequence(4), make_sequence(8)
    add(scheduler, first, second)
    run(scheduler)
    run(scheduler)
    add(scheduler, early)  # waits for blocks, and before the second when that is preempted
    while scheduler.num_preemptions == 0:
        step = run(scheduler)
    assert tokens_of(step) == {first.seq_id: 1}
    assert [a.seq_id for a in run(scheduler).added] == [early.seq_id]


def test_the_last_running_sequence_pauses_until_a_block_is_free_or_one_before_it_needs_its_own() -> None:
    scheduler = make_scheduler(num_blocks=5, caching=False)
    first, second, last = make_sequence(4), make_sequence(4), make_sequence(3)
    add(scheduler, first, second, last)
    run(scheduler)
    assert tokens_of(run(scheduler)) == {first.seq_id: 1, second.seq_id: 1, last.seq_id: 1}
    for _ in range(3):
        assert tokens_of(run(scheduler)) == {first.seq_id: 1, second.seq_id: 1}
    assert last.num_computed_tokens == 4 and scheduler.num_preemptions == 0
    assert tokens_of(run(scheduler)) == {first.seq_id: 1}  # takes the block of the last, and the second pauses in turn
    assert scheduler.num_preemptions == 1 and last.slot == -1


def test_a_paused_sequence_goes_on_when_a_block_is_freed() -> None:
    scheduler = make_scheduler(num_blocks=5, caching=False)
    first, second, last = make_sequence(4), make_sequence(4), make_sequence(3)
    add(scheduler, first, second, last)
    for _ in range(3):
        run(scheduler)
    scheduler.abort(first.seq_id)
    assert tokens_of(run(scheduler)) == {second.seq_id: 1, last.seq_id: 1}


def test_a_chunk_shrinks_to_the_blocks_that_are_left() -> None:
    scheduler = make_scheduler(num_blocks=5, caching=False, max_num_batched_tokens=4)
    first, second = make_sequence(3, max_tokens=10), make_sequence(12, max_tokens=1)
    add(scheduler, first)
    run(scheduler)
    add(scheduler, second)
    lengths = [tokens_of(run(scheduler)) for _ in range(4)]
    assert [step[second.seq_id] for step in lengths] == [3, 3, 3, 3]


def test_an_urgent_newcomer_takes_the_slot_of_the_last() -> None:
    scheduler = make_scheduler(max_num_seqs=2, policy="priority")
    low, lowest, urgent = make_sequence(2, priority=1), make_sequence(2, priority=2), make_sequence(2, priority=0)
    add(scheduler, lowest, low)
    run(scheduler)
    add(scheduler, urgent)
    step = run(scheduler)
    assert tokens_of(step) == {low.seq_id: 1, urgent.seq_id: 2}
    assert step.removed_slots == (step.added[0].slot,)
    assert scheduler.num_preemptions == 1 and lowest.slot == -1


def test_an_urgent_newcomer_takes_the_blocks_of_the_last() -> None:
    scheduler = make_scheduler(num_blocks=6, policy="priority", caching=False)
    low, lowest, urgent = make_sequence(4, priority=1), make_sequence(8, priority=2), make_sequence(12, priority=0)
    add(scheduler, low, lowest)
    run(scheduler)
    add(scheduler, urgent)
    assert tokens_of(run(scheduler)) == {urgent.seq_id: 12, low.seq_id: 1}
    assert scheduler.num_preemptions == 1


def test_an_urgent_newcomer_keeps_its_rank_in_later_steps() -> None:
    scheduler = make_scheduler(num_blocks=4, policy="priority", caching=False)
    low, urgent = make_sequence(4, priority=1), make_sequence(4, priority=0)
    add(scheduler, low)
    run(scheduler)
    add(scheduler, urgent)
    while scheduler.num_preemptions == 0:
        step = run(scheduler)
    assert tokens_of(step) == {urgent.seq_id: 1} and low.slot == -1


def test_nobody_is_preempted_for_a_newcomer_that_would_not_fit_anyway() -> None:
    scheduler = make_scheduler(num_blocks=6, policy="priority", caching=False)
    top, lowest, urgent = make_sequence(8, priority=0), make_sequence(4, priority=2), make_sequence(16, priority=1)
    add(scheduler, top, lowest)
    run(scheduler)
    add(scheduler, urgent)
    assert tokens_of(run(scheduler)) == {top.seq_id: 1, lowest.seq_id: 1}
    assert scheduler.num_preemptions == 0


def test_equals_do_not_displace_each_other() -> None:
    scheduler = make_scheduler(max_num_seqs=1, policy="priority")
    earlier, later = make_sequence(2), make_sequence(2)
    add(scheduler, later)
    run(scheduler)
    add(scheduler, earlier)
    assert tokens_of(run(scheduler)) == {later.seq_id: 1}


def test_a_failed_step_takes_its_own_sequences_and_all_cached_prefixes_along() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    first, second, waiting = make_sequence(9, first=1), make_sequence(3), make_sequence(9, first=1)
    add(scheduler, first, second, waiting)
    step = schedule(scheduler)
    assert set(scheduler.fail_step(step)) == {first, second}
    assert scheduler._blocks.num_used_blocks == 0
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 1)
    again = schedule(scheduler)
    assert tokens_of(again) == {waiting.seq_id: 9}
    assert set(again.removed_slots) == {0, 1}


def test_removed_slots_of_a_failed_step_are_named_again() -> None:
    scheduler = make_scheduler()
    gone, stays = make_sequence(3), make_sequence(3)
    add(scheduler, gone, stays)
    run(scheduler)
    scheduler.abort(gone.seq_id)
    step = schedule(scheduler)
    assert step.removed_slots == (0,)
    scheduler.fail_step(step)
    add(scheduler, make_sequence(3))
    assert set(schedule(scheduler).removed_slots) == {0, 1}


def test_a_failed_step_spares_sequences_that_left_meanwhile() -> None:
    scheduler = make_scheduler()
    seq = make_sequence(3)
    add(scheduler, seq)
    step = schedule(scheduler)
    scheduler.abort(seq.seq_id)
    assert scheduler.fail_step(step) == []


def test_a_token_budget_below_the_number_of_sequences_is_our_mistake() -> None:
    with pytest.raises(AssertionError):
        make_scheduler(max_num_seqs=4, max_num_batched_tokens=3)


def test_a_sequence_that_waits_for_blocks_is_looked_up_again_only_when_some_are_freed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = make_scheduler(num_blocks=4)
    running, waiting = make_sequence(4, max_tokens=4), make_sequence(12, max_tokens=1)
    add(scheduler, running, waiting)
    looked_up = []
    match_prefix = scheduler._blocks.match_prefix

    def note_and_match(seq: Sequence) -> list[int]:
        looked_up.append(seq)
        return match_prefix(seq)

    monkeypatch.setattr(scheduler._blocks, "match_prefix", note_and_match)
    for _ in range(5):
        run(scheduler)
    assert looked_up == [running, waiting, waiting]
    assert not scheduler.has_work


def on_weights(version: str, *sequences: Sequence) -> None:
    for seq in sequences:
        seq.weight_version = version


def test_weight_versions_take_turns_and_each_step_has_one() -> None:
    scheduler = make_scheduler()
    old, new = [make_sequence(3), make_sequence(3)], [make_sequence(3), make_sequence(3)]
    on_weights("1-a", *old)
    on_weights("2-b", *new)
    add(scheduler, *old)
    run(scheduler)
    add(scheduler, *new)
    steps = [run(scheduler) for _ in range(6)]
    assert [step.weight_version for step in steps] == ["1-a", "2-b"] * 3
    for step in steps:
        assert tokens_of(step).keys() == {seq.seq_id for seq in (old if step.weight_version == "1-a" else new)}
    for seq in old:
        scheduler.abort(seq.seq_id)
    assert scheduler.num_on("1-a") == 0
    assert [run(scheduler).weight_version for _ in range(2)] == ["2-b"] * 2


def test_memory_goes_by_the_order_of_sequences_whatever_their_weights() -> None:
    scheduler = make_scheduler(num_blocks=5, caching=False)
    first, second = make_sequence(7, 8), make_sequence(7, 8)
    on_weights("1-a", first)
    on_weights("2-b", second)
    add(scheduler, first)
    run(scheduler)
    scheduler.add(second)
    while second.slot < 0:
        run(scheduler)
    while first.num_output_tokens < 8:
        run(scheduler)
    assert scheduler.num_preemptions == 1
    while scheduler.has_work:
        run(scheduler)
    assert second.num_output_tokens == 8
