"""GPTQ, 4 and 8 bits, as AutoGPTQ and GPTQModel store it (AutoGPTQ/AutoGPTQ auto_gptq/nn_modules/qlinear).

A layer [out, in] has qweight int32 [in * bits / 32, out], qzeros int32 [groups, out * bits / 32], scales [groups, out]
and g_idx int32 [in], the group of each input: value = scale * (code - zero). A word of qweight holds neighbouring
inputs, one of qzeros neighbouring outputs, the lowest bits first. Format gptq stores zero - 1, gptq_v2 the zero itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from apt_core.checkpoint.formats.bits import unpack_int32
from apt_core.checkpoint.formats.groups import group_size_of
from apt_core.checkpoint.formats.stored_module import StoredModule
from apt_core.document import Document
from apt_core.quantization import GroupedWeight

PARTS = frozenset({"qweight", "qzeros", "scales", "g_idx"})


@dataclass(frozen=True)
class GPTQ:
    """Reads GPTQ's parts."""

    num_bits: int
    group_size: int | None
    """Inputs that share a scale; None for all of them."""
    zero_offset: int
    """What has been subtracted from the stored zeros."""

    @classmethod
    def parse(cls, config: Document) -> GPTQ:
        """From a quantization_config.

        Raises:
            CheckpointError: a layout, a number of bits or a group size that is not read; names the key.
        """
        if (bits := config.integer("bits")) not in (4, 8):
            raise config.error("bits", f"{bits} bits are not read; GPTQ is read with 4 and 8")
        format_key = "checkpoint_format" if config.has("checkpoint_format") else "format"
        layout = config.text(format_key, "gptq").lower()
        if layout not in ("gptq", "gptq_v2"):
            raise config.error(format_key, f"{layout!r} is not read; read are 'gptq' and 'gptq_v2'")
        _refuse_overrides(config)
        return cls(bits, group_size_of(config, "group_size"), 1 if layout == "gptq" else 0)

    def takes(self, module: str, parts: frozenset[str]) -> frozenset[str]:
        """See WeightFormat."""
        return parts & PARTS

    def read(self, module: StoredModule) -> GroupedWeight:
        """See WeightFormat."""
        codes = unpack_int32(module.matrix("qweight", torch.int32).T, self.num_bits)
        num_out, num_in = codes.shape
        group_size = self.group_size or num_in
        module.require(num_in % group_size == 0, "qweight", codes.T, f"inputs in groups of {group_size}")
        num_groups, num_words = num_in // group_size, num_out * self.num_bits // 32
        scales = module.scales("scales")
        module.require(scales.shape == (num_groups, num_out), "scales", scales, f"[{num_groups}, {num_out}]")
        packed = module.tensor("qzeros", torch.int32)
        module.require(packed.shape == (num_groups, num_words), "qzeros", packed, f"[{num_groups}, {num_words}]")
        # The largest code plus one is the zero that wrapped around when one was subtracted.
        zeros = (unpack_int32(packed, self.num_bits) + self.zero_offset) & (2**self.num_bits - 1)
        index = group_index(module, "g_idx", num_in, num_groups) if module.has("g_idx") else None
        return GroupedWeight(codes, scales.T.contiguous(), zeros.T.contiguous(), self.num_bits, index)


def group_index(module: StoredModule, part: str, num_in: int, num_groups: int) -> torch.Tensor | None:
    """The stored group of each input [in]; None if groups are runs of inputs, as they are without act-order.

    Raises:
        CheckpointError: it is of a wrong shape or names groups that are not there.
    """
    index = module.tensor(part, torch.int32, torch.int64).long()
    module.require(index.shape == (num_in,), part, index, f"[{num_in}]")
    if not bool(((index >= 0) & (index < num_groups)).all()):
        raise module.error(part, f"names a group beyond the {num_groups} there are")
    return None if torch.equal(index, torch.arange(num_in) // (num_in // num_groups)) else index


def _refuse_overrides(config: Document) -> None:
    """GPTQModel's `dynamic`: patterns of layers with other settings, not read, or, after "-:", of layers left alone."""
    overrides = config.child("dynamic")
    for pattern in overrides.values if overrides else ():
        if not pattern.startswith("-:"):
            raise config.error("dynamic", f"settings of some layers only ({pattern!r}) are not read")
