"""float8 weights: Hugging Face's quant_method fp8, as transformers' FineGrainedFP8Config writes it.

A layer [out, in] has weight float8_e4m3fn [out, in] and weight_scale_inv, which despite its name is the scale itself:
one per block [out / rows, in / columns], or a single one. Older files call the single one weight_scale. Whether a layer
is quantized shows in its element type. Inputs need no scale here: they are bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from apt_core.checkpoint.formats.stored_module import StoredModule, is_linear
from apt_core.document import Document
from apt_core.quantization import Float8Weight

SCALES = ("weight_scale_inv", "weight_scale")
INPUT_SCALES = frozenset({"input_scale", "activation_scale"})


@dataclass(frozen=True)
class FP8:
    """Reads Hugging Face's fp8 parts."""

    block: tuple[int, int] | None
    """Outputs and inputs that share a scale; None for one scale a layer."""

    @classmethod
    def parse(cls, config: Document) -> FP8:
        """From a quantization_config.

        Raises:
            CheckpointError: an element type or a block that is not read; names the key.
        """
        if (kind := config.text("fmt", "e4m3")) != "e4m3":
            raise config.error("fmt", f"{kind!r} is not read; only e4m3 is")
        return cls(block_of(config, "weight_block_size"))

    def takes(self, module: str, parts: frozenset[str]) -> frozenset[str]:
        """See WeightFormat."""
        return parts & {"weight", *SCALES, *INPUT_SCALES} if is_linear(module) else frozenset()

    def read(self, module: StoredModule) -> Float8Weight | torch.Tensor:
        """See WeightFormat."""
        part = next((name for name in SCALES if module.has(name)), None)
        weight = module.tensor("weight")
        if part is None and weight.dtype != torch.float8_e4m3fn:
            return weight
        return float8_weight(module, part or SCALES[0], self.block)


def float8_weight(module: StoredModule, scale_part: str, block: tuple[int, int] | None) -> Float8Weight:
    """A module's float8 weight with its scales: one a block, or without blocks one or one per output.

    Raises:
        CheckpointError: a part is missing or does not fit.
    """
    values = module.matrix("weight", torch.float8_e4m3fn)
    scales = module.scales(scale_part).float()
    num_out, num_in = values.shape
    if block is not None:
        shape = (-(-num_out // block[0]), -(-num_in // block[1]))
        module.require(scales.shape == shape, scale_part, scales, str(list(shape)))
        return Float8Weight(values, scales, block)
    fits = scales.numel() in (1, num_out) and scales.dim() <= 2 and scales.shape[1:] in ((), (1,))
    module.require(fits, scale_part, scales, f"one or [{num_out}, 1]")
    return Float8Weight(values, scales.reshape(-1, 1), (1 if scales.numel() > 1 else num_out, num_in))


def block_of(config: Document, key: str) -> tuple[int, int] | None:
    """Two sizes, or None where there are none.

    Raises:
        CheckpointError: it is something else.
    """
    if not config.has(key):
        return None
    sizes = config.items(key)
    if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise config.error(key, f"expected the rows and columns of a block, got {sizes!r}")
    return sizes[0], sizes[1]
