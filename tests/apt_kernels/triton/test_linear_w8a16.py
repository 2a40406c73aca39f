"""Products with int8 weights and x as it is."""

import pytest
import torch

from apt_kernels import reference
from apt_kernels.triton import linear_tile, linear_w8a16, linear_words
from tests.apt_kernels.triton.linear_cases import (
    DEVICE,
    DTYPES,
    NEEDS_GPU,
    NUM_ROWS,
    OUT_DTYPES,
    SHAPES,
    assert_close,
    make_bias,
    make_x,
    use_blocks,
)


def make_weight(num_out, num_in):
    generator = torch.Generator().manual_seed(num_out)
    weight = torch.randint(-128, 128, (num_out, num_in), generator=generator, dtype=torch.int8)
    return weight.to(DEVICE), (torch.rand(num_out, generator=generator) * 0.02 + 0.001).to(DEVICE)


def linear(x, weight, scales, bias, out_dtype):
    return linear_w8a16.linear(x, linear_words.pack(weight, 8), scales, bias, out_dtype)


def expected(x, weight, scales, bias, out_dtype):
    return reference.weight_only_linear(x, reference.dequantize_int8(weight, scales, torch.float64), bias, out_dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_its_twin(shape, dtype):
    weight, scales = make_weight(*shape)
    bias = make_bias(shape[0])
    for num_rows in NUM_ROWS:
        x = make_x(num_rows, shape[1], dtype)
        assert_close(linear(x, weight, scales, None, dtype), expected(x, weight, scales, None, dtype))
        out = linear(x, weight, scales, bias, torch.float32)
        assert_close(out, expected(x, weight, scales, bias, torch.float32))


@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("splits", [1, 2, 4, 8])
def test_sums_may_be_split(splits, out_dtype, monkeypatch):
    """Also where the last splits have no inputs left."""
    use_blocks(monkeypatch, SPLIT_K=splits, BLOCK_K=128)
    weight, scales = make_weight(90, 833)
    x, bias = make_x(5, 833, torch.float16), make_bias(90)
    out = linear(x, weight, scales, bias, out_dtype)
    assert_close(out, expected(x, weight, scales, bias, out_dtype))
    assert torch.equal(out, linear(x, weight, scales, bias, out_dtype))


def test_many_tiles_cover_all_rows_and_outputs(monkeypatch):
    """More tiles than one group of those that share L2, in both directions."""
    use_blocks(monkeypatch, BLOCK_M=16, BLOCK_N=16)
    weight, scales = make_weight(16 * 19 - 3, 16)
    x = make_x(16 * 5 - 1, 16, torch.float16)
    out = linear(x, weight, scales, None, torch.float32)
    assert_close(out, expected(x, weight, scales, None, torch.float32))


def test_no_rows_make_none():
    weight, scales = make_weight(50, 192)
    out = linear(make_x(0, 192, torch.float16), weight, scales, None, torch.float32)
    assert out.shape == (0, 50) and out.dtype == torch.float32


def test_rows_may_lie_apart():
    weight, scales = make_weight(50, 192)
    wide = make_x(6, 400, torch.float16)
    x = wide[::2, 100:292]
    out = linear(x, weight, scales, None, torch.float32)
    assert torch.equal(out, linear(x.contiguous(), weight, scales, None, torch.float32))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_nan_stays_in_its_row():
    weight, scales = make_weight(50, 192)
    x = make_x(4, 192, torch.float16)
    x[1, 7], x[2, 5] = torch.nan, torch.inf
    out = linear(x, weight, scales, None, torch.float32)
    assert out.isfinite().all(1).tolist() == [True, False, False, True] and out[1].isnan().all()


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=NEEDS_GPU) for dtype in (torch.float16, torch.bfloat16)])
def test_a_row_does_not_depend_on_its_company_in_a_decoding_step(dtype):
    weight, scales = make_weight(777, 1031)
    x = make_x(linear_tile.DECODE_ROWS, 1031, dtype)
    together = linear(x, weight, scales, None, dtype)
    for num_rows in (1, 2, 15, 17, 33):
        assert torch.equal(linear(x[:num_rows], weight, scales, None, dtype), together[:num_rows])
    assert torch.equal(linear(x[41:42], weight, scales, None, dtype), together[41:42])


@pytest.mark.parametrize("shape", [pytest.param((300_000, 32768), marks=NEEDS_GPU)])
def test_offsets_beyond_32_bits(shape):
    """Words and out are more than an int32 counts."""
    words = torch.full((shape[0], shape[1] // 4), 0x01010101, dtype=torch.int32, device=DEVICE)
    x = torch.ones(1, shape[1], dtype=torch.float16, device=DEVICE)
    scales = torch.arange(shape[0], device=DEVICE, dtype=torch.float32)
    out = linear_w8a16.linear(x.expand(8000, -1), words, scales, None, torch.float32)
    assert torch.equal(out[-1], scales * shape[1]) and torch.equal(out[4000], scales * shape[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"words": torch.zeros(50, 64)}, "words must be int32"),
        ({"words": torch.zeros(50, 65, dtype=torch.int32)}, "words must be those of 192 inputs in 8 bits"),
        ({"words": torch.zeros(64, 50, dtype=torch.int32).T}, "words must be those of 192 inputs in 8 bits"),
        ({"scales": torch.ones(49)}, r"scales must be float32 \[50\]"),
        ({"scales": torch.ones(50, dtype=torch.float64)}, "scales must be float32"),
        ({"scales": torch.ones(100)[::2]}, "scales must be float32"),
        ({"bias": torch.ones(50, dtype=torch.float16)}, r"bias must be float32 \[50\]"),
        ({"bias": torch.ones(100)[::2]}, "bias must be contiguous"),
        ({"x": torch.ones(3, 300)}, "words must be those of 300 inputs"),
        ({"x": torch.ones(192)}, r"x must be \[T, in\]"),
        ({"x": torch.ones(3, 192, dtype=torch.float64)}, "x must be float32, float16"),
        ({"x": torch.ones(192, 3).T}, "x must have inputs side by side"),
        ({"out_dtype": torch.int32}, "out_dtype must be"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_that_do_not_fit_are_named(changes, message):
    weight, scales = make_weight(50, 192)
    args = {"x": make_x(3, 192, torch.float16), "words": linear_words.pack(weight, 8), "scales": scales}
    args |= {"bias": None, "out_dtype": torch.float32} | changes
    args = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in args.items()}
    with pytest.raises(ValueError, match=message):
        linear_w8a16.linear(**args)


def test_few_tiles_of_many_inputs_are_split_and_many_are_not():
    assert linear_tile.num_splits(num_tiles=64, num_steps=32, processors=132) == 4
    assert linear_tile.num_splits(num_tiles=8, num_steps=32, processors=132) == 8
    assert linear_tile.num_splits(num_tiles=448, num_steps=32, processors=132) == 1
    assert linear_tile.num_splits(num_tiles=1, num_steps=4096, processors=132) == linear_tile.MAX_SPLITS


def test_the_order_of_a_decoding_steps_sums_depends_on_the_weight_only():
    configs = {
        linear_tile.choose(linear_w8a16.OP, rows, 777, 4096, torch.device(DEVICE), linear_w8a16._default_config).blocks[
            "SPLIT_K"
        ]
        for rows in (1, 16, 17, 64)
    }
    assert len(configs) == 1


@pytest.mark.parametrize("num_rows", [1, 100, 5000])
def test_candidates_differ_and_hold_the_default(num_rows):
    found = [str(config) for config in linear_w8a16.candidates(num_rows)]
    assert len(set(found)) == len(found) > 10
    assert str(linear_w8a16._default_config(num_rows, 4096, 4096, torch.device(DEVICE))) in found
