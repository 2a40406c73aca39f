"""Cross-entropy of a linear layer's logits for training, which never exist as a whole.

The method of Liger Kernel (arXiv 2410.10989): the logits of a chunk of tokens become, in place, their own gradient, and
that at once its share of the gradients of hidden states and weight. So the forward pass computes the gradients of the
losses' sum, and the backward pass multiplies them with that of the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 256 * 2**20
"""Of logits at once. Each chunk reads and writes the weight's whole gradient, so it should be some hundred tokens."""
CHUNK_MULTIPLE = 128
CACHED_BYTES = 2 * 2**20
"""Of logits that a processor's cache holds from one pass over them to the next."""

Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, float, bool], None]
"""(logits [n, V], targets [n], losses [n], ignore_index, z_loss, with_gradient): writes the losses, and over the logits
their gradient if it is wanted."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what losses and the weight's gradient are summed."""
    return torch.promote_types(dtype, torch.float32)


def torch_step(
    logits: torch.Tensor,
    targets: torch.Tensor,
    losses: torch.Tensor,
    ignore_index: int,
    z_loss: float,
    with_gradient: bool,
) -> None:
    """A `Step` in torch's own ops, a few rows at a time on a processor: what they pass on stays in its cache."""
    wide = wide_dtype(logits.dtype)
    num_rows = len(logits)
    if logits.device.type == "cpu":
        num_rows = max(CACHED_BYTES // (logits.shape[1] * wide.itemsize), 1)
    for start in range(0, len(logits), num_rows):
        rows = slice(start, start + num_rows)
        _step_on_rows(logits[rows], targets[rows], losses[rows], ignore_index, z_loss, with_gradient)


def _step_on_rows(
    logits: torch.Tensor,
    targets: torch.Tensor,
    losses: torch.Tensor,
    ignore_index: int,
    z_loss: float,
    with_gradient: bool,
) -> None:
    wide = wide_dtype(logits.dtype)
    is_ignored = (targets == ignore_index).unsqueeze(1)
    chosen = targets.unsqueeze(1).masked_fill(is_ignored, 0)
    logprobs = logits.log_softmax(-1, dtype=wide)
    chosen_logprobs = logprobs.gather(1, chosen)
    each, factor = -chosen_logprobs, None
    if z_loss:
        logsumexp = logits.gather(1, chosen).to(wide) - chosen_logprobs
        each, factor = each + z_loss * logsumexp.square(), 1 + 2 * z_loss * logsumexp
    losses.copy_(each.masked_fill_(is_ignored, 0).squeeze(1))
    if with_gradient:
        gradient = logprobs.exp_() if factor is None else logprobs.exp_().mul_(factor)
        gradient.scatter_add_(1, chosen, gradient.new_full(chosen.shape, -1))
        logits.copy_(gradient.masked_fill_(is_ignored, 0))


def define(name: str, step: Step) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The loss with this step, as a custom op of this name; see `reference.linear_cross_entropy`.

    What it returns takes (hidden, weight, targets, ignore_index, z_loss, chunk_size), the last None for CHUNK_BYTES.
    """

    @torch.library.custom_op(name, mutates_args=())
    def op(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        ignore_index: int,
        z_loss: float,
        chunk_size: int,
        with_hidden_grad: bool,
        with_weight_grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        _, count, hidden_grad, weight_grad = outputs = _outputs(hidden, weight, with_hidden_grad, with_weight_grad)
        weight = weight.to(hidden.dtype)
        losses = torch.empty(len(hidden), dtype=outputs[0].dtype, device=hidden.device)
        logits = torch.empty(min(chunk_size, len(hidden)), len(weight), dtype=hidden.dtype, device=hidden.device)
        for start in range(0, len(hidden), chunk_size):
            rows = slice(start, start + chunk_size)
            chunk = logits[: len(hidden[rows])]
            torch.mm(hidden[rows], weight.T, out=chunk)
            step(chunk, targets[rows], losses[rows], ignore_index, z_loss, with_hidden_grad or with_weight_grad)
            if with_hidden_grad:
                torch.mm(chunk, weight, out=hidden_grad[rows])
            if with_weight_grad:
                _add_product(weight_grad, chunk.T, hidden[rows], is_first=start == 0)
        if len(hidden) == 0:
            weight_grad.zero_()
        torch.sum(losses, 0, out=outputs[0])
        torch.sum(targets != ignore_index, 0, out=count)
        return outputs

    @op.register_fake
    def _(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        ignore_index: int,
        z_loss: float,
        chunk_size: int,
        with_hidden_grad: bool,
        with_weight_grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return _outputs(hidden, weight, with_hidden_grad, with_weight_grad)

    op.register_autograd(_gradients, setup_context=_keep)

    def loss(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        ignore_index: int,
        z_loss: float,
        chunk_size: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
        size = chunk_size or max(CHUNK_BYTES // (len(weight) * hidden.itemsize * CHUNK_MULTIPLE), 1) * CHUNK_MULTIPLE
        total, count, _, _ = op(hidden, weight, targets, ignore_index, z_loss, size, *wanted)
        return total, count

    return loss


def _outputs(
    hidden: torch.Tensor, weight: torch.Tensor, with_hidden_grad: bool, with_weight_grad: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum of the losses [], number of tokens [], gradients of hidden [T, C] and weight [V, C]; empty if not wanted."""
    wide, device = wide_dtype(hidden.dtype), hidden.device
    return (
        torch.empty((), dtype=wide, device=device),
        torch.empty((), dtype=torch.int64, device=device),
        torch.empty(hidden.shape if with_hidden_grad else (0,), dtype=hidden.dtype, device=device),
        torch.empty(weight.shape if with_weight_grad else (0,), dtype=wide, device=device),
    )


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, is_first: bool) -> None:
    """total += left @ right, or total = left @ right.

    A GPU does not round the product to less than total's precision. A processor does, as it would for the gradient of
    any layer in 16 bits: float32 products take it twice the time.
    """
    beta = 0 if is_first else 1
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, beta=beta, out=total)
    elif total.device.type == "cuda":
        torch.addmm(total, left, right, beta=beta, out_dtype=total.dtype, out=total)
    elif is_first:
        total.copy_(left @ right)
    else:
        total.add_(left @ right)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, weight = inputs[:2]
    _, count, hidden_grad, weight_grad = output
    ctx.mark_non_differentiable(count, hidden_grad, weight_grad)
    ctx.save_for_backward(hidden_grad, weight_grad)
    ctx.dtypes, ctx.wanted = (hidden.dtype, weight.dtype), inputs[-2:]


@once_differentiable
def _gradients(ctx: Any, total_grad: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    gradients = [
        _scaled(gradient, total_grad, dtype) if is_wanted else None
        for gradient, dtype, is_wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted, strict=True)
    ]
    return (*gradients, None, None, None, None, None, None)


def _scaled(x: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x * factor, rounded once and without another tensor of a wide x's size."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    return torch.mul(x.to(factor.dtype), factor, out=out)
