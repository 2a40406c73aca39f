"""Products with float8 weights: in float8, and with weights that become x's dtype."""

import pytest
import torch

from apt_kernels import reference
from apt_kernels.triton import linear_fp8
from apt_kernels.triton.launch import INTERPRETED
from tests.apt_kernels.triton.linear_cases import (
    DEVICE,
    DTYPES,
    NEEDS_GPU,
    NUM_ROWS,
    OUT_DTYPES,
    SHAPES,
    assert_close,
    make_bias,
    make_float8_x,
    make_x,
    use_blocks,
)

CAN_MULTIPLY = INTERPRETED or linear_fp8.has_float8(torch.device(DEVICE))
MODES = [False, pytest.param(True, marks=pytest.mark.skipif(not CAN_MULTIPLY, reason="needs float8 tensor cores"))]
"""Whether x is quantized."""


def make_weight(num_out, num_in, block):
    generator = torch.Generator().manual_seed(num_in)
    weight = (torch.randn(num_out, num_in, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    shape = (num_out,) if block is None else (-(-num_out // block[0]), -(-num_in // block[1]))
    return weight.to(DEVICE), (torch.rand(shape, generator=generator) * 0.02 + 0.001).to(DEVICE)


def check(x, weight, scales, block, bias, out_dtype, quantizes_x):
    out = linear_fp8.linear(x, weight, scales, block, bias, out_dtype, quantizes_x=quantizes_x)
    expected = reference.float8_linear(x, weight, scales, bias, out_dtype, block=block, quantizes_x=quantizes_x)
    assert_close(out, expected)
    return out


@pytest.mark.parametrize("quantizes_x", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_its_twin(shape, dtype, quantizes_x):
    weight, scales = make_weight(*shape, None)
    bias = make_bias(shape[0])
    for num_rows in NUM_ROWS:
        x = make_float8_x(num_rows, shape[1], dtype)
        check(x, weight, scales, None, None, dtype, quantizes_x)
        check(x, weight, scales, None, bias, torch.float32, quantizes_x)


@pytest.mark.parametrize("quantizes_x", MODES)
@pytest.mark.parametrize("block", [(128, 128), (1, 128), (32, 256)], ids=str)
@pytest.mark.parametrize("shape", [(50, 192), (300, 384), (17, 1031)], ids=str)
def test_blocks_have_scales_of_their_own(shape, block, quantizes_x):
    """Also the last ones, which are cut off."""
    weight, scales = make_weight(*shape, block)
    for num_rows in (1, 70):
        x = make_float8_x(num_rows, shape[1], torch.float16)
        check(x, weight, scales, block, make_bias(shape[0]), torch.float32, quantizes_x)


@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("block", [None, (128, 128)], ids=str)
@pytest.mark.parametrize("quantizes_x", MODES)
def test_sums_may_be_split(quantizes_x, block, out_dtype, monkeypatch):
    use_blocks(monkeypatch, SPLIT_K=4)
    weight, scales = make_weight(50, 600, block)
    x, bias = make_float8_x(5, 600, torch.float16), make_bias(50)
    outs = [check(x, weight, scales, block, bias, out_dtype, quantizes_x) for _ in range(2)]
    assert torch.equal(*outs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_float8_value_is_unpacked_exactly(dtype):
    """All but NaN: zeros of both signs, the smallest magnitudes, the largest."""
    bits = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8, device=DEVICE)
    weight = bits.view(torch.float8_e4m3fn).unsqueeze(1)
    x = torch.ones(1, 1, dtype=dtype, device=DEVICE)
    scales = torch.ones(len(bits), device=DEVICE)
    out = linear_fp8.linear(x, weight, scales, None, None, torch.float32, quantizes_x=False)
    assert torch.equal(out, weight.float().T)


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=NEEDS_GPU) for dtype in (torch.float16, torch.bfloat16)])
def test_inputs_are_rounded_to_float8_as_the_twin_does(dtype):
    if not CAN_MULTIPLY:
        pytest.skip("needs float8 tensor cores")
    weight, scales = make_weight(50, 192, None)
    check(make_x(5, 192, dtype), weight, scales, None, None, torch.float32, quantizes_x=True)


@pytest.mark.parametrize("num_in", [pytest.param(16384, marks=NEEDS_GPU)])
def test_long_sums_keep_the_precision_of_float32(num_in):
    """All of one sign, so that what a narrow sum loses does not cancel out."""
    if not CAN_MULTIPLY:
        pytest.skip("needs float8 tensor cores")
    weight, scales = make_weight(64, num_in, None)
    weight = weight.float().abs().to(torch.float8_e4m3fn)
    x = make_x(32, num_in, torch.float16).abs()
    out = linear_fp8.linear(x, weight, scales, None, None, torch.float32, quantizes_x=True)
    expected = reference.float8_linear(x, weight, scales, None, torch.float32, block=None, quantizes_x=True)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("quantizes_x", MODES)
def test_nan_stays_in_its_row(quantizes_x):
    weight, scales = make_weight(20, 192, None)
    x = make_x(3, 192, torch.float16)
    x[1, 100] = torch.nan
    out = linear_fp8.linear(x, weight, scales, None, None, torch.float32, quantizes_x=quantizes_x)
    assert out.isnan().all(1).tolist() == [False, True, False] and out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("quantizes_x", MODES)
def test_no_rows_make_none(quantizes_x):
    weight, scales = make_weight(50, 192, None)
    x = make_x(0, 192, torch.float16)
    assert linear_fp8.linear(x, weight, scales, None, None, torch.float32, quantizes_x=quantizes_x).shape == (0, 50)


def test_arguments_that_do_not_fit_are_named():
    weight, scales = make_weight(50, 192, None)
    good = {"x": make_x(3, 192, torch.float16), "weight": weight, "scales": scales, "block": None, "bias": None}
    good |= {"out_dtype": torch.float32, "quantizes_x": False}
    bad = [
        ({"weight": weight.view(torch.uint8)}, "weight must be float8_e4m3fn"),
        ({"weight": weight.T}, "weight must be contiguous"),
        ({"scales": scales[:-1]}, r"scales must be float32 \[50\]"),
        ({"block": (128, 64)}, "block must hold a multiple of 128 inputs"),
        ({"block": (128, 128)}, r"scales must be float32 \(1, 2\)"),
        ({"x": make_x(3, 191, torch.float16)}, r"x must be \[T, 192\]"),
        ({"x": make_x(192, 3, torch.float16).T, "quantizes_x": True}, "x must have inputs side by side"),
    ]
    for changes, message in bad:
        with pytest.raises(ValueError, match=message):
            linear_fp8.linear(**(good | changes))


@pytest.mark.parametrize("num_rows", [1, 100, 5000])
def test_candidates_and_defaults_take_tiles_that_divide_blocks(num_rows):
    configs = [*linear_fp8.candidates(num_rows), linear_fp8._default_config(num_rows, 64, 4096, torch.device(DEVICE))]
    assert {config.blocks["BLOCK_K"] for config in configs} == {linear_fp8.BLOCK_K}
