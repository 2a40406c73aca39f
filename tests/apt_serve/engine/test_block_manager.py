from __future__ import annotations

from collections import Counter
from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from apt_serve.engine.block_manager import BlockManager
from apt_serve.engine.sampling_params import SamplingParams
from apt_serve.engine.sequence import Sequence

_ids = count()


def make_sequence(
    token_ids: list[int], *, extra_keys: tuple[str, ...] = (), prompt_logprobs: int | None = None
) -> Sequence:
    sampling = SamplingParams(prompt_logprobs=prompt_logprobs)
    return Sequence(
        f"seq-{next(_ids)}", list(token_ids), len(token_ids), sampling, seed=0, max_tokens=100, extra_keys=extra_keys
    )


def hold(blocks: BlockManager, seq: Sequence) -> int:
    """Start a sequence, compute all of it, and return how many of its tokens came from the cache."""
    blocks.acquire(seq, blocks.match_prefix(seq))
    cached = seq.num_computed_tokens
    assert blocks.allocate(seq, seq.num_uncomputed_tokens) is not None
    seq.num_computed_tokens = seq.num_tokens
    return cached


def test_a_sequence_gets_the_blocks_its_tokens_fill() -> None:
    blocks = BlockManager(8, 4, True)
    seq = make_sequence(list(range(9)))
    assert blocks.allocate(seq, 4) == (0,)
    seq.num_computed_tokens = 4
    assert blocks.allocate(seq, 5) == (1, 2)
    assert seq.block_ids == [0, 1, 2]
    assert (blocks.num_free_blocks, blocks.num_used_blocks) == (5, 3)


def test_a_block_whose_last_token_is_in_flight_is_known_once_the_token_is() -> None:
    blocks = BlockManager(8, 4, True)
    seq = make_sequence([1, 2, 3])
    hold(blocks, seq)
    seq.num_in_flight = 1
    assert blocks.allocate(seq, 1) == ()  # for the token in flight
    seq.num_computed_tokens = 4
    assert blocks.match_prefix(make_sequence([1, 2, 3, 4, 5])) == []
    seq.token_ids.append(4)
    seq.num_in_flight = 0
    blocks.learn(seq, 1)
    assert blocks.match_prefix(make_sequence([1, 2, 3, 4, 5])) == seq.block_ids


def test_weight_versions_share_no_block() -> None:
    blocks = BlockManager(8, 4, True)
    first, second = make_sequence(list(range(9))), make_sequence(list(range(9)))
    second.weight_version = "2-b"
    hold(blocks, first)
    assert hold(blocks, second) == 0
    assert hold(blocks, make_sequence(list(range(9)))) == 8


def test_tokens_within_the_last_block_need_no_new_one() -> None:
    blocks = BlockManager(8, 4, True)
    seq = make_sequence([1, 2, 3])
    hold(blocks, seq)
    seq.token_ids.append(4)
    assert blocks.allocate(seq, 1) == ()


def test_too_few_blocks_give_none_and_change_nothing() -> None:
    blocks = BlockManager(2, 4, True)
    seq = make_sequence(list(range(12)))
    assert blocks.allocate(seq, 12) is None
    assert seq.block_ids == [] and blocks.num_free_blocks == 2
    assert blocks.match_prefix(make_sequence(list(range(12)))) == []
    assert blocks.num_tokens_that_fit(seq) == 8
    assert blocks.allocate(seq, 8) is not None


def test_equal_prefixes_share_blocks() -> None:
    blocks = BlockManager(8, 4, True)
    first, second = make_sequence(list(range(10))), make_sequence([*range(8), 99, 98])
    assert hold(blocks, first) == 0
    assert hold(blocks, second) == 8
    assert first.block_ids[:2] == second.block_ids[:2]
    assert first.block_ids[2] != second.block_ids[2]
    assert blocks.num_used_blocks == 4


def test_blocks_stay_known_after_their_sequence_is_gone() -> None:
    blocks = BlockManager(8, 4, True)
    first = make_sequence(list(range(10)))
    hold(blocks, first)
    blocks.free(first)
    assert blocks.num_free_blocks == 8
    assert hold(blocks, make_sequence(list(range(10)))) == 8


def test_generated_tokens_are_known_too() -> None:
    blocks = BlockManager(8, 4, True)
    first = make_sequence([1, 2, 3])
    hold(blocks, first)
    first.token_ids.append(4)
    blocks.allocate(first, 1)
    assert hold(blocks, make_sequence([1, 2, 3, 4, 5])) == 4


def test_at_least_one_token_is_left_to_compute() -> None:
    blocks = BlockManager(8, 4, True)
    hold(blocks, make_sequence(list(range(8))))
    assert hold(blocks, make_sequence(list(range(8)))) == 4


def test_different_extra_keys_never_share() -> None:
    blocks = BlockManager(16, 4, True)
    for keys in ((), ("ab",), ("a", "b")):
        assert hold(blocks, make_sequence(list(range(9)), extra_keys=keys)) == 0
    assert hold(blocks, make_sequence(list(range(9)), extra_keys=("ab",))) == 8


def test_a_block_is_known_by_all_tokens_before_it() -> None:
    blocks = BlockManager(16, 4, True)
    hold(blocks, make_sequence([*range(4), *range(4), 0]))
    assert hold(blocks, make_sequence([*range(4), 9, 9, 9, 9, *range(4), 0])) == 4
    assert hold(blocks, make_sequence([9, 9, 9, 9, *range(4), 0])) == 0


def test_prompt_logprobs_skip_the_look_up_but_fill_the_cache() -> None:
    blocks = BlockManager(8, 4, True)
    hold(blocks, make_sequence(list(range(5))))
    scored = make_sequence(list(range(5)), prompt_logprobs=0)
    assert not blocks.is_looked_up(scored)
    assert hold(blocks, scored) == 0


def test_without_prefix_caching_nothing_is_shared() -> None:
    blocks = BlockManager(8, 4, False)
    hold(blocks, make_sequence(list(range(9))))
    assert hold(blocks, make_sequence(list(range(9)))) == 0


def test_of_two_blocks_with_equal_content_the_first_stays_known() -> None:
    blocks = BlockManager(8, 4, True)
    first, second, third = (make_sequence(list(range(5))) for _ in range(3))
    for seq in (first, second):  # both start before either is known
        blocks.acquire(seq, [])
        assert blocks.allocate(seq, 5) is not None
    blocks.free(second)
    assert blocks.match_prefix(third) == first.block_ids[:1]
    blocks.free(first)
    assert blocks.match_prefix(third) != []
    assert blocks.num_free_blocks == 8


def test_empty_blocks_are_used_before_cached_ones() -> None:
    blocks = BlockManager(4, 4, True)
    first = make_sequence(list(range(5)))
    hold(blocks, first)
    blocks.free(first)
    other = make_sequence([7] * 12)
    blocks.allocate(other, 12)
    assert blocks.match_prefix(make_sequence(list(range(5)))) != []


def test_the_end_of_a_freed_sequence_is_forgotten_before_its_beginning() -> None:
    blocks = BlockManager(4, 4, True)
    first = make_sequence(list(range(16)))
    hold(blocks, first)
    blocks.free(first)
    blocks.allocate(make_sequence([7] * 8), 8)
    assert blocks.match_prefix(make_sequence(list(range(16)))) == [0, 1]


def test_the_least_recently_used_prefix_is_forgotten_first() -> None:
    blocks = BlockManager(2, 4, True)
    old, new = make_sequence([1] * 4), make_sequence([2] * 4)
    hold(blocks, old)
    hold(blocks, new)
    blocks.free(new)
    blocks.free(old)
    blocks.allocate(make_sequence([3]), 1)
    assert blocks.match_prefix(make_sequence([1] * 5)) != []
    assert blocks.match_prefix(make_sequence([2] * 5)) == []


def test_blocks_held_by_others_cost_a_newcomer_nothing() -> None:
    blocks = BlockManager(8, 4, True)
    holder = make_sequence(list(range(9)))
    hold(blocks, holder)
    newcomer = make_sequence(list(range(9)))
    matched = blocks.match_prefix(newcomer)
    assert blocks.num_blocks_to_take(newcomer, matched) == 1
    blocks.free(holder)
    assert blocks.num_blocks_to_take(newcomer, matched) == 3


def test_reset_forgets_contents_but_not_holders() -> None:
    blocks = BlockManager(8, 4, True)
    held, freed = make_sequence(list(range(9))), make_sequence([5] * 9)
    hold(blocks, held)
    hold(blocks, freed)
    blocks.free(freed)
    blocks.reset_prefix_cache()
    assert blocks.num_used_blocks == 3
    assert hold(blocks, make_sequence(list(range(9)))) == 0
    assert blocks.num_used_blocks == 6
    blocks.free(held)
    assert blocks.num_used_blocks == 3


def test_acquire_is_for_sequences_that_hold_nothing() -> None:
    blocks = BlockManager(8, 4, True)
    seq = make_sequence(list(range(9)))
    hold(blocks, seq)
    with pytest.raises(AssertionError):
        blocks.acquire(seq, [])


class BlockManagerMachine(RuleBasedStateMachine):
    """Random use, next to a shadow of what each block really holds."""

    def __init__(self) -> None:
        super().__init__()
        self.holders: list[Sequence] = []
        self.contents: dict[int, tuple[tuple[str, ...], tuple[int, ...]]] = {}
        """Of each block: extra keys and all tokens up to the last one stored in it."""

    @initialize(num_blocks=st.integers(1, 12), block_size=st.integers(1, 4), caching=st.booleans())
    def build(self, num_blocks: int, block_size: int, caching: bool) -> None:
        self.blocks = BlockManager(num_blocks, block_size, caching)

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=16),
        keys=st.sampled_from([(), ("a",)]),
        chunk=st.integers(1, 16),
    )
    def start(self, tokens: list[int], keys: tuple[str, ...], chunk: int) -> None:
        seq = make_sequence(tokens, extra_keys=keys)
        matched = self.blocks.match_prefix(seq)
        size = self.blocks.block_size
        assert len(matched) * size < len(tokens)
        for index, block in enumerate(matched):
            assert self.contents[block] == (keys, tuple(tokens[: (index + 1) * size]))
        fits = self.blocks.num_blocks_to_take(seq, matched) <= self.blocks.num_free_blocks
        self.blocks.acquire(seq, matched)
        assert (self.blocks.num_tokens_that_fit(seq) >= seq.num_uncomputed_tokens) == fits
        self.holders.append(seq)
        self.compute(seq, chunk)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), max_size=3), chunk=st.integers(1, 16))
    def grow(self, data: st.DataObject, tokens: list[int], chunk: int) -> None:
        seq = data.draw(st.sampled_from(self.holders))
        seq.token_ids.extend(tokens)
        self.compute(seq, chunk)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.holders))
        self.blocks.free(seq)
        self.holders.remove(seq)

    @rule()
    def reset(self) -> None:
        self.blocks.reset_prefix_cache()
        assert self.blocks.match_prefix(make_sequence([0] * 20)) == []

    def compute(self, seq: Sequence, chunk: int) -> None:
        num_tokens = min(chunk, seq.num_uncomputed_tokens)
        before = (list(seq.block_ids), self.blocks.num_free_blocks)
        fits = num_tokens <= self.blocks.num_tokens_that_fit(seq)
        new = self.blocks.allocate(seq, num_tokens)
        assert (new is not None) == fits
        if new is None:
            assert before == (seq.block_ids, self.blocks.num_free_blocks)
            return
        assert seq.block_ids == [*before[0], *new]
        for position in range(seq.num_computed_tokens, seq.num_computed_tokens + num_tokens):
            block = seq.block_ids[position // self.blocks.block_size]
            self.contents[block] = (seq.extra_keys, tuple(seq.token_ids[: position + 1]))
        seq.num_computed_tokens += num_tokens

    @invariant()
    def every_holder_finds_its_own_tokens(self) -> None:
        for seq in self.holders:
            size = self.blocks.block_size
            for index, block in enumerate(seq.block_ids):
                end = min((index + 1) * size, seq.num_computed_tokens)
                if end > index * size:
                    assert self.contents[block] == (seq.extra_keys, tuple(seq.token_ids[:end]))

    @invariant()
    def references_are_the_number_of_holders(self) -> None:
        if not hasattr(self, "blocks"):
            return
        held = Counter(block for seq in self.holders for block in seq.block_ids)
        assert self.blocks._num_references == [held[block] for block in range(self.blocks.num_blocks)]
        assert self.blocks.num_used_blocks == len(held)
        assert self.blocks.num_free_blocks + self.blocks.num_used_blocks == self.blocks.num_blocks
        free = [*self.blocks._empty, *self.blocks._evictable]
        assert len(set(free)) == len(free) and not set(free) & set(held)


TestBlockManagerMachine = BlockManagerMachine.TestCase
TestBlockManagerMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
