"""What ``compressed_tensors`` reads, written: a layer's tensors, and the configuration that says what they mean.

Both follow from the stored weight alone, so that configuration and tensors cannot differ.
"""

from __future__ import annotations

from typing import Any

import torch

from apt_core.checkpoint.formats.bits import pack_int32
from apt_core.quantization import Float8Weight, GroupedWeight, Int8Tensor

WritableWeight = Int8Tensor | GroupedWeight | Float8Weight
"""int8 with a scale per output, symmetric codes in groups of neighbours, float8 with a scale per output."""


def stored_parts(weight: WritableWeight) -> dict[str, torch.Tensor]:
    """The tensors of one linear layer, by the name of the part."""
    match weight:
        case Int8Tensor():
            parts = {"weight": weight.values, "weight_scale": weight.scales.unsqueeze(1)}
            if weight.input_scale is not None:
                parts["input_scale"] = torch.tensor([weight.input_scale])
            return parts
        case GroupedWeight():
            _check_symmetric(weight)
            return {
                "weight_packed": pack_int32(weight.codes, weight.num_bits),
                "weight_scale": weight.scales,
                "weight_shape": torch.tensor(weight.shape),
            }
        case Float8Weight():
            assert weight.scales.shape == (weight.shape[0], 1), "one scale per output"
            return {"weight": weight.values, "weight_scale": weight.scales}


def quantization_config(weight: WritableWeight, ignored: tuple[str, ...] = ("lm_head",)) -> dict[str, Any]:
    """config.json's quantization_config of a model all of whose linear layers are stored as this one is.

    Args:
        weight: any of them.
        ignored: names of those that are not.
    """
    inputs: dict[str, Any] | None = None
    match weight:
        case Int8Tensor():
            layout, weights = "int-quantized", _numbers(8, "int", "channel")
            if weight.has_int8_inputs:
                is_dynamic = weight.input_scale is None
                inputs = _numbers(8, "int", "token" if is_dynamic else "tensor", is_dynamic=is_dynamic)
        case GroupedWeight():
            layout, weights = "pack-quantized", _numbers(weight.num_bits, "int", "group")
            weights["group_size"] = weight.shape[1] // weight.scales.shape[1]
        case Float8Weight():
            layout, weights = "float-quantized", _numbers(8, "float", "channel")
            inputs = _numbers(8, "float", "token", is_dynamic=True)
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignored),
    }


def _numbers(num_bits: int, kind: str, strategy: str, *, is_dynamic: bool = False) -> dict[str, Any]:
    return {"num_bits": num_bits, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": is_dynamic}


def _check_symmetric(weight: GroupedWeight) -> None:
    assert weight.group_index is None, "groups must be runs of neighbouring inputs"
    assert bool((weight.zeros == 2 ** (weight.num_bits - 1)).all()), "zero points are not written"
