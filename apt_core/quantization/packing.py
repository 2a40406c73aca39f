"""Weights, float or stored in fewer bits, packed in the precision that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, cast

import torch

from apt_core.quantization.float8 import Float8Weight, quantize_float8
from apt_core.quantization.int4 import Int4Tensor, quantize_int4
from apt_core.quantization.int8 import Int8Tensor, quantize_int8
from apt_core.quantization.stored import StoredWeight
from apt_kernels import ops

WeightPrecision: TypeAlias = Literal["float32", "bfloat16", "float8", "int8", "int4"]
"""What weights can be kept in; float8 on a GPU only."""
KernelForm: TypeAlias = Int8Tensor | Int4Tensor | Float8Weight | None


def pack_weight(weight: torch.Tensor | StoredWeight, precision: WeightPrecision) -> ops.PackedWeight:
    """A weight [out, in] packed in a precision; see ``pack_weights``."""
    return pack_weights([weight], precision)


def pack_weights(parts: Sequence[torch.Tensor | StoredWeight], precision: WeightPrecision) -> ops.PackedWeight:
    """Weights whose outputs lie side by side, packed as one.

    A weight that is stored in the precision asked for keeps its own values; others are dequantized and made anew.
    Weights whose number of inputs no int4 group divides are packed in int8 instead, and float8 ones whose blocks do not
    fit side by side in bfloat16.
    """
    forms = [None if isinstance(part, torch.Tensor) else part.kernel_form() for part in parts]
    if precision == "int4" and (int4 := _int4(parts, forms)) is not None:
        return ops.pack_int4_weight(int4.values, int4.scales, int4.minima)
    if precision in ("int8", "int4"):
        int8 = [
            form if isinstance(form, Int8Tensor) else quantize_int8(_floats(part))
            for part, form in zip(parts, forms, strict=True)
        ]
        return _pack_int8(int8)
    if precision == "float8":
        stored = [
            form if isinstance(form, Float8Weight) else quantize_float8(_floats(part))
            for part, form in zip(parts, forms, strict=True)
        ]
        if (packed := _pack_float8(stored)) is not None:
            return packed
        precision = "bfloat16"
    dtype: torch.dtype = getattr(torch, precision)
    return ops.pack_linear_weight(_cat([_floats(part, dtype).to(dtype) for part in parts]))


def own_precision(parts: Sequence[torch.Tensor | StoredWeight]) -> WeightPrecision:
    """What weights that are packed as one are kept in, if nothing else is asked for.

    Their own precision where they agree. Where they do not, or have no product, it is bfloat16, or float32 if a plain
    one of them is.
    """
    own = {_precision_of(part) for part in parts}
    if len(own) == 1:
        return own.pop()
    return "float32" if "float32" in own else "bfloat16"


def _precision_of(part: torch.Tensor | StoredWeight) -> WeightPrecision:
    if isinstance(part, torch.Tensor):
        return cast(WeightPrecision, str(part.dtype).removeprefix("torch."))
    form = part.kernel_form()
    if isinstance(form, Int4Tensor):
        return "int4"
    if isinstance(form, Float8Weight):
        return "float8"
    return "int8" if isinstance(form, Int8Tensor) else "bfloat16"


def _int4(parts: Sequence[torch.Tensor | StoredWeight], forms: list[KernelForm]) -> Int4Tensor | None:
    """In groups of the smallest size among them; None if one has inputs that no group divides."""
    tensors = [
        form if isinstance(form, Int4Tensor) else quantize_int4(_floats(part))
        for part, form in zip(parts, forms, strict=True)
    ]
    found = [tensor for tensor in tensors if tensor is not None]
    if len(found) < len(tensors):
        return None
    size = min(tensor.group_size for tensor in found)
    found = [tensor.with_groups_of(size) for tensor in found]
    return Int4Tensor(_cat([x.values for x in found]), _cat([x.scales for x in found]), _cat([x.minima for x in found]))


def _pack_int8(parts: list[Int8Tensor]) -> ops.PackedWeight:
    """Inputs in int8 if all are made for them; a scale of their own only if all name the same."""
    input_scales = {part.input_scale for part in parts}
    return ops.pack_int8_weight(
        _cat([part.values for part in parts]),
        _cat([part.scales for part in parts]),
        has_int8_inputs=all(part.has_int8_inputs for part in parts),
        input_scale=input_scales.pop() if len(input_scales) == 1 else None,
    )


def _pack_float8(parts: list[Float8Weight]) -> ops.PackedWeight | None:
    """None if the parts' blocks differ, or a part that is not the last ends within one."""
    values = torch.cat([part.values.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
    per_output = [scales for part in parts if (scales := part.output_scales()) is not None]
    if len(per_output) == len(parts):
        return ops.pack_float8_weight(values, torch.cat(per_output))
    block = parts[0].block
    if any(part.block != block for part in parts) or any(len(part.values) % block[0] for part in parts[:-1]):
        return None
    return ops.pack_float8_weight(values, torch.cat([part.scales for part in parts]), block)


def _floats(part: torch.Tensor | StoredWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return part.detach() if isinstance(part, torch.Tensor) else part.dequantize(dtype)


def _cat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
