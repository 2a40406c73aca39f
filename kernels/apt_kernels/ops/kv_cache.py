"""Writing to the paged KV cache."""

from __future__ import annotations

import torch

from apt_kernels import reference
from apt_kernels.ops import backends
from apt_kernels.ops.backends import require

# Triton is for NVIDIA's GPUs here: a torch without CUDA does not import it.
if torch.version.cuda is not None:
    from apt_kernels.triton import rope_store as triton_rope_store
    from apt_kernels.triton import store_kv as triton_store_kv


def rope_and_store_kv(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    num_heads: int,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    query_weight: torch.Tensor | None = None,
    key_weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """Rotate queries and keys, store keys and values, return the queries; see `reference.rope_and_store_kv`.

    Raises:
        ValueError: shapes that do not fit together; names the argument.
    """
    num_kv_heads, head_dim = key_cache.shape[2:]
    width = (num_heads + 2 * num_kv_heads) * head_dim
    require(qkv.dim() == 2 and qkv.shape[1] == width, "qkv", f"must be [T, {width}], got {tuple(qkv.shape)}")
    check_caches(key_cache, value_cache, key_scales, value_scales)
    require((query_weight is None) == (key_weight is None), "key_weight", "must be given if query_weight is")
    if backends.is_triton(qkv) and not backends.wants_gradient(qkv):
        return triton_rope_store.rope_and_store_kv(
            *(qkv, cos, sin, key_cache, value_cache, slot_mapping),
            num_heads=num_heads,
            query_weight=query_weight,
            key_weight=key_weight,
            eps=eps,
            key_scales=key_scales,
            value_scales=value_scales,
        )
    if backends.is_native(qkv) and has_native_cache(qkv, key_cache, value_cache, key_scales, value_scales):
        out: torch.Tensor = torch.ops.apt_cpu.rope_and_store_kv(
            *(qkv, cos, sin, key_cache, value_cache, key_scales, value_scales, slot_mapping),
            *(num_heads, num_kv_heads, query_weight, key_weight, eps),
        )
        return out
    return reference.rope_and_store_kv(
        *(qkv, cos, sin, key_cache, value_cache, slot_mapping),
        *(num_heads, query_weight, key_weight, eps, key_scales, value_scales),
    )


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    """Store keys and values, [T, K, D], of packed tokens into a paged KV cache; see `reference.store_kv`.

    Raises:
        ValueError: shapes that do not fit together; names the argument.
    """
    for name, x in (("key", key), ("value", value)):
        fits = x.dim() == 3 and x.shape == (slot_mapping.shape[0], *key_cache.shape[2:])
        require(fits, name, f"must be [T, K, D] as slot_mapping and key_cache are, got {tuple(x.shape)}")
    check_caches(key_cache, value_cache, key_scales, value_scales)
    caches = (key_cache, value_cache)
    if backends.is_triton(key, value):
        key, value = (x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (key, value))
        triton_store_kv.store_kv(key, value, *caches, slot_mapping, key_scales, value_scales)
    else:
        reference.store_kv(key, value, *caches, slot_mapping, key_scales, value_scales)


INT4_GROUP_SIZES = (32, 64, 128)
MAX_INT8_IN = 2**17
"""Products of two int8 are at most 127 * 128: so many fit into an int32."""
FLOAT8_BLOCK_IN = 128
"""Inputs that a product with float8 weights sums before it applies a block's scale."""


def check_caches(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
) -> None:
    """Both caches [N, P, K, D]; int8 ones with scales [N, P, K], others without."""
    require(key_cache.shape == value_cache.shape, "value_cache", "must have key_cache's shape")
    for name, cache, scales in (("key", key_cache, key_scales), ("value", value_cache, value_scales)):
        if cache.dtype == torch.int8:
            fits = scales is not None and scales.shape == cache.shape[:3] and scales.dtype == torch.float32
            require(fits, f"{name}_scales", "must be float32 [N, P, K] with an int8 cache")
        else:
            require(scales is None, f"{name}_scales", f"go with an int8 cache, not {cache.dtype}")


def has_native_cache(
    x: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
) -> bool:
    """Whether the C++ ops know the cache: of x's dtype or int8, keys and values laid out alike."""
    if key_cache.stride() != value_cache.stride() or key_cache.stride(3) != 1:
        return False
    if key_scales is None or value_scales is None:
        return key_cache.dtype == value_cache.dtype == x.dtype
    return key_scales.stride() == value_scales.stride()
