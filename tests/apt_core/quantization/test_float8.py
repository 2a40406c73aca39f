import pytest
import torch

from apt_core.quantization import moved, quantize_float8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_off_by_half_a_step_of_e4m3_at_most(dtype):
    torch.manual_seed(0)
    weight = (torch.randn(33, 70) * torch.logspace(-6, 3, 33)[:, None]).to(dtype)
    found = quantize_float8(weight)
    error = (found.dequantize() - weight.float()).abs()
    # Three bits of mantissa; below the smallest normal number, steps of 2^-9 of the row's scale.
    allowed = torch.maximum(weight.float().abs() * 2**-4, found.scales * 2**-10)
    assert (error <= allowed * 1.001).all()
    assert torch.equal(found.values.float().abs().amax(1), torch.full((33,), 448.0))


def test_a_row_of_zeros_stays_one():
    weight = torch.randn(3, 8)
    weight[1] = 0
    assert (quantize_float8(weight).dequantize()[1] == 0).all()


def test_a_weight_is_moved_with_all_its_tensors():
    there = moved(quantize_float8(torch.randn(3, 8)), torch.device("meta"))
    assert there.values.is_meta and there.scales.is_meta and there.block == (1, 8)
