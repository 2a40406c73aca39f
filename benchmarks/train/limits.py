"""What the matrix products of a training step take by themselves."""

from __future__ import annotations

import torch

from apt_core.model_config import ModelConfig
from benchmarks.machine import best_of


def products_seconds(model: ModelConfig, num_tokens: int, dtype: torch.dtype, rounds: int = 3) -> float:
    """Seconds of all products of a forward and backward pass over so many tokens, at their shapes, attention left out.

    Each weight [out, in] has three: outputs, and the gradients of inputs and weight. Those that read the same input are
    one, as they could be.
    """
    heads, kv = model.num_heads * model.head_dim, 2 * model.num_kv_heads * model.head_dim
    width, inner = model.hidden_size, model.intermediate_size
    shapes = ((heads + kv, width), (width, heads), (2 * inner, width), (width, inner))
    layer = sum(_weight_seconds(*shape, num_tokens, dtype, rounds) for shape in shapes)
    return model.num_layers * layer + _weight_seconds(model.vocab_size, width, num_tokens, dtype, rounds)


def _weight_seconds(num_out: int, num_in: int, num_tokens: int, dtype: torch.dtype, rounds: int) -> float:
    x = torch.randn(num_tokens, num_in).to(dtype)
    weight, out_grad = torch.randn(num_out, num_in).to(dtype), torch.randn(num_tokens, num_out).to(dtype)
    out, x_grad, weight_grad = (torch.empty_like(like) for like in (out_grad, x, weight))
    return (
        best_of(lambda: torch.mm(x, weight.T, out=out), rounds)
        + best_of(lambda: torch.mm(out_grad, weight, out=x_grad), rounds)
        + best_of(lambda: torch.mm(out_grad.T, x, out=weight_grad), rounds)
    )
