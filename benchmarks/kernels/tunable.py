"""What can be tuned: by op, from what a case says of itself to its class of shapes and the candidates of that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from apt_kernels.triton import (
    activation,
    cross_entropy,
    linear_fp8,
    linear_w4a16,
    linear_w8a8,
    linear_w8a16,
    norm,
    paged_attention_cut,
    rope_store,
    sampling,
    varlen_attention,
    varlen_attention_backward,
    varlen_tiles,
)
from apt_kernels.triton.paged_attention_cut import Layer
from apt_kernels.triton.tuning import Config


@dataclass(frozen=True)
class Tunable:
    """Both take the arguments that a case has under the op's name."""

    shape_class: Callable[..., str]
    candidates: Callable[..., list[Config]]


def _layer(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, kv_dtype: torch.dtype) -> Layer:
    return Layer(heads, kv_heads, dim, dtype, kv_dtype, window=None)


def _linear(candidates: Callable[[int], list[Config]], shape_class: Callable[[int, int, int], str]) -> Tunable:
    return Tunable(shape_class, lambda rows, num_out, num_in: candidates(rows))


def _varlen(candidates: Callable[[], list[Config]]) -> Tunable:
    return Tunable(varlen_tiles.shape_class, lambda dim, dtype: candidates())


TUNABLE = {
    "paged_attention": Tunable(
        lambda *layer_and_queries: paged_attention_cut.shape_class(
            _layer(*layer_and_queries[:-1]), layer_and_queries[-1]
        ),
        lambda *layer_and_queries: paged_attention_cut.candidates(
            _layer(*layer_and_queries[:-1]), layer_and_queries[-1]
        ),
    ),
    "linear_w8a16": _linear(linear_w8a16.candidates, linear_w8a16.shape_class),
    "linear_w4a16": _linear(linear_w4a16.candidates, linear_w4a16.shape_class),
    "linear_w8a8": _linear(linear_w8a8.candidates, linear_w8a8.shape_class),
    "linear_fp8": _linear(linear_fp8.candidates, linear_fp8.shape_class),
    "rms_norm": Tunable(norm.shape_class, norm.candidates),
    "rms_norm_backward": Tunable(norm.shape_class, norm.candidates),
    "silu_and_mul": Tunable(activation.shape_class, lambda width: activation.candidates()),
    "rope_store": Tunable(rope_store.shape_class, lambda tokens, dim: rope_store.candidates()),
    "varlen_attention": _varlen(varlen_attention.candidates),
    "varlen_attention_query_grad": _varlen(varlen_attention_backward.query_candidates),
    "varlen_attention_key_grad": _varlen(varlen_attention_backward.key_candidates),
    "cross_entropy": Tunable(cross_entropy.shape_class, lambda vocab_size: cross_entropy.candidates()),
    "sampling": Tunable(sampling.shape_class, sampling.candidates),
}
