"""What the tests of all products share."""

from dataclasses import replace

import pytest
import torch

from apt_kernels.triton import linear_tile
from apt_kernels.triton.launch import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="needs compiled kernels on a GPU")]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=NEEDS_GPU)]
"""Of x. The interpreter's product of bfloat16 is garbage."""
OUT_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NUM_ROWS = (1, 3, 17, 70)
"""Rows of one tile that is not full, of two, and beyond what a decoding step has."""
SHAPES = [(50, 192), (17, 1031), (130, 5), (1, 640)]
"""(out, in): tiles of outputs and inputs that are not full, and enough inputs to cut them."""
TOLERANCES = {torch.float32: 2e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def assert_close(out, expected):
    """Within one step of the dtype, or float32's rounding of a sum as large as those of the test."""
    assert out.dtype == expected.dtype and out.shape == expected.shape and out.device == expected.device
    largest = expected.nan_to_num().abs().max().item() if expected.numel() else 0.0
    rtol = TOLERANCES[out.dtype]
    torch.testing.assert_close(out, expected, rtol=rtol, atol=2e-6 * max(largest, 1.0), equal_nan=True)


def make_x(num_rows, num_in, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, num_in, generator=generator).to(dtype).to(DEVICE)


def make_float8_x(num_rows, num_in, dtype):
    """Rows that are float8 times a power of two: the interpreter rounds to float8 wrongly, it loses carries."""
    x = (make_x(num_rows, num_in, torch.float32) * 100).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    x[:, num_in // 2] = 448
    return (x / 64).to(dtype)


def make_bias(num_out):
    return torch.randn(num_out, generator=torch.Generator().manual_seed(7)).to(DEVICE)


def use_blocks(monkeypatch, **blocks):
    """Every launch takes these tile sizes."""
    choose = linear_tile.choose

    def chosen(*args):
        config = choose(*args)
        return replace(config, blocks={**config.blocks, **blocks})

    monkeypatch.setattr(linear_tile, "choose", chosen)
