"""From the projections of packed tokens to rotated queries and stored keys and values, in one pass over memory.

The twin is `reference.rope_and_store_kv`. Every rounding is the twin's, so that a cache holds what another device would
have put there; only the sum of a norm may differ in its order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from apt_kernels.triton.kv_cache import require_cache
from apt_kernels.triton.launch import require, require_device
from apt_kernels.triton.tuning import Config, tuned

OP = "rope_store"
MAX_HEAD_DIM = 1024
FEW_TOKENS = 512
"""Up to here programs are too few to hide how long memory takes to answer."""
LARGEST_FP8 = tl.constexpr(448.0)
LARGEST_INT8 = tl.constexpr(127.0)
TO_INTEGER = tl.constexpr(1.5 * 2.0**23)
"""Added and taken away again it leaves the nearest integer of a small float32, of two the even one."""


@triton.jit
def _round(x, dtype: tl.constexpr):
    """What is left of a float32 in dtype."""
    return x.to(dtype).to(tl.float32)


@triton.jit
def _load_halves(ptr, offsets, mask, HALF: tl.constexpr):
    """The two halves of heads that the rotation pairs, float32."""
    first = tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return first, tl.load(ptr + offsets + HALF, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _normalize(first, second, weight_ptr, eps, dtype: tl.constexpr, HALF: tl.constexpr):
    """RMSNorm of each head, [HEADS, LANES]."""
    lanes = tl.arange(0, first.shape[1])
    first_weight, second_weight = _load_halves(weight_ptr, lanes, lanes < HALF, HALF)
    mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF)
    inverse = tl.rsqrt(mean + eps)[:, None]
    first = _round(_round(first * inverse, dtype) * first_weight[None, :], dtype)
    return first, _round(_round(second * inverse, dtype) * second_weight[None, :], dtype)


@triton.jit
def _rotate(first, second, cos_ptr, sin_ptr, dtype: tl.constexpr, HALF: tl.constexpr):
    """Each head by the token's angles, [HEADS, LANES]."""
    lanes = tl.arange(0, first.shape[1])
    cos = tl.load(cos_ptr + lanes, mask=lanes < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + lanes, mask=lanes < HALF, other=0.0).to(tl.float32)[None, :]
    rotated = _round(first * cos, dtype) - _round(second * sin, dtype)
    return _round(rotated, dtype), _round(_round(second * cos, dtype) + _round(first * sin, dtype), dtype)


@triton.jit
def _store_halves(ptr, offsets, first, second, mask, HALF: tl.constexpr):
    dtype: tl.constexpr = ptr.dtype.element_ty
    if dtype == tl.float8e4nv:
        first = tl.clamp(first, -LARGEST_FP8, LARGEST_FP8, propagate_nan=tl.PropagateNan.ALL)
        second = tl.clamp(second, -LARGEST_FP8, LARGEST_FP8, propagate_nan=tl.PropagateNan.ALL)
    tl.store(ptr + offsets, first.to(dtype), mask=mask)
    tl.store(ptr + offsets + HALF, second.to(dtype), mask=mask)


@triton.jit
def _quantize(first, second):
    """Each head as integers and a scale [HEADS], see `reference.quantize_rows`."""
    largest = tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1))
    largest += tl.sum(first * 0.0, 1) + tl.sum(second * 0.0, 1)  # the maximum drops a NaN
    most = tl.full(largest.shape, LARGEST_INT8, tl.float32)
    inverse = tl.div_rn(most, tl.where(largest == 0.0, 1.0, largest))[:, None]
    first = first * inverse + TO_INTEGER - TO_INTEGER
    return first, second * inverse + TO_INTEGER - TO_INTEGER, tl.div_rn(largest, most)


@triton.jit
def _rope_store(
    query_ptr,  # [T, H, D]
    qkv_ptr,  # [T, (H + 2 K) D]
    cos_ptr,  # [T, D/2]
    sin_ptr,
    slots_ptr,  # [T]
    key_ptr,  # [N, P, K, D]
    value_ptr,
    key_scales_ptr,  # [N, P, K]
    value_scales_ptr,
    query_weight_ptr,  # [D]
    key_weight_ptr,
    eps,
    stride_qkv,
    stride_block,
    stride_token,
    stride_head,
    stride_scale_block,
    stride_scale_token,
    stride_scale_head,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    IS_SCALED: tl.constexpr,
):
    """Some heads of one kind, query, key or value, of one token. Programs: (T, tiles of HEADS of all kinds)."""
    QUERY_TILES: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    KV_TILES: tl.constexpr = (NUM_KV_HEADS + HEADS - 1) // HEADS
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads, lanes = tl.arange(0, HEADS), tl.arange(0, LANES)
    qkv_ptr += token * stride_qkv
    cos_ptr += token * HALF
    sin_ptr += token * HALF

    if tile < QUERY_TILES:
        heads += tile * HEADS
        mask = (heads < NUM_HEADS)[:, None] & (lanes < HALF)[None, :]
        offsets = heads[:, None] * (2 * HALF) + lanes[None, :]
        first, second = _load_halves(qkv_ptr, offsets, mask, HALF)
        if HAS_NORM:
            first, second = _normalize(first, second, query_weight_ptr, eps, dtype, HALF)
        first, second = _rotate(first, second, cos_ptr, sin_ptr, dtype, HALF)
        _store_halves(query_ptr + token * (NUM_HEADS * 2 * HALF), offsets, first, second, mask, HALF)
        return
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    heads += (tile - QUERY_TILES) % KV_TILES * HEADS
    mask = (heads < NUM_KV_HEADS)[:, None] & (lanes < HALF)[None, :]
    block, place = slot // BLOCK, slot % BLOCK
    places = (block * stride_block + place * stride_token + heads * stride_head)[:, None] + lanes[None, :]
    scale_places = block * stride_scale_block + place * stride_scale_token + heads * stride_scale_head
    offsets = (NUM_HEADS + heads)[:, None] * (2 * HALF) + lanes[None, :]
    if tile < QUERY_TILES + KV_TILES:
        first, second = _load_halves(qkv_ptr, offsets, mask, HALF)
        if HAS_NORM:
            first, second = _normalize(first, second, key_weight_ptr, eps, dtype, HALF)
        first, second = _rotate(first, second, cos_ptr, sin_ptr, dtype, HALF)
        if IS_SCALED:
            first, second, scales = _quantize(first, second)
            tl.store(key_scales_ptr + scale_places, scales, mask=heads < NUM_KV_HEADS)
        _store_halves(key_ptr, places, first, second, mask, HALF)
    else:
        first, second = _load_halves(qkv_ptr, offsets + NUM_KV_HEADS * 2 * HALF, mask, HALF)
        if IS_SCALED:
            first, second, scales = _quantize(first, second)
            tl.store(value_scales_ptr + scale_places, scales, mask=heads < NUM_KV_HEADS)
        _store_halves(value_ptr, places, first, second, mask, HALF)


def rope_and_store_kv(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    num_heads: int,
    query_weight: torch.Tensor | None = None,
    key_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `reference.rope_and_store_kv`.

    Args:
        qkv: [T, (H + 2 K) D] float32, bfloat16 or float16, with dense rows.
        key_cache, value_cache: [N, P, K, D] of qkv's dtype, int8 or float8_e4m3fn, strided alike, with a dense D.

    Returns:
        The rotated queries [T, H, D].

    Raises:
        ValueError: an argument the kernel does not take, or that does not fit the others; names it.
    """
    tensors = {"qkv": qkv, "cos": cos, "sin": sin, "key_cache": key_cache, "value_cache": value_cache}
    weights = {"query_weight": query_weight, "key_weight": key_weight}
    scales = {"key_scales": key_scales, "value_scales": value_scales}
    require_device(**tensors, slot_mapping=slot_mapping, **weights, **scales)
    require_cache(qkv, "qkv", key_cache, value_cache, key_scales, value_scales)
    _check(qkv, cos, sin, slot_mapping, num_heads, key_cache.shape, weights)

    num_tokens, (_, block_size, num_kv_heads, head_dim) = qkv.shape[0], key_cache.shape
    query = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    config = tuned(OP, shape_class(num_tokens, head_dim), qkv.device, default_config(num_tokens))
    heads = config.blocks["HEADS"]
    if num_tokens > 0:
        num_tiles = triton.cdiv(num_heads, heads) + 2 * triton.cdiv(num_kv_heads, heads)
        _rope_store[(num_tokens, num_tiles)](
            *(query, qkv, cos, sin, slot_mapping, key_cache, value_cache, key_scales, value_scales),
            *(query_weight, key_weight, eps, qkv.stride(0), *key_cache.stride()[:3]),
            *((0, 0, 0) if key_scales is None else key_scales.stride()),
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HALF=head_dim // 2,
            LANES=triton.next_power_of_2(head_dim // 2),
            BLOCK=block_size,
            HAS_NORM=query_weight is not None,
            IS_SCALED=key_scales is not None,
            enable_fp_fusion=False,  # a product that is not rounded before its sum is none of the twin's
            **config.options(),
        )
    return query


def shape_class(num_tokens: int, head_dim: int) -> str:
    """What the best tile sizes depend on."""
    return f"{'few' if num_tokens <= FEW_TOKENS else 'many'}-d{head_dim}"


def default_config(num_tokens: int) -> Config:
    """For a class that nobody has measured."""
    return Config({"HEADS": 4 if num_tokens <= FEW_TOKENS else 8}, num_warps=2, num_stages=1)


def candidates() -> list[Config]:
    """Worth measuring for any class."""
    return [Config({"HEADS": heads}, warps, num_stages=1) for heads in (1, 2, 4, 8, 16, 32) for warps in (1, 2, 4, 8)]


def _check(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slot_mapping: torch.Tensor,
    num_heads: int,
    cache_shape: torch.Size,
    weights: dict[str, torch.Tensor | None],
) -> None:
    num_kv_heads, head_dim = cache_shape[2:]
    fits = head_dim % 2 == 0 and 0 < head_dim <= MAX_HEAD_DIM
    require(fits, "key_cache", f"must have an even head size up to {MAX_HEAD_DIM}, not {head_dim}")
    require(num_heads > 0, "num_heads", "must be positive")
    num_tokens, width = qkv.shape[0], (num_heads + 2 * num_kv_heads) * head_dim
    fits = qkv.shape == (num_tokens, width) and qkv.stride(1) == 1
    require(fits, "qkv", f"must be [T, {width}] with dense rows, got {tuple(qkv.shape)}")
    for name, x in (("cos", cos), ("sin", sin)):
        fits = x.shape == (num_tokens, head_dim // 2) and x.dtype == qkv.dtype and x.is_contiguous()
        require(fits, name, f"must be contiguous {qkv.dtype} [{num_tokens}, {head_dim // 2}]")
    fits = slot_mapping.shape == (num_tokens,) and slot_mapping.dtype == torch.int64 and slot_mapping.is_contiguous()
    require(fits, "slot_mapping", f"must be contiguous int64 [{num_tokens}]")
    require(len({weight is None for weight in weights.values()}) == 1, "key_weight", "goes with query_weight")
    for name, weight in weights.items():
        fits = weight is None or (weight.shape == (head_dim,) and weight.dtype == qkv.dtype and weight.is_contiguous())
        require(fits, name, f"must be contiguous {qkv.dtype} [{head_dim}]")
