"""compressed-tensors (vllm-project/compressed-tensors): int8, packed 4 and 8 bits, and float8.

A layer [out, in] has, by its group's format,

- int-quantized: weight int8 [out, in], weight_scale;
- float-quantized: weight float8_e4m3fn [out, in], weight_scale, one a layer, an output or a block;
- pack-quantized: weight_packed int32 [out, in * bits / 32], weight_shape [2], weight_scale, and, where codes are
  asymmetric, weight_zero_point int32 [out * bits / 32, groups]. Values are shifted by 2 ** (bits - 1) and packed with
  the first in the lowest bits, weights along the inputs and zero points along the outputs
  (compressors/pack_quantized/helpers.py, pack_to_int32).

value = weight_scale * (weight - weight_zero_point). Scales of the inputs are read and checked, but not needed: products
here make their own for every 32 inputs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from apt_core.checkpoint.formats.bits import unpack_int32
from apt_core.checkpoint.formats.fp8 import block_of, float8_weight
from apt_core.checkpoint.formats.gptq import group_index
from apt_core.checkpoint.formats.groups import group_size_of
from apt_core.checkpoint.formats.stored_module import StoredModule, is_linear
from apt_core.document import Document
from apt_core.quantization import Float8Weight, GroupedWeight, Int8Tensor

log = logging.getLogger(__name__)

WEIGHT_PARTS = frozenset(
    {"weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx"}
)
INPUT_PARTS = frozenset({"input_scale", "input_zero_point"})
KV_CACHE_PARTS = frozenset({f"{kind}_{part}" for kind in ("q", "k", "v", "output") for part in ("scale", "zero_point")})


@dataclass(frozen=True)
class Scheme:
    """How the layers of one config group are stored."""

    targets: tuple[str, ...]
    """Names of layers, patterns after "re:", or Linear."""
    format: str
    """int-quantized, float-quantized or pack-quantized."""
    num_bits: int
    is_symmetric: bool
    group_size: int | None
    """Inputs that share a scale; None for all of them."""
    block: tuple[int, int] | None
    has_input_scale: bool
    """Whether inputs have one and the same scale, which is stored."""
    has_int8_inputs: bool
    """Whether inputs are int8, without a zero point."""


@dataclass(frozen=True)
class CompressedTensors:
    """Reads compressed-tensors' parts."""

    schemes: tuple[Scheme, ...]
    ignored: tuple[str, ...]
    has_kv_cache_scales: bool

    @classmethod
    def parse(cls, config: Document) -> CompressedTensors:
        """From a quantization_config.

        Raises:
            CheckpointError: a format, strategy or type that is not read; names the key.
        """
        _refuse_what_is_not_read(config)
        groups = config.child("config_groups")
        if groups is None or not groups.values:
            raise config.error("config_groups", "is missing")
        schemes = tuple(_scheme(config, group) for name in groups.values if (group := groups.child(name)) is not None)
        if has_kv_cache_scales := config.has("kv_cache_scheme"):
            log.info("%s: %skv_cache_scheme is not used; the setting is the server's", config.file, config.prefix)
        return cls(schemes, tuple(_texts(config, "ignore")), has_kv_cache_scales)

    def takes(self, module: str, parts: frozenset[str]) -> frozenset[str]:
        """See WeightFormat."""
        taken: frozenset[str] = parts & KV_CACHE_PARTS if self.has_kv_cache_scales else frozenset()
        return taken | (parts & (WEIGHT_PARTS | INPUT_PARTS)) if self._scheme_of(module) is not None else taken

    def read(self, module: StoredModule) -> Int8Tensor | GroupedWeight | Float8Weight | None:
        """See WeightFormat."""
        scheme = self._scheme_of(module.name)
        if scheme is None:
            return None
        if scheme.has_input_scale and bool((module.scales("input_scale").float() <= 0).any()):
            raise module.error("input_scale", "is not positive")
        return _READERS[scheme.format](module, scheme)

    def _scheme_of(self, module: str) -> Scheme | None:
        """That of the most specific target: a name before a pattern before a class."""
        if not is_linear(module) or any(_specificity(module, entry) for entry in self.ignored):
            return None
        found = [
            (specificity, scheme)
            for scheme in self.schemes
            for target in scheme.targets
            if (specificity := _specificity(module, target))
        ]
        return max(found, key=lambda match: match[0])[1] if found else None


def _specificity(module: str, target: str) -> int:
    """0 for no match, else how specific it is (utils/match.py, match_targets)."""
    if target == module:
        return 3
    if target.startswith("re:"):
        return 2 if re.match(target.removeprefix("re:"), module) else 0
    return 1 if target == "Linear" else 0


def _refuse_what_is_not_read(config: Document) -> None:
    sparsity = config.child("sparsity_config")
    if sparsity is not None and (kind := sparsity.text("format", "dense")) != "dense":
        raise sparsity.error("format", f"{kind!r} is not read; sparse weights must be stored dense")
    transforms = config.child("transform_config")
    if transforms is not None and transforms.has("config_groups") and transforms.values["config_groups"]:
        raise transforms.error("config_groups", "transforms (rotations) are not applied")


def _scheme(config: Document, group: Document) -> Scheme:
    weights = group.child("weights")
    if weights is None:
        raise group.error("weights", "is missing; groups that quantize something else are not read")
    layout = _layout(config, group, weights)
    num_bits, kind = weights.integer("num_bits", 8), weights.text("type", "int")
    wanted = {"float-quantized": ((8,), "float"), "int-quantized": ((8,), "int"), "pack-quantized": ((4, 8), "int")}
    bits, wanted_kind = wanted[layout]
    if kind != wanted_kind:
        raise weights.error("type", f"{kind!r} is not read with format {layout}; {wanted_kind!r} is")
    if num_bits not in bits:
        raise weights.error("num_bits", f"{num_bits} bits are not read with format {layout}")
    strategy = weights.text("strategy", "group" if weights.has("group_size") else "tensor")
    strategies = ("tensor", "channel", "block") if kind == "float" else ("tensor", "channel", "group")
    if strategy not in strategies:
        problem = f"{strategy!r} is not read with format {layout}; read are {', '.join(strategies)}"
        raise weights.error("strategy", problem)
    inputs = group.child("input_activations")
    return Scheme(
        targets=tuple(_texts(group, "targets")),
        format=layout,
        num_bits=num_bits,
        is_symmetric=weights.boolean("symmetric", True),
        group_size=group_size_of(weights, "group_size") if strategy == "group" else None,
        block=block_of(weights, "block_structure") if strategy == "block" else None,
        has_input_scale=inputs is not None and inputs.values.get("dynamic", False) is False,
        has_int8_inputs=inputs is not None
        and (inputs.integer("num_bits", 8), inputs.text("type", "int")) == (8, "int")
        and inputs.boolean("symmetric", True),
    )


def _layout(config: Document, group: Document, weights: Document) -> str:
    """The group's format, or else the checkpoint's; naive-quantized says the same as the format of its type."""
    place = group if group.has("format") else config
    layout = place.text("format")
    if layout == "naive-quantized":
        return "float-quantized" if weights.text("type", "int") == "float" else "int-quantized"
    if layout not in _READERS:
        raise place.error("format", f"{layout!r} is not read; read are {', '.join(_READERS)}")
    return layout


def _texts(document: Document, key: str) -> list[str]:
    texts = document.items(key)
    if not all(isinstance(text, str) for text in texts):
        raise document.error(key, f"expected names, got {texts!r}")
    for text in texts:
        _check_pattern(document, key, text)
    return texts


def _check_pattern(document: Document, key: str, text: str) -> None:
    try:
        re.compile(text.removeprefix("re:") if text.startswith("re:") else "")
    except re.error as error:
        raise document.error(key, f"{text!r} is no pattern ({error})") from None


def _read_int8(module: StoredModule, scheme: Scheme) -> Int8Tensor | GroupedWeight:
    values = module.matrix("weight", torch.int8)
    scales = _scales(module, scheme, values.shape)
    if scheme.is_symmetric and scales.shape[1] == 1:
        input_scale = None
        if scheme.has_int8_inputs and scheme.has_input_scale and (stored := module.scales("input_scale")).numel() == 1:
            input_scale = float(stored)
        return Int8Tensor(values, scales.float().squeeze(1), scheme.has_int8_inputs, input_scale)
    zeros = torch.zeros_like(scales, dtype=torch.int8)
    if not scheme.is_symmetric:
        zeros = module.tensor("weight_zero_point", torch.int8)
        fits = zeros.numel() in (1, scales.numel())
        module.require(fits, "weight_zero_point", zeros, str(list(scales.shape)))
        zeros = (zeros.reshape(scales.shape) if zeros.numel() > 1 else zeros.expand(scales.shape)).contiguous()
    return GroupedWeight(_shifted(values), scales, _shifted(zeros), num_bits=8)


def _shifted(values: torch.Tensor) -> torch.Tensor:
    """int8 + 128 as uint8."""
    shifted: torch.Tensor = values.view(torch.uint8) ^ 128
    return shifted


def _read_float8(module: StoredModule, scheme: Scheme) -> Float8Weight:
    return float8_weight(module, "weight_scale", scheme.block)


def _read_packed(module: StoredModule, scheme: Scheme) -> GroupedWeight:
    shape = torch.Size(module.tensor("weight_shape", torch.int32, torch.int64).reshape(-1).tolist())
    packed = module.matrix("weight_packed", torch.int32)
    fits = len(shape) == 2 and packed.shape == (shape[0], -(-shape[1] * scheme.num_bits // 32))
    module.require(fits, "weight_packed", packed, f"that of {list(shape)} in {scheme.num_bits} bits")
    codes = unpack_int32(packed, scheme.num_bits)[:, : shape[1]].contiguous()
    scales = _scales(module, scheme, shape)
    index = None
    if module.has("weight_g_idx") and scales.shape[1] > 1:
        index = group_index(module, "weight_g_idx", shape[1], scales.shape[1])
    return GroupedWeight(codes, scales, _packed_zeros(module, scheme, scales), scheme.num_bits, index)


def _packed_zeros(module: StoredModule, scheme: Scheme, scales: torch.Tensor) -> torch.Tensor:
    """[out, groups] uint8, shifted as the codes are; the strategy `tensor` stores them unpacked."""
    if scheme.is_symmetric:
        return torch.full(scales.shape, 2 ** (scheme.num_bits - 1), dtype=torch.uint8)
    zeros = module.tensor("weight_zero_point", torch.int32, torch.int8)
    if zeros.dtype == torch.int8 and zeros.numel() == 1:
        return torch.full(scales.shape, int(zeros) + 2 ** (scheme.num_bits - 1), dtype=torch.uint8)
    num_out, num_groups = scales.shape
    num_words = -(-num_out * scheme.num_bits // 32)
    module.require(zeros.shape == (num_words, num_groups), "weight_zero_point", zeros, f"[{num_words}, {num_groups}]")
    return unpack_int32(zeros.T, scheme.num_bits)[:, :num_out].T.contiguous()


def _scales(module: StoredModule, scheme: Scheme, shape: torch.Size) -> torch.Tensor:
    """[out, groups], whatever the strategy."""
    num_out, num_in = shape
    size = scheme.group_size or num_in
    if num_in % size:
        raise module.error("weight_scale", f"groups of {size} do not divide {num_in} inputs")
    scales = module.scales("weight_scale")
    if scheme.group_size is None and scales.numel() == 1:
        return scales.reshape(1, 1).expand(num_out, 1).contiguous()
    expected = (num_out, num_in // size)
    fits = scales.shape == expected or (expected[1] == 1 and scales.shape == (num_out,))
    module.require(fits, "weight_scale", scales, str(list(expected)))
    return scales.reshape(expected)


_READERS: dict[str, Callable[[StoredModule, Scheme], Int8Tensor | GroupedWeight | Float8Weight]] = {
    "int-quantized": _read_int8,
    "float-quantized": _read_float8,
    "pack-quantized": _read_packed,
}
