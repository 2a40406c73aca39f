"""The kernels of sampling.py: maxima of chunks, and what one program does with one row.

A filter keeps the best tokens, so it is a cut, and it is found by halving a range of logits and measuring what lies
above. This reads a row over and over, so first what may be kept is gathered: the maxima of chunks bound the k-th best
logit, and a pass over the row tells whether what lies within some temperatures of the best one has the wanted share of
all probability. Where more than TILE tokens remain, as in flat distributions, the row itself is read instead, with the
same result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from apt_kernels.triton.logits_row import (
    CHUNK,
    INFINITE,
    LEAST_FINITE,
    NO_LIMIT,
    NO_ORDER,
    gather,
    invert,
    load_orders,
    logit_of,
    measure,
    order_of,
    order_of_rank,
    reach,
)

NO_WEIGHT = tl.constexpr(104.0)
"""Beyond so many temperatures below the best logit, float32's exp gives 0."""
NEAR = tl.constexpr(8.0)
"""Temperatures below the best logit within which the nucleus is sought first."""


@triton.jit
def maxima_kernel(logits, stride, maxima, ids, size, CHUNKS: tl.constexpr):
    """The order of each chunk's first maximum [R, chunks] and its id."""
    row = tl.program_id(0).to(tl.int64)
    num_chunks = tl.cdiv(size, CHUNK)
    chunk = tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS)
    token = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    inside = token < size
    logit = tl.load(logits + row * stride + token, mask=inside, other=0.0)
    order = tl.where(inside, order_of(logit), NO_ORDER)
    best = tl.max(order, 1)
    first = tl.min(tl.where(order == best[:, None], token, NO_LIMIT), 1)
    tl.store(maxima + row * num_chunks + chunk, best, mask=chunk < num_chunks)
    tl.store(ids + row * num_chunks + chunk, first, mask=chunk < num_chunks)


@triton.jit
def _best_of_row(maxima, ids, row, size, MAX_CHUNKS: tl.constexpr):
    """The maxima of a row's chunks, the order of the best token, and its id."""
    num_chunks = tl.cdiv(size, CHUNK)
    chunk = tl.arange(0, MAX_CHUNKS)
    inside = chunk < num_chunks
    orders = tl.load(maxima + row * num_chunks + chunk, mask=inside, other=NO_ORDER)
    best = tl.max(orders)
    first = tl.load(ids + row * num_chunks + chunk, mask=inside, other=NO_LIMIT)
    return orders, best, tl.min(tl.where(orders == best, first, NO_LIMIT))


@triton.jit
def argmax_kernel(maxima, ids, out, size, MAX_CHUNKS: tl.constexpr):
    """The id of a row's first maximum."""
    row = tl.program_id(0).to(tl.int64)
    _, _, token = _best_of_row(maxima, ids, row, size, MAX_CHUNKS)
    tl.store(out + row, token.to(tl.int64))


@triton.jit
def _order_near_nucleus(logits, size, floor, needed, top, temperature, TILE: tl.constexpr):
    """An order such that the tokens with at least as much have the needed weight, or `floor`."""
    width = NEAR * temperature
    low = tl.maximum(order_of(top - width), floor)
    while (low > floor) & (measure(logits, size, low, NO_LIMIT, top, temperature, True, TILE) < needed):
        width *= 4
        low = tl.maximum(order_of(top - width), floor)
    return low


@triton.jit
def _draw(
    logits,
    size,
    orders,
    best,
    temperature,
    top_k,
    top_p,
    min_p,
    uniform,
    values,
    ids,
    TILE: tl.constexpr,
):
    """A token of a row whose best logit is finite and whose temperature is positive."""
    top = logit_of(best)
    least = tl.maximum(order_of(top - NO_WEIGHT * temperature), LEAST_FINITE)
    if min_p > 0:
        bound = top.to(tl.float64) + temperature.to(tl.float64) * tl.log(min_p.to(tl.float64))
        least = tl.maximum(least, order_of(bound.to(tl.float32)))
    has_k, has_p = (top_k > 0) & (top_k < size), top_p < 1
    last_tie, low, total = NO_LIMIT + top_k.to(tl.int32) * 0, least, uniform * 0
    if has_k:
        if top_k <= tl.cdiv(size, CHUNK):
            low = tl.maximum(order_of_rank(orders, top_k), least)
    else:
        total = measure(logits, size, least, NO_LIMIT, top, temperature, True, TILE)
        if has_p:
            low = _order_near_nucleus(logits, size, least, top_p * total, top, temperature, TILE)

    source, num_source = logits, size
    is_gathered = has_k | has_p
    if is_gathered:
        count = gather(logits, size, low, values, ids, TILE)
        is_gathered = count <= TILE
        if is_gathered:
            source, num_source = values, count
    if has_k:
        needed = top_k.to(tl.float64)
        least, above = reach(source, num_source, low, best, needed, top, temperature, False, TILE)
        ties = needed - above
        last_tie = invert(source, num_source, least, NO_LIMIT, ties - 1, top, temperature, False, TILE)
        total = measure(source, num_source, least, last_tie, top, temperature, True, TILE)
    if has_p:
        needed = top_p * total
        cut, above = reach(source, num_source, tl.maximum(low, least), best, needed, top, temperature, True, TILE)
        weight = tl.exp(tl.div_rn(logit_of(cut) - top, temperature)).to(tl.float64)
        ties = tl.maximum(tl.ceil((needed - above) / tl.maximum(weight, 1e-300)), 1.0)
        last = invert(source, num_source, cut, NO_LIMIT, ties - 1, top, temperature, False, TILE)
        last_tie = tl.where(cut == least, tl.minimum(last, last_tie), last)
        least = cut
        total = measure(source, num_source, least, last_tie, top, temperature, True, TILE)
    place = invert(source, num_source, least, last_tie, uniform * total, top, temperature, True, TILE)
    if is_gathered:
        place = tl.load(ids + place)
    return place


@triton.jit
def sample_kernel(
    logits,
    stride,
    maxima,
    chunk_ids,
    temperature,
    top_k,
    top_p,
    min_p,
    uniform,
    values,
    ids,
    out,
    size,
    MAX_CHUNKS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The token of a row: drawn, or the most likely one."""
    row = tl.program_id(0).to(tl.int64)
    orders, best, token = _best_of_row(maxima, chunk_ids, row, size, MAX_CHUNKS)
    heat = tl.load(temperature + row)
    if (heat > 0) & (best >= LEAST_FINITE) & (best < INFINITE):
        token = _draw(
            logits + row * stride,
            size,
            orders,
            best,
            heat,
            tl.load(top_k + row),
            tl.load(top_p + row).to(tl.float64),
            tl.load(min_p + row),
            tl.load(uniform + row),
            values + row * TILE,
            ids + row * TILE,
            TILE,
        )
    tl.store(out + row, token.to(tl.int64))


@triton.jit
def _next_best(values, size, order, place, TILE: tl.constexpr):
    """The best token of a list after the one of this order and place: (order, place)."""
    best, first = order * 0 + NO_ORDER, place * 0 + NO_LIMIT
    for start in range(0, size, TILE):
        places, orders = load_orders(values, size, start, TILE)
        is_after = (orders < order) | ((orders == order) & (places > place))
        orders = tl.where(is_after, orders, NO_ORDER)
        here = tl.max(orders)
        if here > best:
            best = here
            first = tl.min(tl.where(orders == here, places, NO_LIMIT))
    return best, first


@triton.jit(do_not_specialize=["num_top"], do_not_specialize_on_alignment=["token_ids"])
def logprobs_kernel(
    logits,
    stride,
    maxima,
    chunk_ids,
    token_ids,
    values,
    ids,
    chosen,
    best_logprobs,
    best_ids,
    size,
    num_top,
    MAX_CHUNKS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Log-probabilities of a row's given token and of its best ones, with the ids of these."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    values += row * TILE
    ids += row * TILE
    orders, best, _ = _best_of_row(maxima, chunk_ids, row, size, MAX_CHUNKS)
    top = logit_of(best)
    log_sum = float("nan")
    if (best >= LEAST_FINITE) & (best < INFINITE):
        log_sum = tl.log(measure(logits, size, LEAST_FINITE, NO_LIMIT, top, 1.0, True, TILE)).to(tl.float32)
    tl.store(chosen + row, tl.load(logits + tl.load(token_ids + row)).to(tl.float32) - top - log_sum)
    if num_top > 0:
        low = NO_ORDER
        if num_top <= tl.cdiv(size, CHUNK):
            low = order_of_rank(orders, num_top)
        source, num_source = logits, size
        count = gather(logits, size, low, values, ids, TILE)
        if count <= TILE:
            source, num_source = values, count
        order, place = NO_LIMIT, -1
        for rank in range(num_top):
            order, place = _next_best(source, num_source, order, place, TILE)
            token_id = place
            if count <= TILE:
                token_id = tl.load(ids + place)
            tl.store(best_logprobs + row * num_top + rank, logit_of(order) - top - log_sum)
            tl.store(best_ids + row * num_top + rank, token_id.to(tl.int64))
