"""What is done with one row of logits by one program: measuring, cutting and inverting it, without ever sorting it.

Logits are compared by their order, an int32 (`order_of`). A list is a row, or what `gather` took of one: tokens in the
order of their ids, a place each. A cut keeps the tokens of a list with more than the order `least`, and of those with
just as much the ones up to the place `last_tie`. All sums are float64, in an order that depends on the row only.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = tl.constexpr(256)
"""Tokens of which the maximum is kept."""
NO_ORDER = tl.constexpr(-(2**31))
"""Below that of every logit."""
LEAST_FINITE = tl.constexpr(-0x7F800000)
INFINITE = tl.constexpr(0x7F800000)
NO_LIMIT = tl.constexpr(2**31 - 1)


@triton.jit
def order_of(logits):
    """int32 that compare as the logits do: zeros of both signs are equal, and NaN is more than all others."""
    wide = logits.to(tl.float32)
    bits = tl.where(wide == 0, 0.0, wide).to(tl.int32, bitcast=True)
    return tl.where(wide == wide, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def logit_of(order):
    """The float32 of an order."""
    bits = order.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def load_orders(values, size, start, TILE: tl.constexpr):
    """Places and orders of a list's tile; beyond the list there is NO_ORDER."""
    place = start + tl.arange(0, TILE)
    inside = place < size
    return place, tl.where(inside, order_of(tl.load(values + place, mask=inside, other=0.0)), NO_ORDER)


@triton.jit
def weights_of(order, least, last_tie, place, top, temperature, BY_WEIGHT: tl.constexpr):
    """float64 of each token of a cut, 0 of others: exp((logit - top) / temperature), or 1."""
    is_kept = (order > least) | ((order == least) & (place <= last_tie))
    if BY_WEIGHT:
        # Where nothing is kept, the order need not be one of a number.
        logit = logit_of(tl.where(is_kept, order, 0))
        weights = tl.exp(tl.div_rn(logit - top, temperature))
        return tl.where(is_kept, weights, 0.0).to(tl.float64)
    return is_kept.to(tl.float64)


@triton.jit
def measure(values, size, least, last_tie, top, temperature, BY_WEIGHT: tl.constexpr, TILE: tl.constexpr):
    """The weight of a cut, or the number of its tokens."""
    sums = tl.zeros((TILE,), tl.float64)
    for start in range(0, size, TILE):
        place, order = load_orders(values, size, start, TILE)
        sums += weights_of(order, least, last_tie, place, top, temperature, BY_WEIGHT)
    return tl.sum(sums)


@triton.jit
def reach(values, size, low, best, needed, top, temperature, BY_WEIGHT: tl.constexpr, TILE: tl.constexpr):
    """The least order from `low` on of which the tokens above measure less than `needed`, and what they measure.

    So it is the last that is kept where the best tokens are kept that measure `needed` together. It is an order of the
    list, or `low`; never more than `best`.
    """
    outside, inside = low.to(tl.int64) - 1, best.to(tl.int64)
    above = needed * 0
    while inside - outside > 1:
        middle = (outside + inside) >> 1
        found = measure(values, size, (middle + 1).to(tl.int32), NO_LIMIT, top, temperature, BY_WEIGHT, TILE)
        if found < needed:
            inside = middle
            above = found
        else:
            outside = middle
    return inside.to(tl.int32), above


@triton.jit
def invert(values, size, least, last_tie, target, top, temperature, BY_WEIGHT: tl.constexpr, TILE: tl.constexpr):
    """The place at which the weights of a cut, summed up, exceed the target; if rounding forbids that, the last place.

    Not BY_WEIGHT, only the tokens of order `least` count, one each.
    """
    before = target * 0
    last, found, start = 0, -1, 0
    while (start < size) & (found < 0):
        place, order = load_orders(values, size, start, TILE)
        if not BY_WEIGHT:
            order = tl.where(order == least, order, NO_ORDER)
        weights = weights_of(order, least, last_tie, place, top, temperature, BY_WEIGHT)
        last = tl.max(tl.where(weights > 0, place, last))
        here = tl.sum(weights)
        if before + here > target:
            is_over = (before + tl.cumsum(weights, 0) > target) & (weights > 0)
            found = tl.min(tl.where(is_over, place, last))
        before += here
        start += TILE
    return tl.where(found < 0, last, found)


@triton.jit
def gather(logits, size, least, values, ids, TILE: tl.constexpr):
    """Copy the tokens with at least this order, and their ids, if they are no more than TILE; returns how many."""
    count = 0
    for start in range(0, size, TILE):
        place = start + tl.arange(0, TILE)
        inside = place < size
        logit = tl.load(logits + place, mask=inside, other=0.0)
        is_taken = inside & (order_of(logit) >= least)
        spot = count + tl.cumsum(is_taken.to(tl.int32), 0) - 1
        tl.store(values + spot, logit, mask=is_taken & (spot < TILE))
        tl.store(ids + spot, place, mask=is_taken & (spot < TILE))
        count += tl.sum(is_taken.to(tl.int32))
    # What one thread has written others will read.
    tl.debug_barrier()
    return count


@triton.jit
def order_of_rank(orders, rank):
    """The greatest order that at least `rank` of these have; the least that there is if there are fewer."""
    outside, inside = tl.full([], -(2**31), tl.int64), tl.max(orders).to(tl.int64)
    while inside - outside > 1:
        middle = (outside + inside) >> 1
        if tl.sum((orders > middle.to(tl.int32)).to(tl.int32)) < rank:
            inside = middle
        else:
            outside = middle
    return inside.to(tl.int32)
