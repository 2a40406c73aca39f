"""Quantization of weights: error bounds, exact cases, and what no format holds."""

import pytest
import torch

from apt_core.quantization import pack_weight, quantize_int4, quantize_int8
from apt_kernels import ops
from apt_kernels.reference import dequantize_int4, dequantize_int8


def int4_values(weight, group_size=32):
    q = quantize_int4(weight, group_size)
    return dequantize_int4(q.values, q.scales, q.minima)


def test_int8_is_within_half_a_step_of_each_output():
    torch.manual_seed(0)
    weight = torch.randn(50, 200) * torch.logspace(-6, 6, 50).unsqueeze(1)
    q = quantize_int8(weight)
    error = (dequantize_int8(q.values, q.scales) - weight).abs()
    assert (error <= 0.501 * q.scales.unsqueeze(1)).all()
    assert (q.values.abs().amax(1) == 127).all()


@pytest.mark.parametrize("quantize", [lambda w: quantize_int8(w).dequantize(), int4_values])
def test_constant_and_zero_outputs_survive(quantize):
    weight = torch.stack((torch.zeros(64), torch.full((64,), 0.5), torch.full((64,), -2.0)))
    torch.testing.assert_close(quantize(weight), weight)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_error_is_no_more_than_plain_ranges_leave(group_size):
    torch.manual_seed(0)
    weight = torch.randn(40, 384)
    weight[3, 5] = 40.0
    groups = weight.unflatten(1, (-1, group_size))
    low, high = groups.aminmax(dim=2, keepdim=True)
    plain = ((groups - low) / (high - low) * 15).round() * (high - low) / 15 + low
    plain_error = (plain - groups).square().sum()
    assert (int4_values(weight, group_size) - weight).square().sum() <= plain_error


def test_weights_of_q4_1_come_back_exactly():
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (30, 4, 32))
    codes[..., 0], codes[..., 1] = 0, 15
    scales, minima = torch.rand(30, 4, 1).half() + 0.1, torch.randn(30, 4, 1).half()
    weight = (codes * scales.float() + minima.float()).flatten(1)
    torch.testing.assert_close(int4_values(weight), weight, rtol=1e-3, atol=1e-3)
    assert torch.equal(quantize_int4(weight).values, codes.flatten(1).to(torch.uint8))


def test_inputs_that_no_group_divides():
    assert quantize_int4(torch.randn(4, 33)) is None
    x, weight = torch.randn(3, 33), torch.randn(4, 33)
    out = ops.packed_linear(x, pack_weight(weight, "int4"))
    assert torch.equal(out, ops.packed_linear(x, pack_weight(weight, "int8")))


@pytest.mark.parametrize(
    ("precision", "most"), [("float32", 1e-6), ("bfloat16", 0.005), ("int8", 0.015), ("int4", 0.1)]
)
def test_relative_error_of_a_product(precision, most):
    torch.manual_seed(0)
    x, weight = torch.randn(20, 512), torch.randn(300, 512)
    exact = x.double() @ weight.double().T
    out = ops.packed_linear(x, pack_weight(weight, precision)).double()
    assert (out - exact).norm() / exact.norm() < most
