"""Launches of every kernel of the package, over tensors whose contents do not matter; see hopper.py."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import product
from types import ModuleType
from typing import Any

import torch

from apt_kernels.triton import (
    activation,
    cross_entropy,
    linear_fp8,
    linear_tile,
    linear_w4a16,
    linear_w8a8,
    linear_w8a16,
    norm,
    paged_attention,
    paged_attention_cut,
    quantize,
    rope_store,
    sampling,
    varlen_attention,
    varlen_attention_backward,
)
from apt_kernels.triton.tuning import Config

Launch = Callable[[], object]
BF16, FP16, FP32, INT8, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn
HEAD_DIMS = (64, 96, 128, 256)
GROUPS = (1, 3, 4, 8)
NUM_KV_HEADS = 8


def configured(module: ModuleType, config: Config, run: Launch) -> Launch:
    """The launch with this configuration."""

    def run_it() -> None:
        looked_up = module.tuned
        module.tuned = lambda *_: config  # type: ignore[attr-defined]
        linear_tile._choose.cache_clear()
        try:
            run()
        finally:
            module.tuned = looked_up  # type: ignore[attr-defined]
            linear_tile._choose.cache_clear()

    return run_it


def cache(head_dim: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], dict[str, torch.Tensor | None]]:
    """Keys and values, and their scales by name."""
    rows = [torch.empty(4, NUM_KV_HEADS, 16, head_dim, dtype=dtype).transpose(1, 2) for _ in range(2)]
    scales = [torch.empty(4, NUM_KV_HEADS, 16).transpose(1, 2) if dtype == INT8 else None for _ in range(2)]
    return rows, {"key_scales": scales[0], "value_scales": scales[1]}


def attention(
    max_seqlen_q: int = 1,
    head_dim: int = 128,
    cache_dtype: torch.dtype = BF16,
    group: int = 4,
    **options: Any,
) -> Launch:
    """Two sequences."""
    num_tokens = 2 * max_seqlen_q
    query_dtype = FP16 if cache_dtype == FP16 else BF16
    rows, scales = cache(head_dim, cache_dtype)
    return lambda: paged_attention.paged_attention(
        torch.empty(num_tokens, NUM_KV_HEADS * group, head_dim, dtype=query_dtype),
        *rows,
        cu_seqlens_q=torch.zeros(3, dtype=torch.int32),
        context_lens=torch.zeros(2, dtype=torch.int32),
        block_tables=torch.zeros(2, 4, dtype=torch.int32),
        num_decodes=2 if max_seqlen_q == 1 else 0,
        max_seqlen_q=max_seqlen_q,
        max_context_len=64,
        scale=1.0,
        **scales,
        **options,
    )


def rope(cache_dtype: torch.dtype = BF16, has_norm: bool = False, head_dim: int = 128, num_tokens: int = 3) -> Launch:
    """Tokens of 32 query heads."""
    dtype = FP16 if cache_dtype == FP16 else BF16
    rows, scales = cache(head_dim, cache_dtype)
    angles, weight = torch.empty(num_tokens, head_dim // 2, dtype=dtype), torch.empty(head_dim, dtype=dtype)
    return lambda: rope_store.rope_and_store_kv(
        torch.empty(num_tokens, 48 * head_dim, dtype=dtype),
        *(angles, angles, *rows, torch.zeros(num_tokens, dtype=torch.int64)),
        num_heads=32,
        query_weight=weight if has_norm else None,
        key_weight=weight if has_norm else None,
        eps=1e-6,
        **scales,
    )


def varlen(head_dim: int = 128, group: int = 4, dtype: torch.dtype = BF16, window: int = 0) -> Launch:
    """Two sequences, forward and backward."""
    query, key = torch.empty(300, 4 * group, head_dim, dtype=dtype), torch.empty(300, 4, head_dim, dtype=dtype)
    layout = torch.zeros(3, dtype=torch.int32)

    def run() -> None:
        out, logsumexp = torch.ops.apt_triton.varlen_attention(query, key, key, layout, 0.1, window)
        torch.ops.apt_triton.varlen_attention_backward(
            query, query, key, key, layout, out, logsumexp, 0.1, window
        )  # fmt: skip

    return run


def linear(kind: str, num_rows: int = 1, dtype: torch.dtype = BF16) -> Launch:
    """A product of 4096 inputs and outputs."""
    size = 4096
    x, scales = torch.empty(num_rows, size, dtype=dtype), torch.empty(size)
    int8, fp8 = torch.empty(size, size, dtype=INT8), torch.empty(size, size, dtype=FP8)
    factors = torch.empty(size // 128, size, dtype=FP16)
    words = torch.empty(size, size // 4, dtype=torch.int32)
    launches: dict[str, Launch] = {
        "w4a16": lambda: linear_w4a16.linear(x, words[:, : size // 8].contiguous(), factors, factors, 128, None, dtype),
        "w8a16": lambda: linear_w8a16.linear(x, words, scales, None, dtype),
        "w8a8": lambda: linear_w8a8.linear(x, int8, scales, None, dtype),
        "fp8": lambda: linear_fp8.linear(x, fp8, scales, None, None, dtype, quantizes_x=True),
        "fp8 blocks": lambda: linear_fp8.linear(
            x, fp8, torch.empty(32, 32), (128, 128), None, dtype, quantizes_x=True
        ),
        "fp8 weight only": lambda: linear_fp8.linear(x, fp8, scales, None, None, dtype, quantizes_x=False),
    }  # fmt: skip
    return launches[kind]


LINEAR_MODULES = {
    "w4a16": linear_w4a16,
    "w8a16": linear_w8a16,
    "w8a8": linear_w8a8,
    "fp8": linear_fp8,
    "fp8 blocks": linear_fp8,
    "fp8 weight only": linear_fp8,
}


def norms(width: int = 4096, dtype: torch.dtype = BF16) -> Launch:
    """Alone, added and backward."""
    x, weight = torch.empty(33, width, dtype=dtype), torch.empty(width, dtype=dtype)

    def run() -> None:
        norm.fused_add_rms_norm(x, x, weight, 1e-5)
        norm.rms_norm(x, weight, 1e-5)
        torch.ops.apt_triton.rms_norm_backward(x, x, x, weight, 1e-5)

    return run


def gate(width: int = 14336, dtype: torch.dtype = BF16) -> Launch:
    """SwiGLU's, forward and backward."""
    gate_up, grad = torch.empty(33, 2 * width, dtype=dtype), torch.empty(33, width, dtype=dtype)

    def run() -> None:
        activation.silu_and_mul(gate_up)
        torch.ops.apt_triton.silu_and_mul_backward(grad, gate_up)

    return run


def choice(vocab_size: int = 128256, dtype: torch.dtype = FP32) -> Launch:
    """Every way to choose a token."""
    logits, wide = torch.empty(3, vocab_size, dtype=dtype), torch.empty(3)
    ids = torch.empty(3, dtype=torch.int64)

    def run() -> None:
        sampling.argmax(logits)
        sampling.sample(logits, wide, ids, wide, wide, wide.double())
        sampling.top_logprobs(logits, ids, 5)

    return run


def loss(dtype: torch.dtype = BF16) -> Launch:
    """Cross-entropy with its gradient."""
    ids, losses = torch.empty(4, dtype=torch.int64), torch.empty(4)
    return lambda: cross_entropy._step(torch.empty(4, 49152, dtype=dtype), ids, losses, -100, 0.0, True)


def quantized(dtype: torch.dtype) -> Launch:
    """Rows in 8 bits."""
    return lambda: quantize.quantize_rows(torch.empty(3, 4096, dtype=BF16), dtype)


SELECTION: dict[str, Launch] = {
    "decode": attention(),
    "decode in segments": attention(num_segments=8),
    "decode int8": attention(cache_dtype=INT8),
    "decode float8": attention(cache_dtype=FP8),
    "short chunks": attention(12),
    "prompt": attention(500),
    "prompt int8": attention(500, cache_dtype=INT8),
    "prompt, window and cap": attention(500, window=1000, soft_cap=50.0),
    "prompt, heads of 80": attention(500, head_dim=80),
    "prompt, heads of 256": attention(500, head_dim=256),
    "rope": rope(),
    "rope int8": rope(INT8, has_norm=True),
    "rope float8": rope(FP8),
    "packed attention": varlen(),
    **{f"linear {kind}": linear(kind, 16) for kind in LINEAR_MODULES},
    "norms": norms(),
    "gate": gate(),
    "choice": choice(),
    "loss": loss(),
    "quantized int8": quantized(INT8),
    "quantized float8": quantized(FP8),
}
"""Of a test that may take a minute."""


def exhaustive() -> Iterator[tuple[str, Launch]]:
    """Names and launches: all classes of shapes in their defaults, and candidates; of most attention only some."""
    yield from _attention()
    yield from _linear()
    yield from _others()


def _attention() -> Iterator[tuple[str, Launch]]:
    for dtype, head_dim, group, length in product((BF16, FP16, FP8, INT8), HEAD_DIMS, GROUPS, (1, 12, 500)):
        name = f"attention {dtype} D{head_dim} G{group} q{length}"
        run = attention(length, head_dim, dtype, group)
        yield f"{name} default", run
        query_dtype = FP16 if dtype == FP16 else BF16
        layer = paged_attention_cut.Layer(NUM_KV_HEADS * group, NUM_KV_HEADS, head_dim, query_dtype, dtype, None)
        configs = paged_attention_cut.candidates(layer, length)
        kind = "candidate"
        if (head_dim, group) != (128, 4):
            configs, kind = random.Random(name).sample(configs, 2), "sampled"
        for config in configs:
            yield f"{name} {kind} {config.options()}", configured(paged_attention_cut, config, run)


def _linear() -> Iterator[tuple[str, Launch]]:
    for kind, module in LINEAR_MODULES.items():
        for num_rows in (1, 20, 64, 500, 4096):
            for dtype in (BF16, FP16):
                yield f"linear {kind} {num_rows} {dtype} default", linear(kind, num_rows, dtype)
            for config in module.candidates(num_rows):
                name = f"linear {kind} {num_rows} candidate {config.options()}"
                yield name, configured(linear_tile, config, linear(kind, num_rows))


def _others() -> Iterator[tuple[str, Launch]]:
    for dtype, head_dim, has_norm in product((BF16, FP16, FP8, INT8), HEAD_DIMS, (False, True)):
        for num_tokens in (3, 1000):
            run = rope(dtype, has_norm, head_dim, num_tokens)
            yield f"rope {dtype} D{head_dim} {has_norm} {num_tokens} default", run
    for config in rope_store.candidates():
        yield f"rope candidate {config.options()}", configured(rope_store, config, rope(INT8, True))
    for head_dim, group, dtype in product(HEAD_DIMS, GROUPS, (BF16, FP32)):
        yield f"packed attention D{head_dim} G{group} {dtype} default", varlen(head_dim, group, dtype)
    both = (varlen_attention, varlen_attention_backward)
    configs = (varlen_attention.candidates(), varlen_attention_backward.query_candidates())
    keys = (varlen_attention_backward, varlen_attention_backward.key_candidates())
    for module, candidates in (*zip(both, configs, strict=True), keys):
        for config in candidates:
            yield f"packed attention candidate {config.options()}", configured(module, config, varlen())
    for width, dtype in product((576, 4096, 8192), (BF16, FP16, FP32)):
        yield f"norms {width} {dtype} default", norms(width, dtype)
        for config in norm.candidates(width):
            yield f"norms {width} {dtype} candidate {config.options()}", configured(norm, config, norms(width, dtype))
    for config in activation.candidates():
        yield f"gate candidate {config.options()}", configured(activation, config, gate())
    for size, dtype in product((49152, 128256, 152064), (FP32, BF16)):
        yield f"choice {size} {dtype} default", choice(size, dtype)
        for config in sampling.candidates(size):
            yield (
                f"choice {size} {dtype} candidate {config.options()}",
                configured(sampling, config, choice(size, dtype)),
            )
    for config in cross_entropy.candidates():
        yield f"loss candidate {config.options()}", configured(cross_entropy, config, loss())
