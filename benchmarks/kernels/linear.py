"""Products with packed weights beside torch's with bfloat16 ones, and its bare ones with 8 bits.

At few rows a product should read its weight at the machine's bandwidth, at many multiply at its rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from apt_core.model_config import ModelConfig
from apt_kernels import ops
from apt_kernels.cpu import linear as cpu_linear
from benchmarks.kernels.case import Call, Case, Maker, Work
from benchmarks.kernels.sizes import FP8, Sizes

MOST_HEAD_ROWS = 256
"""The output head sees one row a sequence, however long its prompt."""


@dataclass(frozen=True)
class Kind:
    """How a weight is kept."""

    weight_bytes: float
    """Of one weight, its group's scale and minimum included."""
    multiplied_in: torch.dtype
    pack: Callable[[int, int, torch.device], ops.PackedWeight]
    """Random weights [out, in]."""
    op: str | None = None
    """As `apt_kernels.triton.tuning` calls it; None: on processors only."""


def _pack_plain(num_out: int, num_in: int, device: torch.device) -> ops.PackedWeight:
    return ops.pack_linear_weight(torch.randn(num_out, num_in, device=device).bfloat16())


def _pack_int8(num_out: int, num_in: int, device: torch.device, *, has_int8_inputs: bool = False) -> ops.PackedWeight:
    codes = torch.randint(-127, 128, (num_out, num_in), dtype=torch.int8, device=device)
    return ops.pack_int8_weight(codes, torch.rand(num_out, device=device), has_int8_inputs=has_int8_inputs)


def _pack_int4(num_out: int, num_in: int, device: torch.device, *, group_size: int = 32) -> ops.PackedWeight:
    codes = torch.randint(0, 16, (num_out, num_in), dtype=torch.uint8, device=device)
    scales = torch.rand(num_out, num_in // group_size, device=device)
    return ops.pack_int4_weight(codes, scales, -8 * scales)


def _pack_fp8(num_out: int, num_in: int, device: torch.device) -> ops.PackedWeight:
    codes = torch.randn(num_out, num_in, device=device).to(FP8)
    return ops.pack_float8_weight(codes, torch.rand(num_out, device=device))


KINDS = {
    "bfloat16": Kind(2, torch.bfloat16, _pack_plain),
    "int8": Kind(1, torch.int8, _pack_int8),
    "int4": Kind(0.5 + 4 / 32, torch.int8, _pack_int4),
    "w8a16": Kind(1, torch.bfloat16, _pack_int8, "linear_w8a16"),
    "w4a16": Kind(0.5 + 4 / 128, torch.bfloat16, partial(_pack_int4, group_size=128), "linear_w4a16"),
    "w8a8": Kind(1, torch.int8, partial(_pack_int8, has_int8_inputs=True), "linear_w8a8"),
    "fp8": Kind(1, FP8, _pack_fp8, "linear_fp8"),
}


def cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Every layer's weight in every kind at every number of rows."""
    for name, model in sizes.models:
        for layer, (num_out, num_in) in layer_shapes(model).items():
            for kind in sizes.weights:
                for rows in sizes.rows:
                    if layer == "head" and rows > MOST_HEAD_ROWS:
                        continue
                    yield _case(f"{name} {layer}", kind, rows, num_out, num_in, sizes.dtype, device)


def layer_shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the products of a model, projections fused."""
    width, heads = model.hidden_size, model.num_heads * model.head_dim
    return {
        "qkv": (heads + 2 * model.num_kv_heads * model.head_dim, width),
        "o": (width, heads),
        "gate+up": (2 * model.intermediate_size, width),
        "down": (width, model.intermediate_size),
        "head": (model.vocab_size, width),
    }


def _case(
    layer: str, kind_name: str, rows: int, num_out: int, num_in: int, dtype: torch.dtype, device: torch.device
) -> Case:
    kind = KINDS[kind_name]
    num_bytes = num_out * num_in * kind.weight_bytes + rows * (num_in + num_out) * dtype.itemsize

    def ours() -> Call:
        return partial(ops.packed_linear, _x(rows, num_in, dtype, device), kind.pack(num_out, num_in, device))

    return Case(
        f"linear {kind_name}",
        f"{layer} {num_out}x{num_in} rows {rows}",
        Work(num_bytes, 2.0 * rows * num_out * num_in, kind.multiplied_in),
        ours,
        _peers(kind, rows, num_out, num_in, device),
        {} if kind.op is None else {kind.op: (rows, num_out, num_in)},
    )


def _peers(kind: Kind, rows: int, num_out: int, num_in: int, device: torch.device) -> dict[str, Maker]:
    """What torch has. The products in 8 bits get inputs in 8 bits already: less than a linear layer needs."""
    x = partial(_x, rows, num_in, torch.bfloat16, device)

    def weight() -> torch.Tensor:
        return torch.randn(num_out, num_in, device=device).bfloat16()

    def int_mm() -> Call:
        codes = torch.randint(-127, 128, (num_out, num_in), dtype=torch.int8, device=device)
        return partial(torch._int_mm, x().to(torch.int8), codes.T)

    def scaled_mm() -> Call:
        one = torch.ones((), device=device)
        return partial(
            torch._scaled_mm, x().to(FP8), weight().to(FP8).T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16
        )

    def onednn() -> Call:
        return partial(_onednn, x(), torch.ops.mkldnn._reorder_linear_weight(weight(), cpu_linear.PACK_BATCH))

    peers: dict[str, Maker] = {"F.linear": lambda: partial(F.linear, x(), weight())}
    if device.type == "cpu":
        peers["onednn"] = onednn
    if kind.multiplied_in == torch.int8 and kind.weight_bytes == 1 and (device.type == "cpu" or rows >= 17):
        peers["int_mm"] = int_mm  # on a GPU it takes no fewer rows
    if kind.multiplied_in == FP8:
        peers["scaled_mm"] = scaled_mm
    return peers


def _onednn(x: torch.Tensor, weight: torch.Tensor) -> object:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _x(rows: int, num_in: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(rows, num_in, device=device).to(dtype)
