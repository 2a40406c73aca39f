"""AWQ, 4 bits, as AutoAWQ's WQLinear_GEMM stores it (casper-hansen/AutoAWQ awq/modules/linear/gemm.py).

A layer [out, in] has qweight int32 [in, out / 8], qzeros int32 [groups, out / 8] and scales [groups, out]:
value = scale * (code - zero). A word holds eight outputs, the lowest bits first, in the order of PACKING_ORDER
(awq/utils/packing_utils.py, AWQ_ORDER).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from apt_core.checkpoint.formats.bits import unpack_int32
from apt_core.checkpoint.formats.groups import group_size_of
from apt_core.checkpoint.formats.stored_module import StoredModule
from apt_core.document import Document
from apt_core.quantization import GroupedWeight

PACKING_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of a word's eight outputs lies in its first four bits, its second four, and so on."""
SYMMETRIC_ZERO = 8
"""Where a checkpoint without zero points has its zero."""

PARTS = frozenset({"qweight", "qzeros", "scales"})


@dataclass(frozen=True)
class AWQ:
    """Reads AWQ's parts."""

    group_size: int | None
    """Inputs that share a scale; None for all of them."""
    has_zeros: bool

    @classmethod
    def parse(cls, config: Document) -> AWQ:
        """From a quantization_config.

        Raises:
            CheckpointError: a layout, a number of bits or a group size that is not read; names the key.
        """
        bits_key = "bits" if config.has("bits") else "w_bit"
        if (bits := config.integer(bits_key, 4)) != 4:
            raise config.error(bits_key, f"{bits} bits are not read; AWQ is read with 4")
        if (version := config.text("version", "gemm").lower()) != "gemm":
            raise config.error("version", f"{version!r} is not read; AWQ is read as 'gemm'")
        group_key = "group_size" if config.has("group_size") else "q_group_size"
        return cls(group_size_of(config, group_key), config.boolean("zero_point", True))

    def takes(self, module: str, parts: frozenset[str]) -> frozenset[str]:
        """See WeightFormat."""
        return parts & PARTS

    def read(self, module: StoredModule) -> GroupedWeight:
        """See WeightFormat."""
        codes = _unpack(module.matrix("qweight", torch.int32)).T.contiguous()
        num_out, num_in = codes.shape
        scales = module.scales("scales")
        group_size = self.group_size or num_in
        module.require(num_in % group_size == 0, "qweight", codes.T, f"inputs in groups of {group_size}")
        shape = (num_out, num_in // group_size)
        module.require(scales.shape == shape[::-1], "scales", scales, str(list(shape[::-1])))
        scales = scales.T.contiguous()
        if not self.has_zeros and not module.has("qzeros"):
            return GroupedWeight(codes, scales, torch.full(shape, SYMMETRIC_ZERO, dtype=torch.uint8), num_bits=4)
        packed = module.tensor("qzeros", torch.int32)
        module.require(packed.shape == (shape[1], num_out // 8), "qzeros", packed, f"[{shape[1]}, {num_out // 8}]")
        return GroupedWeight(codes, scales, _unpack(packed).T.contiguous(), num_bits=4)


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    """[rows, words] int32 -> [rows, 8 * words] uint8, in order."""
    position = torch.tensor(PACKING_ORDER).argsort()
    columns: torch.Tensor = unpack_int32(packed, 4).unflatten(1, (-1, 8))[:, :, position].flatten(1)
    return columns
