"""What lies between the products of a layer: norms, rope with the cache's store, SwiGLU's gate. All only move memory.

The peer is what torch.compile makes of the op's twin.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from apt_core.kv_cache import allocate_kv_cache, kv_bytes_per_token
from apt_core.model_config import ModelConfig
from apt_kernels import ops, reference
from benchmarks.kernels.case import Call, Case, Work, compiled, dtype_name
from benchmarks.kernels.sizes import Sizes

EPS = 1e-6
BLOCK_SIZE = 16


def cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Every op at every number of tokens."""
    for name, model in sizes.models:
        for tokens in sizes.tokens:
            yield _rms_norm(name, tokens, model.hidden_size, sizes.dtype, device)
            yield _add_norm(name, tokens, model.hidden_size, sizes.dtype, device)
            yield _gate(name, tokens, model.intermediate_size, sizes.dtype, device)
            for kv_dtype in sizes.kv_dtypes:
                yield _rope(name, model, tokens, kv_dtype, sizes.dtype, device)


def _rms_norm(name: str, tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Case:
    def inputs() -> tuple[torch.Tensor, torch.Tensor]:
        return random(tokens, width, dtype=dtype, device=device), random(width, dtype=dtype, device=device)

    def torchs() -> Call:
        x, weight = inputs()
        return partial(F.rms_norm, x, (width,), weight, EPS)

    return Case(
        "rms_norm",
        f"{name} {tokens}x{width}",
        Work(2 * tokens * width * dtype.itemsize),
        lambda: partial(ops.rms_norm, *inputs(), EPS),
        {"torch": torchs, "compile": lambda: partial(compiled(reference.rms_norm), *inputs(), EPS)},
        {"rms_norm": (width,)},
    )


def _add_norm(name: str, tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Case:
    def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, residual = (random(tokens, width, dtype=dtype, device=device) for _ in range(2))
        return x, residual, random(width, dtype=dtype, device=device)

    return Case(
        "fused_add_rms_norm",
        f"{name} {tokens}x{width}",
        Work(4 * tokens * width * dtype.itemsize),
        lambda: partial(ops.fused_add_rms_norm, *inputs(), EPS),
        {"compile": lambda: partial(compiled(reference.fused_add_rms_norm), *inputs(), EPS)},
        {"rms_norm": (width,)},
    )


def _gate(name: str, tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Case:
    x = partial(random, tokens, 2 * width, dtype=dtype, device=device)
    return Case(
        "silu_and_mul",
        f"{name} {tokens}x{width}",
        Work(3 * tokens * width * dtype.itemsize),
        lambda: partial(ops.silu_and_mul, x()),
        {"compile": lambda: partial(compiled(reference.silu_and_mul), x())},
        {"silu_and_mul": (width,)},
    )


def _rope(
    name: str, model: ModelConfig, tokens: int, kv_dtype: torch.dtype, dtype: torch.dtype, device: torch.device
) -> Case:
    heads, dim = model.num_heads, model.head_dim
    layer = replace(model, num_layers=1)

    def inputs() -> dict[str, object]:
        num_blocks = -(-tokens // BLOCK_SIZE)
        (cache,) = allocate_kv_cache(layer, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=kv_dtype, device=device)
        norm = random(dim, dtype=dtype, device=device) if model.qk_norm else None
        return {
            "qkv": random(tokens, (heads + 2 * model.num_kv_heads) * dim, dtype=dtype, device=device),
            "cos": random(tokens, dim // 2, dtype=dtype, device=device),
            "sin": random(tokens, dim // 2, dtype=dtype, device=device),
            "key_cache": cache.keys,
            "value_cache": cache.values,
            "slot_mapping": torch.randperm(num_blocks * BLOCK_SIZE)[:tokens].to(device),
            "num_heads": heads,
            "query_weight": norm,
            "key_weight": norm,
            "eps": EPS,
            "key_scales": cache.key_scales,
            "value_scales": cache.value_scales,
        }

    # qkv and queries, cos and sin, keys and values, the slots.
    row = (2 * heads + 2 * model.num_kv_heads + 1) * dim * dtype.itemsize + kv_bytes_per_token(layer, kv_dtype) + 8
    return Case(
        "rope_and_store_kv",
        f"{name} {tokens} tokens kv {dtype_name(kv_dtype)}",
        Work(tokens * row),
        lambda: partial(_call, ops.rope_and_store_kv, inputs()),
        {"compile": lambda: partial(_call, compiled(reference.rope_and_store_kv), inputs())},
        {"rope_store": (tokens, dim)},
    )


def _call(function: object, inputs: dict[str, object]) -> object:
    assert callable(function)
    return function(**inputs)


def random(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Normal values."""
    return torch.randn(shape, device=device).to(dtype)
