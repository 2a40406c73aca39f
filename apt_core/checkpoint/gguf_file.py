"""GGUF files (ggml-org/ggml docs/gguf.md): metadata and tensors, as they are stored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as QuantType
from gguf import GGUFReader, dequantize
from gguf.gguf_reader import ReaderTensor

from apt_core.document import Document
from apt_core.errors import CheckpointError

_READABLE = frozenset(
    {
        QuantType.F32,
        QuantType.F16,
        QuantType.BF16,
        QuantType.Q8_0,
        QuantType.Q4_0,
        QuantType.Q4_1,
        QuantType.Q4_K,
        QuantType.Q5_K,
        QuantType.Q6_K,
    }
)


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a file."""

    name: str
    shape: tuple[int, ...]
    """Slowest dimension first, as in torch; a GGUF lists them the other way round."""
    stored: ReaderTensor

    def dequantize(self) -> npt.NDArray[np.float32]:
        """Its values, float32, in ``shape``."""
        return np.ascontiguousarray(dequantize(self.stored.data, self.stored.tensor_type)).reshape(self.shape)


@dataclass(frozen=True)
class GGUFFile:
    """An opened file; its tensors are memory-mapped."""

    path: Path
    metadata: Document
    tensors: dict[str, GGUFTensor]

    @property
    def architecture(self) -> str:
        """Prefix of the model's metadata keys, such as llama."""
        return self.metadata.text("general.architecture")


def open_gguf(path: Path) -> GGUFFile:
    """Open a file and check that all of it is there and readable.

    Raises:
        CheckpointError: the file is missing, truncated or damaged, or has a tensor of an element type that is not read.
    """
    try:
        reader = _BoundedReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror or error})", file=path) from None
    except Exception as error:
        # The gguf package checks little: damage surfaces as whichever exception its parsing runs into.
        raise CheckpointError(f"is truncated or not a GGUF file ({error})", file=path) from None
    if reader.byte_order == "S":
        raise CheckpointError("is of the other byte order", file=path)
    if metadata.get("split.count", 1) not in (0, 1):
        raise CheckpointError("files split into several parts are not read; merge them", file=path, field="split.count")
    tensors = {tensor.name: _tensor(path, tensor) for tensor in reader.tensors}
    return GGUFFile(path, Document(metadata, str(path)), tensors)


def _tensor(path: Path, stored: ReaderTensor) -> GGUFTensor:
    if stored.tensor_type not in _READABLE:
        names = ", ".join(sorted(kind.name for kind in _READABLE))
        raise CheckpointError(
            f"element type {stored.tensor_type.name} is not read; read are {names}", file=path, field=stored.name
        )
    return GGUFTensor(stored.name, tuple(int(size) for size in reversed(stored.shape)), stored)


class _BoundedReader(GGUFReader):
    """A reader that refuses to read beyond the end of the file, where the original returns fewer elements."""

    def _get(
        self,
        offset: int,
        dtype: npt.DTypeLike,
        count: int = 1,
        override_order: Literal["I", "S", "<"] | None = None,
    ) -> npt.NDArray[Any]:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError(f"{end} bytes expected, {len(self.data)} there")
        return super()._get(offset, dtype, count, override_order)
