"""Keys and values of packed tokens into their slots of a paged KV cache; the twin is `reference.store_kv`.

For models whose rope is another's: `rope_store` does both in one pass. Every rounding is the twin's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from apt_kernels.triton.kv_cache import require_cache
from apt_kernels.triton.launch import require, require_device
from apt_kernels.triton.tuning import Config, tuned

OP = "store_kv"
MAX_HEAD_DIM = 1024
LARGEST_FP8 = tl.constexpr(448.0)
LARGEST_INT8 = tl.constexpr(127.0)
TO_INTEGER = tl.constexpr(1.5 * 2.0**23)
"""Added and taken away again it leaves the nearest integer of a small float32, of two the even one."""


@triton.jit
def _store_heads(x_ptr, cache_ptr, scales_ptr, sources, places, scale_places, mask, IS_SCALED: tl.constexpr):
    """Some heads of a token, [HEADS, DIMS]."""
    dtype: tl.constexpr = cache_ptr.dtype.element_ty
    x = tl.load(x_ptr + sources, mask=mask, other=0.0)
    if IS_SCALED:
        x = x.to(tl.float32)
        largest = tl.max(tl.abs(x), 1) + tl.sum(x * 0.0, 1)  # the maximum drops a NaN
        most = tl.full(largest.shape, LARGEST_INT8, tl.float32)
        inverse = tl.div_rn(most, tl.where(largest == 0.0, 1.0, largest))[:, None]
        x = x * inverse + TO_INTEGER - TO_INTEGER
        has_head = tl.max(mask.to(tl.int32), 1) > 0
        tl.store(scales_ptr + scale_places, tl.div_rn(largest, most), mask=has_head)
    if dtype == tl.float8e4nv:
        x = tl.clamp(x.to(tl.float32), -LARGEST_FP8, LARGEST_FP8, propagate_nan=tl.PropagateNan.ALL)
    tl.store(cache_ptr + places, x.to(dtype), mask=mask)


@triton.jit
def _store_kv(
    key_ptr,  # [T, K, D]
    value_ptr,
    slots_ptr,  # [T]
    key_cache_ptr,  # [N, P, K, D]
    value_cache_ptr,
    key_scales_ptr,  # [N, P, K]
    value_scales_ptr,
    stride_key,
    stride_value,
    stride_block,
    stride_token,
    stride_head,
    stride_scale_block,
    stride_scale_token,
    stride_scale_head,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    IS_SCALED: tl.constexpr,
):
    """Some heads of one token, keys and values. Programs: (T, tiles of HEADS)."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    heads, dims = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, DIMS)
    mask = (heads < NUM_KV_HEADS)[:, None] & (dims < HEAD_DIM)[None, :]
    block, place = slot // BLOCK, slot % BLOCK
    sources = heads[:, None] * HEAD_DIM + dims[None, :]
    places = (block * stride_block + place * stride_token + heads * stride_head)[:, None] + dims[None, :]
    scale_places = block * stride_scale_block + place * stride_scale_token + heads * stride_scale_head
    key_ptr += token * stride_key
    value_ptr += token * stride_value
    _store_heads(key_ptr, key_cache_ptr, key_scales_ptr, sources, places, scale_places, mask, IS_SCALED)
    _store_heads(value_ptr, value_cache_ptr, value_scales_ptr, sources, places, scale_places, mask, IS_SCALED)


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    """See `reference.store_kv`.

    Args:
        key, value: [T, K, D] float32, bfloat16 or float16, each token's heads side by side.
        key_cache, value_cache: [N, P, K, D] of key's dtype, int8 or float8_e4m3fn, strided alike, with a dense D.

    Raises:
        ValueError: an argument the kernel does not take, or that does not fit the others; names it.
    """
    tensors = {"key": key, "value": value, "key_cache": key_cache, "value_cache": value_cache}
    require_device(**tensors, slot_mapping=slot_mapping, key_scales=key_scales, value_scales=value_scales)
    require_cache(key, "key", key_cache, value_cache, key_scales, value_scales)
    num_tokens, (_, block_size, num_kv_heads, head_dim) = key.shape[0], key_cache.shape
    require(0 < head_dim <= MAX_HEAD_DIM, "key_cache", f"must have heads of at most {MAX_HEAD_DIM}, not {head_dim}")
    for name, x in (("key", key), ("value", value)):
        fits = x.shape == (num_tokens, num_kv_heads, head_dim) and x.dtype == key.dtype
        require(fits, name, f"must be {key.dtype} [T, {num_kv_heads}, {head_dim}], got {tuple(x.shape)}")
        require(x.stride()[1:] == (head_dim, 1), name, "must have each token's heads side by side")
    fits = slot_mapping.shape == (num_tokens,) and slot_mapping.dtype == torch.int64 and slot_mapping.is_contiguous()
    require(fits, "slot_mapping", f"must be contiguous int64 [{num_tokens}]")
    if num_tokens == 0:
        return
    dims = triton.next_power_of_2(head_dim)
    config = tuned(OP, shape_class(head_dim), key.device, default_config())
    _store_kv[(num_tokens, triton.cdiv(num_kv_heads, config.blocks["HEADS"]))](
        *(key, value, slot_mapping, key_cache, value_cache, key_scales, value_scales, key.stride(0), value.stride(0)),
        *(*key_cache.stride()[:3], *((0, 0, 0) if key_scales is None else key_scales.stride())),
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        DIMS=dims,
        BLOCK=block_size,
        IS_SCALED=key_scales is not None,
        enable_fp_fusion=False,  # a product that is not rounded before its sum is none of the twin's
        **config.options(),
    )


def shape_class(head_dim: int) -> str:
    """What the best tile size depends on."""
    return f"d{head_dim}"


def default_config() -> Config:
    """For a class that nobody has measured."""
    return Config({"HEADS": 4}, num_warps=2, num_stages=1)


def candidates() -> list[Config]:
    """Worth measuring for any class."""
    return [Config({"HEADS": heads}, warps, num_stages=1) for heads in (1, 2, 4, 8, 16) for warps in (1, 2, 4, 8)]
