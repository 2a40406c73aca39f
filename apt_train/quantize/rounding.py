"""The values that a scheme's weights can take, and weights rounded to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from apt_core.checkpoint.formats.compressed_tensors_writer import WritableWeight
from apt_core.quantization import Float8Weight, Int8Tensor
from apt_core.quantization.float8 import LARGEST as LARGEST_FLOAT8
from apt_core.quantization.grouped import ZERO, grouped_weight, symmetric_codes, symmetric_scales
from apt_core.quantization.int8 import LARGEST as LARGEST_INT8
from apt_train.quantize.settings import Scheme


@dataclass(frozen=True)
class Rounder:
    """A value is a code times the scale that it shares with its group; groups are runs of inputs of one output."""

    scheme: Scheme
    int4_group_size: int

    def group_size(self, num_inputs: int) -> int:
        """Inputs that share a scale."""
        return self.int4_group_size if self.scheme == "w4a16" else num_inputs

    def scales(self, groups: torch.Tensor) -> torch.Tensor:
        """Of weights [..., group size], [...] float32: such that the largest is a code."""
        if self.scheme == "w4a16":
            return symmetric_scales(groups)
        return groups.abs().amax(-1) / (LARGEST_FLOAT8 if self.scheme == "fp8" else LARGEST_INT8)

    def codes(self, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Nearest codes of weights, as floats; scales broadcast. Where a scale is 0, 0."""
        if self.scheme == "w4a16":
            return symmetric_codes(weight, scales).sub_(ZERO)
        scaled = weight * torch.where(scales == 0, torch.zeros_like(scales), 1 / scales)
        if self.scheme == "fp8":
            return scaled.clamp_(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(torch.float8_e4m3fn).float()
        return scaled.round_().clamp_(-LARGEST_INT8, LARGEST_INT8)

    def nearest(self, weight: torch.Tensor, largest_inputs: torch.Tensor) -> WritableWeight:
        """A float weight [out, in], whose inputs reach the magnitudes [in], rounded to nearest."""
        groups = weight.detach().float().unflatten(1, (-1, self.group_size(weight.shape[1])))
        scales = self.scales(groups)
        return self.stored(self.codes(groups, scales.unsqueeze(2)).flatten(1), scales, largest_inputs)

    def stored(self, codes: torch.Tensor, scales: torch.Tensor, largest_inputs: torch.Tensor) -> WritableWeight:
        """From codes [out, in] and scales [out, groups], as ``codes`` and ``scales`` give them."""
        match self.scheme:
            case "w8a8-dynamic":
                return Int8Tensor(codes.to(torch.int8), scales.squeeze(1), has_int8_inputs=True)
            case "w8a8-static":
                scale = largest_inputs.amax().item() / LARGEST_INT8 or 1.0
                return Int8Tensor(codes.to(torch.int8), scales.squeeze(1), has_int8_inputs=True, input_scale=scale)
            case "w4a16":
                return grouped_weight(codes + ZERO, scales)
            case "fp8":
                return Float8Weight(codes.to(torch.float8_e4m3fn), scales, (1, codes.shape[1]))
