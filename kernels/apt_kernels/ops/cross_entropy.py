"""The loss of language models, products with the vocabulary included."""

from __future__ import annotations

import torch

from apt_kernels.cpu import training as cpu_training
from apt_kernels.cross_entropy import wide_dtype
from apt_kernels.ops import backends
from apt_kernels.ops.backends import require

# Triton is for NVIDIA's GPUs here: a torch without CUDA does not import it.
if torch.version.cuda is not None:
    from apt_kernels.triton import cross_entropy as triton_cross_entropy


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the tokens' losses, and their number, in little memory; see `reference.linear_cross_entropy`.

    The logits of a chunk of tokens exist at a time, and become the gradients at once (see `apt_kernels.cross_entropy`).

    Args:
        hidden: [T, C]. weight: [V, C], which may be that of the embedding; of hidden's dtype, or float32 where that is
            of 16 bits: then the products are made in 16, and the gradient is float32 without a cast of its own.
        targets: [T] int64, ids or ignore_index.
        z_loss: adds so much of the square of each token's logsumexp.

    Returns:
        The sum [], differentiable once in hidden and weight, and the number [] int64.

    Raises:
        ValueError: shapes or dtypes that do not fit together; names the argument.
    """
    require(hidden.dim() == 2, "hidden", f"must be [T, C], got {tuple(hidden.shape)}")
    fits = weight.dim() == 2 and weight.shape[1] == hidden.shape[1]
    fits = fits and weight.dtype in (hidden.dtype, wide_dtype(hidden.dtype))
    require(fits and len(weight) > 0, "weight", f"must be {hidden.dtype} [V, {hidden.shape[1]}]")
    fits = targets.shape == hidden.shape[:1] and targets.dtype == torch.int64
    require(fits, "targets", f"must be int64 [{hidden.shape[0]}]")
    if backends.is_triton(hidden):
        return triton_cross_entropy.linear_cross_entropy(
            hidden, weight, targets, ignore_index=ignore_index, z_loss=z_loss
        )
    return cpu_training.linear_cross_entropy(hidden, weight, targets, ignore_index, z_loss)
