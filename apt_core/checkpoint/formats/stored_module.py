"""The tensors that a quantized checkpoint stores for one linear layer, read so that faults name file and tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from apt_core.errors import CheckpointError
from apt_core.quantization import StoredWeight


class TensorSource(Protocol):
    """Tensors by name, from one file or many."""

    def get(self, name: str) -> torch.Tensor:
        """A CPU tensor in its stored dtype, perhaps a view of a mapped file."""

    def file_of(self, name: str) -> Path:
        """Where it lies; of a name that is nowhere, where all of them lie."""


class WeightFormat(Protocol):
    """How a checkpoint stores the weights of its linear layers: one implementation a format."""

    def takes(self, module: str, parts: frozenset[str]) -> frozenset[str]:
        """Those of a module's stored parts (such as qweight) that ``read`` uses, or that mean nothing here.

        Args:
            module: its name, such as model.layers.0.mlp.up_proj.
            parts: names of all its tensors, without the module's.
        """

    def read(self, module: StoredModule) -> StoredWeight | torch.Tensor | None:
        """The weight [out, in] of a module whose parts it takes; None where they hold no weight.

        Raises:
            CheckpointError: a part is missing or does not fit.
        """


@dataclass(frozen=True)
class StoredModule:
    """One linear layer's tensors."""

    name: str
    parts: frozenset[str]
    source: TensorSource

    def has(self, part: str) -> bool:
        """Whether it is stored."""
        return part in self.parts

    def tensor(self, part: str, *dtypes: torch.dtype) -> torch.Tensor:
        """A copy of one of its tensors, of one of these dtypes.

        Raises:
            CheckpointError: it is missing or of another dtype.
        """
        if part not in self.parts:
            raise self.error(part, "is missing")
        tensor = self.source.get(f"{self.name}.{part}")
        if dtypes and tensor.dtype not in dtypes:
            expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            found = str(tensor.dtype).removeprefix("torch.")
            raise self.error(part, f"has element type {found}, expected {expected}")
        return tensor.clone()

    def matrix(self, part: str, *dtypes: torch.dtype) -> torch.Tensor:
        """A tensor of two dimensions; see ``tensor``."""
        tensor = self.tensor(part, *dtypes)
        self.require(tensor.dim() == 2, part, tensor, "two dimensions")
        return tensor

    def scales(self, part: str) -> torch.Tensor:
        """A tensor of finite floats, in their own dtype; see ``tensor``."""
        scales = self.tensor(part)
        if not scales.is_floating_point():
            raise self.error(part, f"has element type {str(scales.dtype).removeprefix('torch.')}, expected floats")
        if not bool(scales.float().isfinite().all()):
            raise self.error(part, "has an infinity or NaN")
        return scales

    def require(self, fits: bool, part: str, tensor: torch.Tensor, expected: str) -> None:
        """CheckpointError if a tensor does not have the shape that is expected."""
        if not fits:
            raise self.error(part, f"has shape {list(tensor.shape)}, expected {expected}")

    def error(self, part: str, message: str) -> CheckpointError:
        """The error to raise for a bad tensor."""
        name = f"{self.name}.{part}"
        return CheckpointError(message, file=self.source.file_of(name), field=name)


LINEARS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"})


def is_linear(module: str) -> bool:
    """Whether a module's name is that of a linear layer."""
    return module.rpartition(".")[2] in LINEARS


def parts_of(names: Mapping[str, Path]) -> dict[str, frozenset[str]]:
    """The parts of each module, from the names of all tensors."""
    parts: dict[str, set[str]] = {}
    for name in names:
        module, _, part = name.rpartition(".")
        parts.setdefault(module, set()).add(part)
    return {module: frozenset(found) for module, found in parts.items()}
