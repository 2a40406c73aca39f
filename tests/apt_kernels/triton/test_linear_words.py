"""The layout of weights in words."""

import pytest
import torch

from apt_kernels.triton import linear_words


@pytest.mark.parametrize(("num_bits", "shifts"), [(8, (0, 16, 8, 24)), (4, (0, 16, 4, 20, 8, 24, 12, 28))])
def test_each_code_lies_where_the_layout_says(num_bits, shifts):
    generator = torch.Generator().manual_seed(0)
    low, high, dtype = (-128, 128, torch.int8) if num_bits == 8 else (0, 16, torch.uint8)
    codes = torch.randint(low, high, (3, 600), generator=generator, dtype=dtype)
    words, block_size = linear_words.pack(codes, num_bits), 32 * len(shifts)
    assert words.dtype == torch.int32 and words.is_contiguous() and words.shape == (3, -(-600 // block_size) * 32)
    for index in range(600):
        block, place = divmod(index, block_size)
        slot, word = divmod(place, 32)
        found = words[:, block * 32 + word] >> shifts[slot]
        assert torch.equal(found & (2**num_bits - 1), codes[:, index].int() & (2**num_bits - 1))
    beyond = (600 % block_size) // 32 + 1
    assert not (words[:, -32:] >> shifts[beyond] & (2**num_bits - 1)).any(), "inputs beyond the last are 0"


@pytest.mark.parametrize("num_bits", [8, 4])
def test_shifts_are_those_of_the_layout(num_bits):
    shifts = [linear_words.shift_of(slot, num_bits) for slot in range(32 // num_bits)]
    assert sorted(shifts) == list(range(0, 32, num_bits))
    assert [shift >= 16 for shift in shifts] == [slot % 2 == 1 for slot in range(len(shifts))]
