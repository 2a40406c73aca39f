"""Weights of linear layers as the GPU's products take them: what cpu/linear.py is for processors.

Weights in 16 bits are not among them: torch's own products (cuBLAS) have no equal there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from apt_kernels.triton import linear_fp8, linear_w4a16, linear_w8a8, linear_w8a16, linear_words


@dataclass(frozen=True)
class W8A16Weight:
    """int8 with one scale per output, x as it is; see `linear_w8a16`."""

    data: torch.Tensor
    """[out, words] int32."""
    scales: torch.Tensor
    """[out] float32."""
    out_features: int
    in_features: int

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
        """See PackedWeight."""
        return linear_w8a16.linear(_side_by_side(x), self.data, self.scales, bias, out_dtype)


@dataclass(frozen=True)
class W8A8Weight:
    """int8 with one scale per output, x quantized with one scale per row; see `linear_w8a8`."""

    data: torch.Tensor
    """[out, in] int8."""
    scales: torch.Tensor
    """[out] float32."""
    input_scale: float | None
    """Of every row; None gives each row its own."""
    out_features: int
    in_features: int

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
        """See PackedWeight."""
        return linear_w8a8.linear(_side_by_side(x), self.data, self.scales, bias, out_dtype, self.input_scale)


@dataclass(frozen=True)
class W4A16Weight:
    """4 bits in groups with a scale and a minimum each, x as it is; see `linear_w4a16`."""

    data: torch.Tensor
    """[out, words] int32."""
    scales: torch.Tensor
    """[groups, out] float16."""
    minima: torch.Tensor
    """[groups, out] float16."""
    group_size: int
    out_features: int
    in_features: int

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
        """See PackedWeight."""
        factors = (self.scales, self.minima, self.group_size)
        return linear_w4a16.linear(_side_by_side(x), self.data, *factors, bias, out_dtype)


@dataclass(frozen=True)
class Fp8Weight:
    """float8 e4m3; x becomes float8, too, where the device multiplies it; see `linear_fp8`."""

    data: torch.Tensor
    """[out, in] float8_e4m3fn."""
    scales: torch.Tensor
    """float32, [out] or one per block."""
    block: tuple[int, int] | None
    """Outputs and inputs of a block; None with one scale per output."""
    out_features: int
    in_features: int

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
        """See PackedWeight."""
        quantizes_x = linear_fp8.has_float8(x.device)
        return linear_fp8.linear(
            _side_by_side(x), self.data, self.scales, self.block, bias, out_dtype, quantizes_x=quantizes_x
        )


def pack_int8(
    weight: torch.Tensor, scales: torch.Tensor, *, has_int8_inputs: bool, input_scale: float | None
) -> W8A16Weight | W8A8Weight:
    """int8 [out, in] with float32 scales [out]."""
    if has_int8_inputs:
        return W8A8Weight(weight.contiguous(), scales.contiguous(), input_scale, *weight.shape)
    return W8A16Weight(linear_words.pack(weight, num_bits=8), scales.contiguous(), *weight.shape)


def pack_int4(weight: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor) -> W4A16Weight:
    """uint8 in 0 .. 15 [out, in], scales and minima [out, in / group_size]."""
    num_out, num_in = weight.shape
    return W4A16Weight(
        linear_words.pack(weight, num_bits=4),
        linear_w4a16.pack_factors(scales, num_in),
        linear_w4a16.pack_factors(minima, num_in),
        num_in // scales.shape[1],
        num_out,
        num_in,
    )


def pack_float8(weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] | None) -> Fp8Weight:
    """float8_e4m3fn [out, in] with float32 scales, [out] or one per block."""
    return Fp8Weight(weight.contiguous(), scales.contiguous(), block, *weight.shape)


def _side_by_side(x: torch.Tensor) -> torch.Tensor:
    """x with a row's inputs side by side."""
    return x if x.stride(1) == 1 else x.contiguous()
