"""Small integers packed into int32, as the formats have them: the first in the lowest bits."""

from __future__ import annotations

import torch


def unpack_int32(packed: torch.Tensor, num_bits: int) -> torch.Tensor:
    """[rows, words] int32 -> [rows, words * 32 / num_bits] uint8, num_bits 4 or 8.

    Every word holds the values of neighbouring columns, lowest bits first, which in memory is the order of its bytes.
    """
    data = packed.contiguous().view(torch.uint8)
    if num_bits == 8:
        return data
    return torch.stack((data & 15, data >> 4), dim=2).flatten(1)


def pack_int32(values: torch.Tensor, num_bits: int) -> torch.Tensor:
    """[rows, n] uint8 below 2 ** num_bits -> [rows, n * num_bits / 32] int32; what ``unpack_int32`` undoes.

    Values that do not fill a row's last word are followed by zeros.
    """
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % (32 // num_bits)))
    if num_bits == 4:
        padded = padded[:, ::2] | padded[:, 1::2] << 4
    return padded.contiguous().view(torch.int32)
