"""Tokens from logits: the most likely one, a draw from the filtered softmax, log-probabilities.

Two launches: the maxima of all chunks of all rows, which fill the GPU, and then one program per row, which never sorts
it (sampling_kernels.py). Nothing is shared between rows and no order of summation depends on timing, so a row's token
depends on the row, its parameters and its number only, bit for bit.
"""

from __future__ import annotations

import torch
import triton

from apt_kernels.triton.launch import require, require_device
from apt_kernels.triton.logits_row import CHUNK
from apt_kernels.triton.sampling_kernels import argmax_kernel, logprobs_kernel, maxima_kernel, sample_kernel
from apt_kernels.triton.tuning import Config, tuned

OP = "sampling"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_VOCAB = 2**18
"""The maxima of a row's chunks are one tile."""
CHUNKS = 16
"""That a program takes the maxima of."""


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """[R, V] -> [R] int64; see `reference.argmax`.

    Args:
        logits: float32, float16 or bfloat16; rows may lie apart.

    Raises:
        ValueError: a shape, dtype, stride or device that does not fit; names the argument.
    """
    _check(logits)
    out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    if len(out):
        maxima, ids = _chunk_maxima(logits)
        argmax_kernel[(len(out),)](maxima, ids, out, logits.shape[1], MAX_CHUNKS=_max_chunks(logits), num_warps=4)
    return out


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """Draw one token a row from the filtered distribution, [R, V] -> [R] int64; see `reference.sample`.

    Args:
        logits: float32, float16 or bfloat16; rows may lie apart.
        temperature, top_p, min_p: [R] float32. top_k: [R] int64. uniform: [R] float64 in [0, 1).

    Raises:
        ValueError: a shape, dtype, stride or device that does not fit; names the argument.
    """
    parameters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "uniform": uniform}
    _check(logits, **parameters)
    for name, parameter in parameters.items():
        _require_per_row(parameter, name, _PARAMETER_DTYPES[name], logits)
    out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    if len(out):
        options = _options(logits)
        gathered = _gathered(logits, options["TILE"])
        sample_kernel[(len(out),)](
            *(logits, logits.stride(0), *_chunk_maxima(logits), *parameters.values(), *gathered, out, logits.shape[1]),
            **options,
        )
    return out


def top_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of given tokens and of the num_top most likely ones; see `reference.top_logprobs`.

    Made for few of them: each is one more look at what has been gathered of the row.

    Args:
        logits: float32, float16 or bfloat16; rows may lie apart.
        token_ids: [R] int64.

    Raises:
        ValueError: a shape, dtype, stride or device that does not fit; names the argument.
    """
    _check(logits, token_ids=token_ids)
    _require_per_row(token_ids, "token_ids", torch.int64, logits)
    num_rows, size = logits.shape
    require(0 <= num_top <= size, "num_top", f"must be at most {size}, got {num_top}")
    chosen = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    best = torch.empty(num_rows, num_top, dtype=torch.float32, device=logits.device)
    best_ids = torch.empty(num_rows, num_top, dtype=torch.int64, device=logits.device)
    if num_rows:
        options = _options(logits)
        inputs = (logits, logits.stride(0), *_chunk_maxima(logits), token_ids, *_gathered(logits, options["TILE"]))
        logprobs_kernel[(num_rows,)](*inputs, chosen, best, best_ids, size, num_top, **options)
    return chosen, best, best_ids


def shape_class(size: int) -> str:
    """Vocabularies that share a configuration."""
    return str(triton.next_power_of_2(size))


def candidates(size: int) -> list[Config]:
    """Configurations worth measuring: tokens of a row that are looked at at a time."""
    tiles = sorted({min(tile, max(triton.next_power_of_2(size), CHUNK.value)) for tile in (2048, 4096, 8192)})
    return [Config({"TILE": tile}, num_warps=warps) for tile in tiles for warps in (4, 8, 16)]


def _default_config(size: int) -> Config:
    tile = min(4096, max(triton.next_power_of_2(size), CHUNK.value))
    return Config({"TILE": tile}, num_warps=8)


def _options(logits: torch.Tensor) -> dict[str, int]:
    size = logits.shape[1]
    config = tuned(OP, shape_class(size), logits.device, _default_config(size))
    return {**config.options(), "MAX_CHUNKS": _max_chunks(logits)}


def _max_chunks(logits: torch.Tensor) -> int:
    return int(triton.next_power_of_2(triton.cdiv(logits.shape[1], CHUNK.value)))


def _chunk_maxima(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The order of each chunk's first maximum and its id, both int32 [R, chunks]."""
    num_rows, size = logits.shape
    num_chunks = triton.cdiv(size, CHUNK.value)
    maxima = torch.empty(num_rows, num_chunks, dtype=torch.int32, device=logits.device)
    ids = torch.empty_like(maxima)
    grid = (num_rows, triton.cdiv(num_chunks, CHUNKS))
    maxima_kernel[grid](logits, logits.stride(0), maxima, ids, size, CHUNKS=CHUNKS, num_warps=4)
    return maxima, ids


def _gathered(logits: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for a tile of tokens of each row, and for their ids."""
    values = torch.empty(logits.shape[0], tile, dtype=logits.dtype, device=logits.device)
    return values, torch.empty_like(values, dtype=torch.int32)


_PARAMETER_DTYPES = {
    "temperature": torch.float32,
    "top_k": torch.int64,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "uniform": torch.float64,
}


def _check(logits: torch.Tensor, **others: torch.Tensor) -> None:
    fits = logits.dim() == 2 and 0 < logits.shape[1] <= MAX_VOCAB
    require(fits, "logits", f"must be [R, V] with V up to {MAX_VOCAB}, got {tuple(logits.shape)}")
    require(logits.dtype in DTYPES, "logits", f"must be float32, float16 or bfloat16, not {logits.dtype}")
    require(logits.shape[1] == 1 or logits.stride(1) == 1, "logits", "must have a row's side by side")
    require_device(logits=logits, **others)


def _require_per_row(x: torch.Tensor, name: str, dtype: torch.dtype, logits: torch.Tensor) -> None:
    fits = x.shape == logits.shape[:1] and x.dtype == dtype and (len(x) < 2 or x.stride(0) == 1)
    require(fits, name, f"must be {dtype} [{logits.shape[0]}] and contiguous")
