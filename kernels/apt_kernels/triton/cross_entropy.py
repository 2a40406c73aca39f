"""Fused linear cross-entropy (see `apt_kernels.cross_entropy`): the losses of a chunk of logits, and their gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from apt_kernels.cross_entropy import define
from apt_kernels.triton.launch import require, require_device
from apt_kernels.triton.tuning import Config, tuned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit(do_not_specialize=["ignore_index"])
def _cross_entropy_kernel(
    logits,
    targets,
    losses,
    ignore_index,
    z_loss,
    WITH_GRADIENT: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: its loss and, over the logits, their gradient. A target outside the vocabulary has a loss of NaN."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * VOCAB
    target = tl.load(targets + row)
    if target == ignore_index:
        tl.store(losses + row, 0.0)
        if WITH_GRADIENT:
            for first in range(0, VOCAB, BLOCK):
                columns = first + tl.arange(0, BLOCK)
                zeros = tl.zeros((BLOCK,), tl.float32).to(logits.dtype.element_ty)
                tl.store(logits + columns, zeros, mask=columns < VOCAB)
        return
    is_valid = (target >= 0) & (target < VOCAB)
    # Read before any of the row is overwritten.
    chosen = tl.load(logits + target, mask=is_valid, other=float("nan")).to(tl.float32)

    top = float("-inf")
    total = 0.0
    for first in range(0, VOCAB, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        x = tl.load(logits + columns, mask=columns < VOCAB, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(x - new_top), 0)
        top = new_top
    logsumexp = top + tl.log(total)
    tl.store(losses + row, logsumexp - chosen + z_loss * logsumexp * logsumexp)

    if WITH_GRADIENT:
        slope = 1.0 + 2.0 * z_loss * logsumexp
        for first in range(0, VOCAB, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            x = tl.load(logits + columns, mask=columns < VOCAB, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(x - logsumexp) * slope - tl.where(columns == target, 1.0, 0.0)
            tl.store(logits + columns, gradient.to(logits.dtype.element_ty), mask=columns < VOCAB)


def shape_class(vocab_size: int) -> str:
    """What the best blocks depend on."""
    return f"v{triton.next_power_of_2(vocab_size)}"


def candidates() -> list[Config]:
    """Configurations worth measuring."""
    return [Config({"BLOCK": block}, num_warps=warps) for block in (2048, 4096, 8192, 16384) for warps in (4, 8, 16)]


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the tokens' losses and their number; see `reference.linear_cross_entropy`.

    Args:
        hidden: [T, C] float32, float16 or bfloat16. weight: [V, C]. targets: [T] int64 ids, or ignore_index.
        chunk_size: how many tokens' logits exist at a time; None lets their memory decide.

    Returns:
        float32 [], differentiable in hidden and weight, and int64 []. A target that is no id makes the sum NaN.

    Raises:
        ValueError: an argument the kernel cannot run; names it.
    """
    require_device(hidden=hidden, weight=weight, targets=targets)
    require(hidden.dim() == 2, "hidden", f"must be [T, C], got {tuple(hidden.shape)}")
    require(hidden.dtype in DTYPES, "hidden", f"must be one of {DTYPES}, got {hidden.dtype}")
    fits = weight.dim() == 2 and weight.shape[1] == hidden.shape[1] and weight.dtype in (hidden.dtype, torch.float32)
    wanted = f"{hidden.dtype} [V, {hidden.shape[1]}]"
    require(fits and len(weight) > 0, "weight", f"must be {wanted}, got {weight.dtype} {tuple(weight.shape)}")
    fits = targets.shape == hidden.shape[:1] and targets.dtype == torch.int64 and targets.is_contiguous()
    require(fits, "targets", f"must be contiguous int64 [{hidden.shape[0]}]")
    require(chunk_size is None or chunk_size > 0, "chunk_size", f"must be positive, got {chunk_size}")
    return _loss(hidden, weight, targets, ignore_index, z_loss, chunk_size)


def _step(
    logits: torch.Tensor,
    targets: torch.Tensor,
    losses: torch.Tensor,
    ignore_index: int,
    z_loss: float,
    with_gradient: bool,
) -> None:
    """A `cross_entropy.Step`; the logits are contiguous."""
    num_rows, vocab_size = logits.shape
    default = Config({"BLOCK": min(4096, triton.next_power_of_2(vocab_size))}, num_warps=8)
    config = tuned("cross_entropy", shape_class(vocab_size), logits.device, default)
    _cross_entropy_kernel[(num_rows,)](
        *(logits, targets, losses, ignore_index, z_loss),
        WITH_GRADIENT=with_gradient,
        VOCAB=vocab_size,
        **config.options(),
    )


_loss = define("apt_triton::linear_cross_entropy", _step)
