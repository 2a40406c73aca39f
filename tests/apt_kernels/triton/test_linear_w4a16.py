"""Products with 4-bit weights in groups, and x as it is."""

import pytest
import torch

from apt_kernels import reference
from apt_kernels.triton import linear_tile, linear_w4a16, linear_words
from tests.apt_kernels.triton.linear_cases import (
    DEVICE,
    DTYPES,
    NUM_ROWS,
    OUT_DTYPES,
    assert_close,
    make_bias,
    make_x,
    use_blocks,
)

CASES = [(50, 192, 32), (17, 1088, 64), (3, 128, 128), (70, 256, 32), (33, 640, 128)]
"""(out, in, group size): blocks of inputs that are full and that are not."""


class Case:
    """A random weight, packed, and what its product should be."""

    def __init__(self, num_out, num_in, group_size):
        generator = torch.Generator().manual_seed(num_in)
        shape = (num_out, num_in // group_size)
        self.codes = torch.randint(0, 16, (num_out, num_in), generator=generator, dtype=torch.uint8).to(DEVICE)
        self.scales = (torch.rand(shape, generator=generator) * 0.02 + 0.001).half().to(DEVICE)
        self.minima = (torch.randn(shape, generator=generator) * 0.1).half().to(DEVICE)
        self.group_size = group_size
        self.words = linear_words.pack(self.codes, 4)
        self.factors = [linear_w4a16.pack_factors(x, num_in) for x in (self.scales, self.minima)]

    def linear(self, x, bias=None, out_dtype=torch.float32):
        return linear_w4a16.linear(x, self.words, *self.factors, self.group_size, bias, out_dtype)

    def expected(self, x, bias=None, out_dtype=torch.float32):
        """A weight is rounded once, to x's dtype."""
        weight = reference.dequantize_int4(self.codes, self.scales, self.minima).to(x.dtype)
        return reference.weight_only_linear(x, weight, bias, out_dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_equals_its_twin(shape, dtype):
    case, bias = Case(*shape), make_bias(shape[0])
    for num_rows in NUM_ROWS:
        x = make_x(num_rows, shape[1], dtype)
        assert_close(case.linear(x), case.expected(x))
        assert_close(case.linear(x, bias, dtype), case.expected(x, bias, dtype))


@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("splits", [2, 4])
def test_sums_may_be_split(splits, out_dtype, monkeypatch):
    """Also where the last split has no inputs left."""
    use_blocks(monkeypatch, SPLIT_K=splits)
    case, bias = Case(50, 704, 64), make_bias(50)
    x = make_x(5, 704, torch.float16)
    assert_close(case.linear(x, bias, out_dtype), case.expected(x, bias, out_dtype))
    assert torch.equal(case.linear(x, bias, out_dtype), case.linear(x, bias, out_dtype))


def test_the_values_are_those_of_a_q4_0_block():
    """GGUF's simplest form: scale * (code - 8), the minimum being -8 scales."""
    codes = torch.arange(32, dtype=torch.uint8).remainder(16).unsqueeze(0).to(DEVICE)
    scales = torch.tensor([[0.5]], device=DEVICE)
    factors = [linear_w4a16.pack_factors(x, 32) for x in (scales, -8 * scales)]
    one_hot = torch.eye(32, device=DEVICE, dtype=torch.float16)
    out = linear_w4a16.linear(one_hot, linear_words.pack(codes, 4), *factors, 32, None, torch.float32)
    assert out.squeeze(1).tolist() == [0.5 * (code - 8) for code in codes[0].tolist()]


def test_no_rows_make_none():
    assert Case(50, 192, 32).linear(make_x(0, 192, torch.float16)).shape == (0, 50)


def test_rows_may_lie_apart():
    case, wide = Case(50, 192, 32), make_x(6, 400, torch.float16)
    x = wide[::2, 100:292]
    assert torch.equal(case.linear(x), case.linear(x.contiguous()))


def test_arguments_that_do_not_fit_are_named():
    case, x = Case(50, 192, 32), make_x(3, 192, torch.float16)
    scales, minima = case.factors
    good = {"x": x, "words": case.words, "scales": scales, "minima": minima, "group_size": 32}
    good |= {"bias": None, "out_dtype": torch.float32}
    bad = [
        ({"group_size": 48}, "group_size must be one of"),
        ({"group_size": 64}, "scales must be those of pack_factors"),
        ({"words": case.words.long()}, "words must be int32"),
        ({"words": case.words[:, :-1]}, "words must be those of 192 inputs in 4 bits"),
        ({"scales": scales.float()}, "scales must be"),
        ({"minima": minima[:-1]}, "minima must be"),
        ({"x": x.double()}, "x must be float32, float16"),
        ({"x": torch.ones(192, 3, device=DEVICE).T}, "x must have inputs side by side"),
        ({"bias": torch.ones(49, device=DEVICE)}, r"bias must be float32 \[50\]"),
        ({"out_dtype": torch.int8}, "out_dtype must be"),
    ]
    for changes, message in bad:
        with pytest.raises(ValueError, match=message):
            linear_w4a16.linear(**(good | changes))


@pytest.mark.parametrize("num_rows", [1, 100, 5000])
def test_candidates_and_defaults_take_whole_blocks(num_rows):
    configs = [
        *linear_w4a16.candidates(num_rows),
        linear_w4a16._default_config(num_rows, 64, 4096, torch.device(DEVICE)),
    ]
    assert {config.blocks["BLOCK_K"] for config in configs} == {linear_w4a16.BLOCK}
    assert linear_w4a16.shape_class(num_rows, 64, 4096) == linear_tile.shape_class(num_rows, 64, 4096)
