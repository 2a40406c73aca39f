"""Parts of weights in fewer bits: they dequantize to the parts of the whole, and no group is cut."""

import pytest
import torch

from apt_core.quantization import Float8Weight, GroupedWeight, quantize_int4, quantize_int8


def grouped(num_groups, index=None):
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (48, 192), dtype=torch.uint8)
    zeros = torch.randint(0, 16, (48, num_groups), dtype=torch.uint8)
    return GroupedWeight(codes, torch.rand(48, num_groups), zeros, num_bits=4, group_index=index)


def float8(block, rows=48, columns=192):
    torch.manual_seed(0)
    values = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    return Float8Weight(values, torch.rand(-(-rows // block[0]), -(-columns // block[1])), block)


def floats():
    return torch.randn(48, 192, generator=torch.Generator().manual_seed(0))


WEIGHTS = {
    "int8": quantize_int8(floats()),
    "int4": quantize_int4(floats()),
    "groups": grouped(6),
    "one group": grouped(1),
    "groups in any order": grouped(3, torch.randint(0, 3, (192,))),
    "float8 in blocks": float8((16, 32)),
    "float8 by output": float8((1, 192)),
    "float8 with one scale": float8((48, 192)),
}


@pytest.mark.parametrize(("dim", "start", "length"), [(0, 0, 16), (0, 32, 16), (1, 0, 96), (1, 96, 96), (1, 160, 32)])
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_part_dequantizes_to_the_part_of_the_whole(name, dim, start, length):
    weight = WEIGHTS[name]
    part = weight.narrow(dim, start, length)
    assert part.shape == weight.dequantize().narrow(dim, start, length).shape
    assert torch.equal(part.dequantize(), weight.dequantize().narrow(dim, start, length))


@pytest.mark.parametrize(
    ("name", "dim", "start", "length"),
    [
        ("int4", 1, 16, 32),
        ("int4", 1, 0, 48),
        ("groups", 1, 0, 48),
        ("float8 in blocks", 0, 8, 16),
        ("float8 in blocks", 1, 0, 16),
    ],
)
def test_a_group_is_not_cut(name, dim, start, length):
    with pytest.raises(ValueError, match=r"^a group of \d+ that share a scale would be cut$"):
        WEIGHTS[name].narrow(dim, start, length)


def test_the_last_block_may_be_cut_off_already():
    weight = float8((32, 128), rows=48)
    assert torch.equal(weight.narrow(0, 32, 16).dequantize(), weight.dequantize()[32:])
    assert torch.equal(weight.narrow(1, 128, 64).dequantize(), weight.dequantize()[:, 128:])
