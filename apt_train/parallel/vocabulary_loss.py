"""Cross-entropy of a head whose vocabulary is divided among processes; no logits are gathered, none exist as a whole.

As in `apt_kernels.cross_entropy` the logits of a chunk of tokens become their own gradient, and that the gradients of
hidden states and weight. Of each token only its largest logit, the sum of exponentials and the logit of its label go
over the processes (arXiv 1909.08053, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from apt_kernels.cross_entropy import CHUNK_BYTES, CHUNK_MULTIPLE, wide_dtype
from apt_train.data.batch import UNSCORED


class VocabularyLoss:
    """A `HeadLoss` over a mesh of one dimension, of which each process has some tokens' hidden states [T/n, C]."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh

    def __call__(
        self, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, with_accuracy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of all labels [T] and the head's weight, a DTensor [V, C] divided by V; the same on all processes."""
        assert isinstance(weight, DTensor)
        part = weight.to_local().to(hidden.dtype)
        gathered = DTensor.from_local(hidden, self._mesh, [Shard(0)], run_check=False).redistribute(
            placements=[Replicate()]
        )
        # Every process adds what its part of the vocabulary says of a token.
        whole = gathered.to_local(grad_placements=[Partial()])
        first = self._mesh.get_local_rank() * len(part)
        losses, right = _Loss.apply(  # type: ignore[no-untyped-call]
            whole, part, labels - first, labels != UNSCORED, self._mesh.get_group(), torch.is_grad_enabled()
        )
        return losses, right if with_accuracy else torch.zeros_like(right)


class _Loss(torch.autograd.Function):
    """(hidden [T, C], weight [V/n, C], labels [T] relative to the weight's first, which count [T], processes,
    whether gradients are wanted)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        is_scored: torch.Tensor,
        group: dist.ProcessGroup,
        with_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide = wide_dtype(hidden.dtype)
        total, right = hidden.new_zeros((), dtype=wide), labels.new_zeros(())
        wants_hidden, wants_weight = (needed and with_gradient for needed in ctx.needs_input_grad[:2])
        hidden_grad = torch.empty_like(hidden) if wants_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        for rows in torch.arange(len(hidden), device="cpu").split(_chunk_size(weight)):
            chunk = slice(int(rows[0]), int(rows[-1]) + 1)
            losses, num_right, gradient = _chunk(hidden[chunk] @ weight.T, labels[chunk], is_scored[chunk], group)
            total += losses
            right += num_right
            gradient = gradient.to(hidden.dtype)
            if hidden_grad is not None:
                torch.mm(gradient, weight, out=hidden_grad[chunk])
            if weight_grad is not None:
                weight_grad += gradient.T @ hidden[chunk]
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(right)
        return total, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total_grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = [
            None if gradient is None else (gradient * total_grad).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None)


def _chunk(
    logits: torch.Tensor, labels: torch.Tensor, is_scored: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(Sum of losses [], likeliest labels [], gradient of that sum in the logits) of logits [n, V/n].

    The first two are the same on all processes.
    """
    logits = logits.to(wide_dtype(logits.dtype))
    own_largest, likeliest = logits.max(-1)
    largest = own_largest.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    is_here = is_scored & (labels >= 0) & (labels < logits.shape[1])
    here = labels.where(is_here, 0).unsqueeze(1)
    chosen = logits.gather(1, here).squeeze(1).where(is_here, 0)
    is_right = is_here & (likeliest == labels) & (own_largest == largest)
    exponentials = logits.sub_(largest.unsqueeze(1)).exp_()
    sums = torch.stack((exponentials.sum(-1), chosen, is_right.to(chosen.dtype)))
    dist.all_reduce(sums, group=group)
    each = sums[0].log() + largest - sums[1]
    gradient = exponentials.div_(sums[0].unsqueeze(1))
    gradient.scatter_add_(1, here, -is_here.to(gradient.dtype).unsqueeze(1))
    gradient.masked_fill_(~is_scored.unsqueeze(1), 0)
    return each.masked_fill(~is_scored, 0).sum(), sums[2].sum().round().long(), gradient


def _chunk_size(weight: torch.Tensor) -> int:
    return max(CHUNK_BYTES // (len(weight) * weight.itemsize * CHUNK_MULTIPLE), 1) * CHUNK_MULTIPLE
