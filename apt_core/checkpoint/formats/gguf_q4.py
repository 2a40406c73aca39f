"""GGUF's Q4_0 and Q4_1 (ggml-org/ggml src/ggml-common.h, block_q4_0 and block_q4_1), as the cache keeps them.

A block of 32 inputs has a float16 scale d, Q4_1 also a minimum m, and 16 bytes of codes, of which the low halves are
the first 16 inputs. Q4_0 is d * (code - 8), Q4_1 is d * code + m. As -8 d is exact in float16, int4's scale and minimum
hold both as they are. A layer [out, in] lies in the cache as weight_codes uint8 [out, in / 2], the blocks' bytes one
after the other, weight_scale and weight_minimum float16 [out, in / 32], beside its dequantized weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as QuantType

from apt_core.checkpoint.formats.stored_module import StoredModule, is_linear
from apt_core.quantization import Int4Tensor

PARTS = frozenset({"weight_codes", "weight_scale", "weight_minimum"})
_HEADER_BYTES = {QuantType.Q4_0: 2, QuantType.Q4_1: 4}
_CODE_BYTES = 16


def q4_parts(module: str, kind: QuantType, rows: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[Any]]:
    """The parts of a linear layer from the bytes of its blocks [out, bytes]; none for other layers and types."""
    if kind not in _HEADER_BYTES or not is_linear(module):
        return {}
    size = _HEADER_BYTES[kind]
    blocks = rows.reshape(rows.shape[0], -1, size + _CODE_BYTES)
    factors = np.ascontiguousarray(blocks[:, :, :size]).view(np.float16)
    scale = factors[:, :, 0]
    minimum = factors[:, :, 1] if kind == QuantType.Q4_1 else scale * np.float16(-8)
    codes = blocks[:, :, size:].reshape(rows.shape[0], -1)
    return {"weight_codes": codes, "weight_scale": scale, "weight_minimum": minimum}


@dataclass(frozen=True)
class GGUFQ4:
    """Reads the parts that ``q4_parts`` makes."""

    def takes(self, module: str, parts: frozenset[str]) -> frozenset[str]:
        """See WeightFormat."""
        return parts & (PARTS | {"weight"}) if "weight_codes" in parts else frozenset()

    def read(self, module: StoredModule) -> Int4Tensor:
        """See WeightFormat."""
        codes = module.matrix("weight_codes", torch.uint8).unflatten(1, (-1, _CODE_BYTES))
        values = torch.cat((codes & 15, codes >> 4), dim=2).flatten(1)
        return Int4Tensor(
            values, module.matrix("weight_scale", torch.float16), module.matrix("weight_minimum", torch.float16)
        )
