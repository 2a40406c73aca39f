"""The layout of weights that become x's dtype in registers: 8 or 4 bits, in words of 32.

Inputs come in blocks of 128 (8 bits) or 256 (4 bits), and a block of an output is 32 words, one after the other: word
`j` holds the codes of the inputs `32 slot + j`, for each slot the ones at the bits `shift_of(slot)`. So a shift turns a
tile of words [outputs, 32] into the codes of 32 consecutive inputs, each in the thread where its word was: no value
moves between threads, where bytes would have to be put together from the registers of others. Groups of a multiple of
32 inputs have one scale per output in such a tile. Even slots lie in a word's low half and odd ones in its high half:
one instruction can unpack both. Inputs are filled up to whole blocks with zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from apt_kernels.triton.launch import require

WORDS = tl.constexpr(32)
"""In a block."""


@triton.jit
def load_words(words, outs, k, num_out, num_in, BITS: tl.constexpr):
    """The words [outputs, 32] of the block that begins with input k."""
    stride = tl.cdiv(num_in, WORDS * 32 // BITS) * WORDS
    place = outs.to(tl.int64)[:, None] * stride + (tl.arange(0, WORDS) + k // (32 // BITS))[None, :]
    return tl.load(words + place, mask=(outs < num_out)[:, None], other=0)


def block_size(num_bits: int) -> int:
    """Inputs of a block."""
    return int(WORDS.value) * 32 // num_bits


def shift_of(slot: int, num_bits: int) -> int:
    """The lowest bit of a slot."""
    return num_bits * (slot // 2) + 16 * (slot % 2)


def pack(codes: torch.Tensor, num_bits: int) -> torch.Tensor:
    """int8, or uint8 below 2**num_bits, [out, in] -> int32 [out, words]."""
    num_out, num_in = codes.shape
    blocks = F.pad(codes, (0, -num_in % block_size(num_bits))).view(num_out, -1, 32 // num_bits, WORDS.value)
    words = torch.zeros_like(blocks[:, :, 0], dtype=torch.int32)
    for slot in range(32 // num_bits):
        bits = blocks[:, :, slot].to(torch.int32) & (2**num_bits - 1)
        words |= bits << shift_of(slot, num_bits)
    return words.flatten(1)


def require_words(words: torch.Tensor, num_in: int, num_bits: int) -> None:
    """What `pack` makes of weights with so many inputs.

    Raises:
        ValueError: they are something else.
    """
    require(words.dim() == 2 and words.dtype == torch.int32, "words", "must be int32 [out, words]")
    num_words = triton.cdiv(num_in, block_size(num_bits)) * WORDS.value
    fits = words.shape[1] == num_words and words.is_contiguous()
    require(fits, "words", f"must be those of {num_in} inputs in {num_bits} bits, and contiguous")
