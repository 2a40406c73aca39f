"""Formats of quantized checkpoints: one file each says how the tensors of a linear layer become its weight."""

from __future__ import annotations

from collections.abc import Callable

from apt_core.checkpoint.formats.awq import AWQ
from apt_core.checkpoint.formats.compressed_tensors import CompressedTensors
from apt_core.checkpoint.formats.fp8 import FP8
from apt_core.checkpoint.formats.gptq import GPTQ
from apt_core.checkpoint.formats.stored_module import StoredModule, WeightFormat, parts_of
from apt_core.document import Document

__all__ = ["StoredModule", "WeightFormat", "parse_weight_format", "parts_of"]

FORMATS: dict[str, Callable[[Document], WeightFormat]] = {
    "awq": AWQ.parse,
    "compressed-tensors": CompressedTensors.parse,
    "fp8": FP8.parse,
    "gptq": GPTQ.parse,
}
"""By quant_method."""


def parse_weight_format(config: Document) -> WeightFormat | None:
    """The format a config.json declares, or None for plain weights.

    Raises:
        CheckpointError: a format that is not read, or a setting of it that is not; names the key.
    """
    key = "quantization_config" if config.has("quantization_config") else "compression_config"
    declared = config.child(key)
    if declared is None:
        return None
    method = declared.text("quant_method", "compressed-tensors" if key == "compression_config" else None)
    if method not in FORMATS:
        raise declared.error("quant_method", f"{method!r} is not read; read are {', '.join(FORMATS)}")
    return FORMATS[method](declared)
