"""Compile what some launches would run on a Hopper GPU, without one, and print what came out.

The interpreter runs much that the compiler refuses, and says nothing of shared memory or of the instructions chosen.
Triton must not be interpreting, so this is a process of its own: `TRITON_INTERPRET=0 python hopper.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from apt_kernels.triton import launch, paged_attention, rope_store

FP8 = torch.float8_e4m3fn


class Hopper:
    """What the compiler asks a driver for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled_in(run: Callable[[], object]) -> dict[str, dict[str, Any]]:
    """By kernel: bytes of shared memory, and whether it has instructions of interest."""
    found: dict[str, dict[str, Any]] = {}
    launch_it = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch_it(self, *args, grid=grid, warmup=True, **options)
        found[self.fn.__name__] = {
            "shared": kernel.metadata.shared,
            "wgmma": "wgmma" in kernel.asm["ptx"],
            "copies": "cp.async.cg.shared.global [ %r" in kernel.asm["ptx"],
            "fma": "fma." in kernel.asm["ptx"],
        }
        return kernel

    JITFunction.run = compile_only
    try:
        run()
    finally:
        JITFunction.run = launch_it
    return found


def attention(
    max_seqlen_q: int = 1, head_dim: int = 128, cache_dtype: torch.dtype = torch.bfloat16, **options: Any
) -> Callable[[], object]:
    """Two sequences of an 8B model's heads."""
    num_tokens = 2 * max_seqlen_q
    keys, values = (torch.empty(4, 8, 16, head_dim, dtype=cache_dtype).transpose(1, 2) for _ in range(2))
    scales = [torch.empty(4, 8, 16).transpose(1, 2) if cache_dtype == torch.int8 else None for _ in range(2)]
    return lambda: paged_attention.paged_attention(
        torch.empty(num_tokens, 32, head_dim, dtype=torch.bfloat16),
        keys,
        values,
        cu_seqlens_q=torch.zeros(3, dtype=torch.int32),
        context_lens=torch.zeros(2, dtype=torch.int32),
        block_tables=torch.zeros(2, 4, dtype=torch.int32),
        num_decodes=2 if max_seqlen_q == 1 else 0,
        max_seqlen_q=max_seqlen_q,
        max_context_len=64,
        scale=1.0,
        key_scales=scales[0],
        value_scales=scales[1],
        **options,
    )


def rope(cache_dtype: torch.dtype = torch.bfloat16, has_norm: bool = False) -> Callable[[], object]:
    """Three tokens of the same heads."""
    keys, values = (torch.empty(4, 8, 16, 128, dtype=cache_dtype).transpose(1, 2) for _ in range(2))
    scales = [torch.empty(4, 8, 16).transpose(1, 2) if cache_dtype == torch.int8 else None for _ in range(2)]
    angles, weight = torch.empty(3, 64, dtype=torch.bfloat16), torch.empty(128, dtype=torch.bfloat16)
    return lambda: rope_store.rope_and_store_kv(
        torch.empty(3, 48 * 128, dtype=torch.bfloat16),
        *(angles, angles, keys, values, torch.zeros(3, dtype=torch.int64)),
        num_heads=32,
        query_weight=weight if has_norm else None,
        key_weight=weight if has_norm else None,
        eps=1e-6,
        key_scales=scales[0],
        value_scales=scales[1],
    )


LAUNCHES = {
    "decode": attention(),
    "decode in segments": attention(num_segments=8),
    "decode int8": attention(cache_dtype=torch.int8),
    "decode float8": attention(cache_dtype=FP8),
    "short chunks": attention(12),
    "prompt": attention(500),
    "prompt int8": attention(500, cache_dtype=torch.int8),
    "prompt, window and cap": attention(500, window=1000, soft_cap=50.0),
    "prompt, heads of 80": attention(500, head_dim=80),
    "prompt, heads of 256": attention(500, head_dim=256),
    "rope": rope(),
    "rope int8": rope(torch.int8, has_norm=True),
    "rope float8": rope(FP8),
}


def main() -> None:
    """Print kernels by launch, as JSON."""
    driver.set_active(Hopper())
    launch.INTERPRETED = True  # so that tensors on a processor pass for a GPU's
    print(json.dumps({name: compiled_in(run) for name, run in LAUNCHES.items()}))


if __name__ == "__main__":
    main()
