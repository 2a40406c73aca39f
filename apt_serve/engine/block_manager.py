"""KV-cache blocks: who holds them, and which prefixes they already contain. No torch."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from hashlib import blake2b

from apt_serve.engine.sequence import Sequence

_DIGEST_SIZE = 16
"""Bytes: two different prefixes share a digest with a chance of 2^-64 after 2^32 blocks."""


class BlockManager:
    """Hands out the blocks of the KV cache, shares those of equal prefixes, and takes them back.

    Every block is in one of three states: referenced by sequences, free and empty, or free but still cached, which
    means that its content is known and can be had again. Empty blocks are given out first, then the least recently
    used cached ones. Every operation costs O(1) for each block it touches.

    A block's identity is the chained hash of all tokens up to its end, seeded with the version of the weights and the
    sequence's extra keys. It is known to the cache from the moment its last token is *scheduled*: a step stores all
    keys and values of a layer before any attention of that layer reads them, so even a sequence of the same step may
    share it. Where a step under way is still sampling that token, the block becomes known with it (`learn`).
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        assert num_blocks > 0 and block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._num_references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._empty = list(reversed(range(num_blocks)))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        """Cached blocks that nobody references, least recently used first."""

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be given out: empty, or cached but unreferenced."""
        return len(self._empty) + len(self._evictable)

    @property
    def num_used_blocks(self) -> int:
        """Blocks that a sequence references."""
        return self.num_blocks - self.num_free_blocks

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)

    def is_looked_up(self, seq: Sequence) -> bool:
        """Whether the prefix cache is asked for this sequence's tokens.

        Not for one that wants log-probabilities of its prompt: they come from computing it.
        """
        return self.enable_prefix_caching and not seq.wants_prompt_logprobs

    def match_prefix(self, seq: Sequence) -> list[int]:
        """Cached blocks of the sequence's longest known prefix, for ``acquire``.

        Leaves at least one token to compute, since logits come from computing.
        """
        matched: list[int] = []
        if not self.is_looked_up(seq):
            return matched
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self._block_of.get(self._block_hash(seq, index))
            if block is None:
                break
            matched.append(block)
        return matched

    def num_blocks_to_take(self, seq: Sequence, matched: list[int]) -> int:
        """Free blocks that would go if the sequence held all of its tokens, starting from these matched blocks."""
        num_shared = sum(self._num_references[block] > 0 for block in matched)
        return self.num_blocks_for(seq.num_tokens) - num_shared

    def acquire(self, seq: Sequence, matched: list[int]) -> None:
        """Let a sequence that holds nothing start from the blocks ``match_prefix`` found."""
        assert not seq.block_ids and seq.num_computed_tokens == 0
        for block in matched:
            if self._num_references[block] == 0:
                del self._evictable[block]
            self._num_references[block] += 1
        seq.block_ids = list(matched)
        seq.num_computed_tokens = len(matched) * self.block_size

    def num_tokens_that_fit(self, seq: Sequence) -> int:
        """Most tokens for which ``allocate`` would find room now."""
        return (len(seq.block_ids) + self.num_free_blocks) * self.block_size - seq.num_computed_tokens

    def allocate(self, seq: Sequence, num_tokens: int) -> tuple[int, ...] | None:
        """Give the sequence room for its next ``num_tokens`` tokens, which are about to be computed.

        Returns:
            The new blocks, in order; None, and nothing changed, when there are too few.
        """
        start, end = seq.num_computed_tokens, seq.num_computed_tokens + num_tokens
        assert end <= seq.num_tokens
        num_new = -(-end // self.block_size) - len(seq.block_ids)
        new_blocks: tuple[int, ...] = ()
        if num_new > 0:
            if num_new > self.num_free_blocks:
                return None
            new_blocks = tuple(self._take_free_block() for _ in range(num_new))
            seq.block_ids.extend(new_blocks)
        if self.enable_prefix_caching:
            for index in range(start // self.block_size, min(end, len(seq.token_ids)) // self.block_size):
                self._register(seq, index)
        return new_blocks

    def learn(self, seq: Sequence, num_new: int) -> None:
        """The sequence's last ``num_new`` tokens have become known; a later step may compute them already."""
        if self.enable_prefix_caching:
            known = len(seq.token_ids)
            end = min(known, seq.num_computed_tokens)
            for index in range((known - num_new) // self.block_size, end // self.block_size):
                self._register(seq, index)

    def free(self, seq: Sequence) -> None:
        """Take back all blocks of a sequence.

        Last block first, so that of what stays cached the end is forgotten before the beginning it depends on.
        """
        for block in reversed(seq.block_ids):
            self._num_references[block] -= 1
            assert self._num_references[block] >= 0
            if self._num_references[block] > 0:
                continue
            if self._hash_of[block] is None:
                self._empty.append(block)
            else:
                self._evictable[block] = None
        seq.block_ids = []

    def reset_prefix_cache(self) -> None:
        """Forget what every block contains; who holds them is unchanged."""
        self._block_of.clear()
        self._hash_of = [None] * self.num_blocks
        self._empty.extend(self._evictable)
        self._evictable.clear()

    def _take_free_block(self) -> int:
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._evictable.popitem(last=False)
            self._forget(block)
        self._num_references[block] = 1
        return block

    def _forget(self, block: int) -> None:
        known_by = self._hash_of[block]
        assert known_by is not None
        del self._block_of[known_by]
        self._hash_of[block] = None

    def _register(self, seq: Sequence, index: int) -> None:
        """Make a full block known to the cache; of two with equal content the first stays the known one."""
        block_hash = self._block_hash(seq, index)
        block = seq.block_ids[index]
        if self._block_of.setdefault(block_hash, block) == block:
            self._hash_of[block] = block_hash

    def _block_hash(self, seq: Sequence, index: int) -> bytes:
        """Chained hash of the sequence's tokens up to the end of its block ``index``; computed once for each block."""
        hashes = seq.block_hashes
        while len(hashes) <= index:
            parent = hashes[-1] if hashes else _root_hash(seq)
            start = len(hashes) * self.block_size
            tokens = array("q", seq.token_ids[start : start + self.block_size])
            assert len(tokens) == self.block_size
            hashes.append(blake2b(parent + tokens.tobytes(), digest_size=_DIGEST_SIZE).digest())
        return hashes[index]


def _root_hash(seq: Sequence) -> bytes:
    # repr keeps ("a", "b") apart from ("ab",) and spells any character.
    return blake2b(repr((seq.weight_version, *seq.extra_keys)).encode(), digest_size=_DIGEST_SIZE).digest()
