"""What the kernels that read and write a paged KV cache ask of it."""

from __future__ import annotations

import torch

from apt_kernels.triton.launch import require

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP8 = torch.float8_e4m3fn
FP8_CAPABILITY = (8, 9)
"""Of the first devices that convert it."""
MAX_SCALES = 2**31
"""Offsets of scales are int32: a layer's cache has fewer, and 64-bit ones cost a third of a kernel's registers."""


def require_cache(
    x: torch.Tensor,
    name: str,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
) -> None:
    """A cache [N, P, K, D], with scales [N, P, K] if it is int8, that fits x, which is called name.

    Raises:
        ValueError: names the argument.
    """
    require(x.dtype in DTYPES, name, f"must be float32, bfloat16 or float16, not {x.dtype}")
    require(keys.dim() == 4 and keys.stride(3) == 1, "key_cache", f"must be [N, P, K, D], D dense: {tuple(keys.shape)}")
    fits = keys.dtype in (x.dtype, torch.int8, FP8)
    require(fits, "key_cache", f"must be {x.dtype}, int8 or float8_e4m3fn, not {keys.dtype}")
    fits = keys.dtype != FP8 or not keys.is_cuda or torch.cuda.get_device_capability(keys.device) >= FP8_CAPABILITY
    require(fits, "key_cache", f"in float8_e4m3fn needs a device of compute capability {FP8_CAPABILITY}")
    alike = (values.shape, values.stride(), values.dtype) == (keys.shape, keys.stride(), keys.dtype)
    require(alike, "value_cache", "must have the shape, strides and dtype of key_cache")
    for scales_name, scales in (("key_scales", key_scales), ("value_scales", value_scales)):
        require((scales is None) == (keys.dtype != torch.int8), scales_name, "go with an int8 cache and with no other")
        fits = scales is None or (scales.shape == keys.shape[:3] and scales.dtype == torch.float32)
        require(fits, scales_name, "must be float32 [N, P, K]")
        fits = scales is None or _span(scales) <= MAX_SCALES
        require(fits, scales_name, f"reach over more than {MAX_SCALES} elements")
    if key_scales is not None and value_scales is not None:
        require(key_scales.stride() == value_scales.stride(), "value_scales", "must have the strides of key_scales")


def _span(x: torch.Tensor) -> int:
    """Elements from the first to the last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
