"""Weights of linear layers rounded to nearest, as a scheme says."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from apt_core.checkpoint.formats.compressed_tensors_writer import WritableWeight
from apt_core.quantization import quantize_float8, quantize_grouped, quantize_int8
from apt_core.quantization.int8 import LARGEST
from apt_train.quantize.settings import Scheme


@dataclass(frozen=True)
class Rounder:
    """Makes the stored weight of a float one."""

    scheme: Scheme
    group_size: int

    def round(self, weight: torch.Tensor, largest_inputs: torch.Tensor) -> WritableWeight:
        """A weight [out, in] whose inputs reach the magnitudes [in]."""
        match self.scheme:
            case "w8a8-dynamic":
                return replace(quantize_int8(weight), has_int8_inputs=True)
            case "w8a8-static":
                scale = largest_inputs.amax().item() / LARGEST or 1.0
                return replace(quantize_int8(weight), has_int8_inputs=True, input_scale=scale)
            case "w4a16":
                return quantize_grouped(weight, self.group_size)
            case "fp8-dynamic":
                return quantize_float8(weight)
