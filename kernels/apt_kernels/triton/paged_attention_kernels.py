"""The kernels of `paged_attention.py`: a tile of queries over a part of its context, and the merge of such parts."""

import triton
import triton.language as tl

SEQS_AT_ONCE = tl.constexpr(256)
"""How many sequences the search for a tile's looks at in one load."""


@triton.jit
def _find_sequence(cu_seqlens_ptr, first_token, num_seqs, tile, TOKENS: tl.constexpr):
    """The sequence of a tile of TOKENS queries, and the tile's number within it.

    Sequence b begins at tile cu_seqlens[b] // TOKENS + b, which leaves room for a short last tile of each one before;
    some tiles have no queries. Counting the sequences that begin by then waits for one load, bisection for eight.
    """
    found = 0
    for start in range(0, num_seqs, SEQS_AT_ONCE):
        seqs = start + tl.arange(0, SEQS_AT_ONCE)
        is_seq = seqs < num_seqs
        tokens = tl.load(cu_seqlens_ptr + seqs, mask=is_seq, other=0) - first_token
        found += tl.sum((is_seq & (tokens // TOKENS + seqs <= tile)).to(tl.int32))
    seq = found - 1
    return seq, tile - ((tl.load(cu_seqlens_ptr + seq) - first_token) // TOKENS + seq)


@triton.jit
def _find_tiles(first, last, window, TILE: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """This program's share of the tiles that queries at first .. last see: tiles begin .. end, all of which every query
    sees whole from full_begin to full_end.
    """
    begin, full_begin = 0, 0
    if HAS_WINDOW:
        begin = tl.maximum(first - window + 1, 0) // TILE
        full_begin = tl.cdiv(tl.maximum(last - window + 1, 0), TILE)
    end = tl.cdiv(tl.maximum(last + 1, 0), TILE)
    per_segment = tl.cdiv(end - begin, tl.num_programs(1))
    begin += tl.program_id(1) * per_segment
    end = tl.minimum(begin + per_segment, end)
    full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
    full_end = tl.minimum(tl.maximum(tl.maximum(first + 1, 0) // TILE, full_begin), end)
    return begin, full_begin, full_end, end


@triton.jit
def _load_blocks(table_ptr, tile, context_len, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """The cache block of each key of a tile, [TILE], or one for all if a block holds the tile; 0 past the context."""
    key = tile * TILE if TILE <= BLOCK else tile * TILE + tl.arange(0, TILE)
    return tl.load(table_ptr + key // BLOCK, mask=key < context_len, other=0)


@triton.jit
def _load_rows(pointers, is_row, dims, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, MASKED: tl.constexpr):
    """Keys or values [TILE, DIMS]; what lies past the context or the head is 0, whatever the memory holds."""
    if MASKED:
        return tl.load(pointers, mask=is_row[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM < DIMS:
        return tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _widen(x, dtype: tl.constexpr):
    """In dtype; 8-bit floats by way of float32, as GPUs go from there to bfloat16 fast and from float16 slowly."""
    return x.to(tl.float32).to(dtype) if x.dtype == tl.float8e4nv else x.to(dtype)


@triton.jit
def _attend_tiles(
    acc,  # [ROWS, DIMS] float32: values, weighted
    total,  # [ROWS] float32: their weights
    largest,  # [ROWS] float32: the largest score so far
    blocks,  # of the first tile
    begin,
    end,
    query,  # [ROWS, DIMS]
    positions,  # [ROWS]
    context_len,
    table_ptr,
    key_ptr,
    value_ptr,
    key_scales_ptr,
    value_scales_ptr,
    scales_of_head,
    stride_block,
    stride_token,
    stride_scale_block,
    stride_scale_token,
    score_scale,
    log2_scale,
    window,
    SHAPE: tl.constexpr,
    KIND: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Online softmax over tiles begin .. end of the context; MASKED unless every row sees every key of them."""
    HEAD_DIM: tl.constexpr = SHAPE[0]
    DIMS: tl.constexpr = SHAPE[1]
    BLOCK: tl.constexpr = SHAPE[2]
    TILE: tl.constexpr = SHAPE[3]
    IS_SCALED: tl.constexpr = KIND[0]
    HAS_CAP: tl.constexpr = KIND[1]
    HAS_WINDOW: tl.constexpr = KIND[2]
    dims = tl.arange(0, DIMS)
    for tile in range(begin, end):
        keys = tile * TILE + tl.arange(0, TILE)
        is_key = keys < context_len
        tokens = keys % BLOCK
        offsets = (blocks.to(tl.int64) * stride_block + tokens * stride_token)[:, None] + dims[None, :]
        key = _load_rows(key_ptr + offsets, is_key, dims, HEAD_DIM, DIMS, MASKED)
        scores = tl.dot(query, tl.trans(_widen(key, query.dtype)), input_precision="ieee")
        if IS_SCALED:
            scale_offsets = blocks * stride_scale_block + tokens * stride_scale_token + scales_of_head
            scores *= tl.load(key_scales_ptr + scale_offsets, mask=is_key, other=0.0)[None, :]
        if HAS_CAP:  # tanh(x) = 1 - 2 / (exp(2 x) + 1), right at both ends
            scores = 1.0 - 2.0 / (tl.exp2(scores * score_scale) + 1.0)
        if MASKED:
            is_seen = keys[None, :] <= positions[:, None]
            if HAS_WINDOW:
                is_seen &= keys[None, :] > positions[:, None] - window
            scores = tl.where(is_seen, scores, float("-inf"))

        new_largest = tl.maximum(largest, tl.max(scores, 1))
        # A row that has seen no key yet: -inf less -inf would be NaN.
        reference = tl.where(new_largest == float("-inf"), 0.0, new_largest) if MASKED else new_largest
        weights = tl.exp2(scores * log2_scale - (reference * log2_scale)[:, None])
        shrink = tl.exp2((largest - reference) * log2_scale)
        largest = new_largest
        total = total * shrink + tl.sum(weights, 1)
        acc *= shrink[:, None]
        value = _load_rows(value_ptr + offsets, is_key, dims, HEAD_DIM, DIMS, MASKED)
        if IS_SCALED:
            weights *= tl.load(value_scales_ptr + scale_offsets, mask=is_key, other=0.0)[None, :]
        acc = tl.dot(weights.to(query.dtype), _widen(value, query.dtype), acc, input_precision="ieee")
        # A tile ahead, so that no key waits for the number of its block.
        blocks = _load_blocks(table_ptr, tile + 1, context_len, BLOCK, TILE)
    return acc, total, largest, blocks


@triton.jit(
    do_not_specialize=("first_token", "num_seqs", "num_partials", "stride_table", "window"),
    do_not_specialize_on_alignment=("cu_seqlens_ptr", "context_lens_ptr", "block_tables_ptr"),
)
def attend(
    out_ptr,  # [T, H, D]
    acc_ptr,  # [T, H, segments, D] float32; with several segments instead of out
    stats_ptr,  # [2, T, H, segments] float32: largest scores times log2(e), and sums of weights
    query_ptr,  # [T, H, D]
    key_ptr,  # [N, P, K, D]
    value_ptr,
    key_scales_ptr,  # [N, P, K]
    value_scales_ptr,
    cu_seqlens_ptr,  # [B+1]
    context_lens_ptr,  # [B]
    block_tables_ptr,  # [B, max_blocks]
    first_token,
    num_seqs,
    num_partials,
    score_scale,
    log2_scale,
    window,
    stride_query_token,
    stride_query_head,
    stride_table,
    stride_block,
    stride_token,
    stride_head,
    stride_scale_block,
    stride_scale_token,
    stride_scale_head,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    IS_SCALED: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SEARCH: tl.constexpr,
):
    """ROWS // GROUP queries of a sequence, times the GROUP heads that share a kv head, over one segment of the context.

    Programs: (query tiles x kv heads, segments). The last tiles of prompts, the longest, come first.
    """
    TOKENS: tl.constexpr = ROWS // GROUP
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    seq = tl.num_programs(0) // NUM_KV_HEADS - 1 - tl.program_id(0) // NUM_KV_HEADS
    query_tile = 0
    if HAS_SEARCH:
        seq, query_tile = _find_sequence(cu_seqlens_ptr, first_token, num_seqs, seq, TOKENS)
    seq_start = tl.load(cu_seqlens_ptr + seq)
    num_queries = tl.load(cu_seqlens_ptr + seq + 1) - seq_start
    if query_tile * TOKENS >= num_queries:
        return
    context_len = tl.load(context_lens_ptr + seq)

    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIMS)
    indices = query_tile * TOKENS + rows // GROUP  # within the sequence
    tokens = (seq_start + indices).to(tl.int64)
    heads = kv_head * GROUP + rows % GROUP
    is_row = (rows < TOKENS * GROUP) & (indices < num_queries)
    in_head = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    query_offsets = tokens * stride_query_token + heads * stride_query_head
    query = tl.load(query_ptr + query_offsets[:, None] + dims[None, :], mask=in_head, other=0.0)

    positions = context_len - num_queries + indices
    first = context_len - num_queries + query_tile * TOKENS
    last = tl.minimum(first + TOKENS, context_len) - 1
    begin, full_begin, full_end, end = _find_tiles(first, last, window, TILE, HAS_WINDOW)

    acc = tl.zeros([ROWS, DIMS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    table_ptr = block_tables_ptr + seq.to(tl.int64) * stride_table
    blocks = _load_blocks(table_ptr, begin, context_len, BLOCK, TILE)
    key_ptr += kv_head * stride_head
    value_ptr += kv_head * stride_head
    state = (acc, total, largest, blocks)
    given = (query, positions, context_len, table_ptr, key_ptr, value_ptr, key_scales_ptr, value_scales_ptr)
    strides = (kv_head * stride_scale_head, stride_block, stride_token, stride_scale_block, stride_scale_token)
    scores = (score_scale, log2_scale, window)
    SHAPE: tl.constexpr = (HEAD_DIM, DIMS, BLOCK, TILE)
    KIND: tl.constexpr = (IS_SCALED, HAS_CAP, HAS_WINDOW)
    if HAS_WINDOW:
        state = _attend_tiles(*state, begin, full_begin, *given, *strides, *scores, SHAPE, KIND, True)
    state = _attend_tiles(*state, full_begin, full_end, *given, *strides, *scores, SHAPE, KIND, False)
    acc, total, largest, blocks = _attend_tiles(*state, full_end, end, *given, *strides, *scores, SHAPE, KIND, True)

    out_rows = tokens * NUM_HEADS + heads
    # Known at the launch only: as a constant it would be another kernel, which a longer context first asks for.
    if tl.num_programs(1) > 1:
        parts = (out_rows - first_token * NUM_HEADS) * tl.num_programs(1) + tl.program_id(1)
        tl.store(stats_ptr + parts, largest * log2_scale, mask=is_row)
        tl.store(stats_ptr + num_partials + parts, total, mask=is_row)
        if begin < end:
            tl.store(acc_ptr + parts[:, None] * HEAD_DIM + dims[None, :], acc, mask=in_head)
    else:
        out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out_ptr + out_rows[:, None] * HEAD_DIM + dims[None, :], out, mask=in_head)


@triton.jit(
    do_not_specialize=("first_token", "num_seqs", "num_partials", "num_segments"),
    do_not_specialize_on_alignment=("cu_seqlens_ptr",),
)
def merge(
    out_ptr,
    acc_ptr,
    stats_ptr,
    cu_seqlens_ptr,
    first_token,
    num_seqs,
    num_partials,
    num_segments,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """One head of one token out of its segments, up to SEGMENTS; see `attend` for the tensors. Programs: (T, H)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if first_token + token >= tl.load(cu_seqlens_ptr + num_seqs):
        return
    dims = tl.arange(0, DIMS)
    segments = tl.arange(0, SEGMENTS)
    parts = (token * NUM_HEADS + head) * num_segments + segments
    largest = tl.load(stats_ptr + parts, mask=segments < num_segments, other=float("-inf"))
    total = tl.load(stats_ptr + num_partials + parts, mask=segments < num_segments, other=0.0)
    best = tl.max(largest, 0)
    is_empty = largest == float("-inf")  # its acc is never written
    weights = tl.exp2(largest - tl.where(best == float("-inf"), 0.0, best))
    in_head = (dims < HEAD_DIM)[None, :]
    acc = tl.load(acc_ptr + parts[:, None] * HEAD_DIM + dims[None, :], mask=in_head & ~is_empty[:, None], other=0.0)
    out = tl.sum(acc * weights[:, None], 0)
    total = tl.sum(total * weights, 0)
    out_offsets = ((first_token + token) * NUM_HEADS + head) * HEAD_DIM + dims
    tl.store(out_ptr + out_offsets, out / tl.where(total == 0.0, 1.0, total), mask=dims < HEAD_DIM)
