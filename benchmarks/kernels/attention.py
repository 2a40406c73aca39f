"""`python -m benchmarks.kernels.attention`: paged attention beside the machine's limits and torch's dense attention.

Blocks lie anywhere in the cache, and calls go through as many caches as it takes for keys and values to come from
memory every time, as they do in a model. A decode should read at the machine's bandwidth, a prefill multiply at its
rate. The peer is torch's scaled_dot_product_attention in bfloat16 over keys and values that lie side by side, which an
engine would have to gather first. Ours and the peer take turns; figures are medians.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from statistics import median

import torch
import torch.nn.functional as F

from apt_core.kv_cache import LayerKVCache, allocate_kv_cache, kv_bytes_per_token
from apt_core.model_config import ModelConfig
from apt_kernels import ops
from benchmarks.machine import Limits, describe, measure_limits
from benchmarks.table import print_table

BLOCK_SIZE = 16
BEYOND_CACHES = 128 * 2**20
MOST_WITH_PEER = 2**30
"""Bytes of keys and values beyond which the peer's own copy of them is not made."""
NUM_BLOCKS = 2
BLOCK_SECONDS = 0.2


def _one_layer(num_heads: int, num_kv_heads: int, head_dim: int) -> ModelConfig:
    """Heads are all that matters here."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=0,
        hidden_size=0,
        intermediate_size=0,
        num_layers=1,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=0,
        rms_norm_eps=0.0,
    )


MODELS = {"SmolLM2": _one_layer(9, 3, 64), "Qwen3-0.6B": _one_layer(16, 8, 128)}
DTYPES = (torch.bfloat16, torch.int8)
BATCHES = (1, 8, 32)
CONTEXTS = (256, 1024, 4096, 16384)
PROMPTS = (512, 2048)


@dataclass(frozen=True)
class Case:
    """Sequences of one length, with so many queries each at their end."""

    heads: ModelConfig
    num_seqs: int
    num_queries: int
    context: int
    dtype: torch.dtype

    @property
    def kv_bytes(self) -> int:
        """What one call reads, once."""
        return self.num_seqs * self.context * kv_bytes_per_token(self.heads, self.dtype)

    @property
    def num_flop(self) -> int:
        """Of the two products, for the keys that queries see."""
        seen = self.num_queries * self.context - self.num_queries * (self.num_queries - 1) // 2
        return 4 * self.num_seqs * seen * self.heads.num_heads * self.heads.head_dim

    @property
    def num_copies(self) -> int:
        """Caches to go through in turn."""
        return max(1, -(-BEYOND_CACHES // self.kv_bytes))

    def ours(self) -> Iterator[Callable[[], object]]:
        """The paged op, over one cache after the other."""
        blocks_per_seq = -(-self.context // BLOCK_SIZE)
        num_blocks = self.num_seqs * blocks_per_seq
        caches = [self._cache(num_blocks) for _ in range(self.num_copies)]
        query = torch.randn(self.num_seqs * self.num_queries, self.heads.num_heads, self.heads.head_dim).bfloat16()
        attend = partial(
            ops.paged_attention,
            query,
            cu_seqlens_q=torch.arange(self.num_seqs + 1, dtype=torch.int32) * self.num_queries,
            context_lens=torch.full((self.num_seqs,), self.context, dtype=torch.int32),
            block_tables=torch.randperm(num_blocks).view(self.num_seqs, -1).to(torch.int32),
            num_decodes=self.num_seqs if self.num_queries == 1 else 0,
            scale=self.heads.head_dim**-0.5,
        )
        return cycle(
            [partial(attend, c.keys, c.values, key_scales=c.key_scales, value_scales=c.value_scales) for c in caches]
        )

    def _cache(self, num_blocks: int) -> LayerKVCache:
        (cache,) = allocate_kv_cache(
            self.heads, num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=self.dtype, device=torch.device("cpu")
        )
        for rows, scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales)):
            if scales is None:
                rows.copy_(torch.randn(rows.shape[1:]))
            else:
                rows.copy_(torch.randint(-127, 128, rows.shape[1:]))
                scales.fill_(1 / 64)
        return cache

    def peers(self) -> Iterator[Callable[[], object]]:
        """torch's attention over dense bfloat16; none where that is too large."""
        shape = (self.num_seqs, self.heads.num_kv_heads, self.context, self.heads.head_dim)
        wide_bytes = self.num_seqs * self.context * kv_bytes_per_token(self.heads, torch.bfloat16)
        if wide_bytes > MOST_WITH_PEER:
            return iter(())
        some = torch.randn(1, 1, *shape[2:]).bfloat16()
        num_copies = max(1, -(-BEYOND_CACHES // wide_bytes))
        caches = [(some.expand(shape).clone(), some.expand(shape).clone()) for _ in range(num_copies)]
        query = torch.randn(self.num_seqs, self.heads.num_heads, self.num_queries, self.heads.head_dim).bfloat16()
        attend = partial(F.scaled_dot_product_attention, query, enable_gqa=True, is_causal=self.num_queries > 1)
        return cycle([partial(attend, *cache) for cache in caches])


def main() -> None:
    """A table of decodes and one of prompts."""
    args = _parse()
    if args.threads:
        ops.set_num_threads(args.threads)
    print(describe())
    limits = measure_limits(torch.bfloat16)
    print(f"limits    reads {limits.read_gb_s:.1f} GB/s, multiplies {limits.gemm_gflop_s:.0f} GFLOP/s (bfloat16)")
    decodes, prompts = [], []
    for name, heads in MODELS.items():
        if args.only not in name:
            continue
        for dtype in DTYPES:
            keys = str(dtype).removeprefix("torch.")
            for num_seqs in args.batches:
                for context in args.contexts:
                    case = Case(heads, num_seqs, 1, context, dtype)
                    decodes.append([name, keys, str(num_seqs), str(context), *_decode_cells(case, limits)])
            for length in args.prompts:
                case = Case(heads, 1, length, length, dtype)
                prompts.append([name, keys, str(length), *_prompt_cells(case, limits)])
    if decodes:
        print("\ndecode: one query a sequence")
        print_table(["", "KV", "batch", "context", "us", "GB/s", "of reads", "x torch"], decodes)
    if prompts:
        print("\nprefill: one prompt, causal")
        print_table(["", "KV", "prompt", "us", "GFLOP/s", "of rate", "x torch"], prompts)


def measure(case: Case) -> tuple[float, float | None]:
    """Median seconds of a call of ours, and of the peer's; they take turns in blocks."""
    times: list[float] = []
    peer_times: list[float] = []
    ours, peers = case.ours(), case.peers()
    for _ in range(NUM_BLOCKS):
        times += _block(ours)
        peer_times += _block(peers)
    return median(times), median(peer_times) if peer_times else None


def _block(calls: Iterator[Callable[[], object]]) -> list[float]:
    """Seconds of each call for a while, without the first third: the other's threads spin before they sleep."""
    times: list[float] = []
    deadline = time.perf_counter() + BLOCK_SECONDS
    for call in calls:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
        if time.perf_counter() > deadline and len(times) >= 6:
            break
    return times[len(times) // 3 :]


def _decode_cells(case: Case, limits: Limits) -> list[str]:
    seconds, peer_seconds = measure(case)
    gb_s = case.kv_bytes / seconds / 1e9
    return [f"{seconds * 1e6:.0f}", f"{gb_s:.1f}", f"{gb_s / limits.read_gb_s:.0%}", _ratio(seconds, peer_seconds)]


def _prompt_cells(case: Case, limits: Limits) -> list[str]:
    seconds, peer_seconds = measure(case)
    gflop_s = case.num_flop / seconds / 1e9
    share = f"{gflop_s / limits.gemm_gflop_s:.0%}"
    return [f"{seconds * 1e6:.0f}", f"{gflop_s:.0f}", share, _ratio(seconds, peer_seconds)]


def _ratio(seconds: float, peer_seconds: float | None) -> str:
    return "-" if peer_seconds is None else f"{peer_seconds / seconds:.2f}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.attention", description=__doc__)
    parser.add_argument("--threads", type=int, default=0, help="0 takes all")
    parser.add_argument("--batches", type=int, nargs="*", default=BATCHES, help="of the decodes")
    parser.add_argument("--contexts", type=int, nargs="*", default=CONTEXTS, help="of the decodes, in tokens")
    parser.add_argument("--prompts", type=int, nargs="*", default=PROMPTS, help="their tokens")
    parser.add_argument("--only", default="", help="models whose name contains this")
    return parser.parse_args()


if __name__ == "__main__":
    main()
