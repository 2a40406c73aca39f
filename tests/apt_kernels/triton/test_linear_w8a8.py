"""Products in int8, and the quantization of x that they and float8's share."""

import pytest
import torch

from apt_kernels import reference
from apt_kernels.triton import linear_w8a8, quantize
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

ALL_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
"""The interpreter converts bfloat16 well; only its products are garbage."""


def make_weight(num_out, num_in):
    generator = torch.Generator().manual_seed(num_out)
    weight = torch.randint(-128, 128, (num_out, num_in), generator=generator, dtype=torch.int8)
    return weight.to(DEVICE), (torch.rand(num_out, generator=generator) * 0.02 + 0.001).to(DEVICE)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_its_twin(shape, dtype):
    weight, scales = make_weight(*shape)
    bias = make_bias(shape[0])
    for num_rows in NUM_ROWS:
        x = make_x(num_rows, shape[1], dtype)
        for given in ((None, dtype), (bias, torch.float32)):
            expected = reference.int8_row_linear(x, weight, scales, *given)
            assert_close(linear_w8a8.linear(x, weight, scales, *given), expected)


@pytest.mark.parametrize("largest", [0.5, 3.0, 100.0])
def test_a_scale_may_be_given(largest):
    """One that cuts large values off, one that does not, and one that leaves few steps."""
    weight, scales = make_weight(50, 192)
    x, scale = make_x(7, 192, torch.float16), largest / 127
    out = linear_w8a8.linear(x, weight, scales, None, torch.float32, input_scale=scale)
    assert_close(out, reference.int8_row_linear(x, weight, scales, None, torch.float32, scale))


@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("splits", [2, 8])
def test_splitting_a_sum_changes_nothing(splits, out_dtype, monkeypatch):
    """Bit for bit: sums are integers."""
    weight, scales = make_weight(50, 333)
    x, bias = make_x(5, 333, torch.float32), make_bias(50)
    outs = []
    for count in (1, splits):
        use_blocks(monkeypatch, SPLIT_K=count, BLOCK_K=64)
        outs.append(linear_w8a8.linear(x, weight, scales, bias, out_dtype))
    assert torch.equal(*outs)


@pytest.mark.parametrize("num_in", [640, pytest.param(linear_w8a8.MAX_IN, marks=NEEDS_GPU)])
def test_the_largest_sums_are_exact(num_in):
    weight = torch.full((16, num_in), -128, dtype=torch.int8, device=DEVICE)
    out = linear_w8a8.linear(
        torch.ones(2, num_in, device=DEVICE), weight, torch.ones(16, device=DEVICE), None, torch.float32
    )
    assert_close(out, torch.full((2, 16), -128.0 * num_in, device=DEVICE))


ROW_SIZES = torch.tensor([[1e-4], [1], [300], [0], [-7]])


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("num_in", [1, 37, 2048, 5000])
def test_rows_are_quantized_as_the_twin_does(num_in, dtype):
    x = (make_x(5, num_in, dtype) * ROW_SIZES.to(DEVICE)).to(dtype)
    values, scales = quantize.quantize_rows(x, torch.int8)
    integers, expected = reference.quantize_rows(x, num_in)
    assert torch.equal(values.float(), integers.squeeze(1)) and torch.equal(scales, expected.flatten())


@pytest.mark.parametrize("num_in", [37, pytest.param(5000, marks=NEEDS_GPU)])
def test_rows_become_float8(num_in):
    """On a GPU with all roundings; interpreted with rows that need none."""
    x = make_float8_x(5, num_in, torch.float32) * torch.tensor([[1.0], [2.0], [0.25], [0.0], [-1.0]], device=DEVICE)
    if num_in > 1000:
        x = make_x(5, num_in, torch.float32) * ROW_SIZES.to(DEVICE)
    values, scales = quantize.quantize_rows(x, torch.float8_e4m3fn)
    largest = x.abs().amax(1, keepdim=True)
    inverse = torch.full_like(largest, 448) / torch.where(largest == 0, 1, largest)
    assert torch.equal(values.float(), (x * inverse).clamp(-448, 448).to(torch.float8_e4m3fn).float())
    assert torch.equal(scales, (largest / 448).flatten())


def test_halves_are_rounded_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -3.5, 125.5]], device=DEVICE)
    values, _ = quantize.quantize_rows(x, torch.int8)
    assert values.tolist() == [[127, 0, 2, 2, 0, -2, -4, 126]]


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("scale", [None, 0.1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_becomes_nan(value, scale):
    weight, scales = make_weight(20, 192)
    x = make_x(3, 192, torch.float16)
    x[1, 100] = value
    out = linear_w8a8.linear(x, weight, scales, None, torch.float32, scale)
    assert out.isnan().all(1).tolist() == [False, True, False]
    assert_close(out, reference.int8_row_linear(x, weight, scales, None, torch.float32, scale))


def test_no_rows_make_none():
    weight, scales = make_weight(50, 192)
    assert linear_w8a8.linear(make_x(0, 192, torch.float16), weight, scales, None, torch.float32).shape == (0, 50)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_may_lie_apart(dtype):
    weight, scales = make_weight(50, 192)
    x = make_x(6, 400, dtype)[::2, 100:292]
    out = linear_w8a8.linear(x, weight, scales, None, torch.float32)
    assert torch.equal(out, linear_w8a8.linear(x.contiguous(), weight, scales, None, torch.float32))


def test_arguments_that_do_not_fit_are_named():
    weight, scales = make_weight(50, 192)
    good = {"x": make_x(3, 192, torch.float16), "weight": weight, "scales": scales, "bias": None}
    good |= {"out_dtype": torch.float32}
    many = torch.zeros(1, linear_w8a8.MAX_IN + 1, dtype=torch.int8, device=DEVICE)
    bad = [
        ({"weight": weight.float()}, "weight must be int8"),
        ({"weight": many}, "weight has 131073 inputs"),
        ({"scales": scales[:-1]}, r"scales must be float32 \[50\]"),
        ({"x": make_x(3, 191, torch.float16)}, r"x must be \[T, 192\]"),
        ({"input_scale": 0.0}, "input_scale must be positive"),
    ]
    for changes, message in bad:
        with pytest.raises(ValueError, match=message):
            linear_w8a8.linear(**(good | changes))
    with pytest.raises(ValueError, match="dtype must be int8 or float8"):
        quantize.quantize_rows(good["x"], torch.uint8)
    with pytest.raises(ValueError, match="x must have inputs side by side"):
        quantize.quantize_rows(good["x"].T, torch.int8)
