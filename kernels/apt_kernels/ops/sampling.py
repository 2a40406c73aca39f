"""Tokens and log-probabilities of logits."""

from __future__ import annotations

import torch

from apt_kernels import reference
from apt_kernels.ops import backends
from apt_kernels.ops.backends import require

# Triton is for NVIDIA's GPUs here: a torch without CUDA does not import it.
if torch.version.cuda is not None:
    from apt_kernels.triton import sampling as triton_sampling


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """The first of each row's largest logits, [R, V] -> [R] int64; see `reference.argmax`.

    Raises:
        ValueError: a shape that does not fit.
    """
    _check_logits(logits)
    if backends.is_native(logits):
        out: torch.Tensor = torch.ops.apt_cpu.argmax(logits)
        return out
    if backends.is_triton(logits):
        return triton_sampling.argmax(_rows(logits))
    return reference.argmax(logits)


def sample(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """Draw one token a row from the filtered distribution, [R, V] -> [R] int64; see `reference.sample`.

    A row depends on its own logits, parameters and number only, bit for bit.

    Args:
        temperature: [R] float32, 0 takes the argmax.
        top_k: [R] int64, 0 keeps all.
        top_p, min_p: [R] float32, 1 and 0 keep all.
        uniform: [R] float64 in [0, 1).

    Raises:
        ValueError: shapes or dtypes that do not fit together; names the argument.
    """
    _check_logits(logits)
    _check_per_row(temperature, "temperature", torch.float32, logits)
    _check_per_row(top_k, "top_k", torch.int64, logits)
    _check_per_row(top_p, "top_p", torch.float32, logits)
    _check_per_row(min_p, "min_p", torch.float32, logits)
    _check_per_row(uniform, "uniform", torch.float64, logits)
    if backends.is_native(logits):
        out: torch.Tensor = torch.ops.apt_cpu.sample(logits, temperature, top_k, top_p, min_p, uniform)
        return out
    if backends.is_triton(logits):
        parameters = (temperature, top_k, top_p, min_p, uniform)
        return triton_sampling.sample(_rows(logits), *(x.contiguous() for x in parameters))
    return reference.sample(logits, temperature, top_k, top_p, min_p, uniform)


def top_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of given tokens and of the num_top most likely ones; see `reference.top_logprobs`.

    Raises:
        ValueError: shapes or dtypes that do not fit together; names the argument.
    """
    _check_logits(logits)
    _check_per_row(token_ids, "token_ids", torch.int64, logits)
    require(0 <= num_top <= logits.shape[1], "num_top", f"must be at most {logits.shape[1]}, got {num_top}")
    if backends.is_native(logits):
        chosen, best, ids = torch.ops.apt_cpu.top_logprobs(logits, token_ids, num_top)
        return chosen, best, ids
    if backends.is_triton(logits):
        return triton_sampling.top_logprobs(_rows(logits), token_ids.contiguous(), num_top)
    return reference.top_logprobs(logits, token_ids, num_top)


def _check_logits(logits: torch.Tensor) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be [R, V], got {tuple(logits.shape)}")


def _check_per_row(x: torch.Tensor, name: str, dtype: torch.dtype, logits: torch.Tensor) -> None:
    fits = x.shape == logits.shape[:1] and x.dtype == dtype and x.device == logits.device
    require(fits, name, f"must be {dtype} [{logits.shape[0]}] on {logits.device}")


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x [R, C] with what a row holds side by side."""
    return x if x.stride(1) == 1 else x.contiguous()
