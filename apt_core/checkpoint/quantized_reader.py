"""Weights of a quantized checkpoint, one at a time, by the names of the parameters they belong to."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from apt_core.checkpoint.formats import StoredModule, WeightFormat, parts_of
from apt_core.checkpoint.safetensors_reader import TensorFiles, WeightFile
from apt_core.quantization import StoredWeight


def read_weights(
    files: tuple[WeightFile, ...], weight_format: WeightFormat
) -> Iterator[tuple[str, torch.Tensor | StoredWeight]]:
    """Parameter name and weight: what the format takes of a module as one weight, all else as it is stored.

    The parts of a module may lie in different files.

    Raises:
        CheckpointError: a part is missing or does not fit, or a file has been damaged since it was opened.
    """
    source = TensorFiles(files)
    for module, parts in parts_of(source.paths).items():
        taken = weight_format.takes(module, parts)
        if taken and (weight := weight_format.read(StoredModule(module, taken, source))) is not None:
            yield f"{module}.weight", weight
        for part in sorted(parts - taken):
            name = f"{module}.{part}" if module else part
            yield name, source.get(name)
