"""Paged attention beside torch's, which has keys and values side by side: an engine would have to gather them first.

Blocks lie anywhere in the cache. A decode should read at the machine's bandwidth, a prefill multiply at its rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from apt_core.kv_cache import LayerKVCache, allocate_kv_cache, kv_bytes_per_token
from apt_core.model_config import ModelConfig
from apt_kernels import ops
from benchmarks.kernels.case import Call, Case, Maker, Work, compiled, dtype_name
from benchmarks.kernels.sizes import Sizes

BLOCK_SIZE = 16
MOST_WITH_PEER = {"cpu": 2**30, "cuda": 2**33}
"""Bytes of keys and values beyond which no peer gets its own copy of them."""
MOST_SCORES = 2**30
"""Beyond which torch's plain attention, which keeps them all, is left out."""
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Decodes of every batch and context, and one prompt of every length."""
    for name, model in sizes.models:
        for kv_dtype in sizes.kv_dtypes:
            for batch, context in sizes.decodes:
                yield Attention(model, batch, 1, context, kv_dtype, sizes.dtype, device).case(name)
        for kv_dtype in sizes.kv_dtypes:
            for length in sizes.prompts:
                yield Attention(model, 1, length, length, kv_dtype, sizes.dtype, device).case(name)


@dataclass(frozen=True)
class Attention:
    """Sequences of one length, with so many queries each at their end."""

    model: ModelConfig
    num_seqs: int
    num_queries: int
    context: int
    kv_dtype: torch.dtype
    dtype: torch.dtype
    device: torch.device

    def case(self, name: str) -> Case:
        """All there is to measure."""
        is_decode = self.num_queries == 1
        what = f"batch {self.num_seqs} context" if is_decode else "prompt"
        heads = (self.model.num_heads, self.model.num_kv_heads, self.model.head_dim)
        return Case(
            "decode attention" if is_decode else "prefill attention",
            f"{name} {what} {self.context} kv {dtype_name(self.kv_dtype)}",
            self.work(),
            self.ours,
            self.peers(),
            {"paged_attention": (*heads, self.dtype, self.kv_dtype, self.num_queries)},
        )

    def work(self) -> Work:
        """The two products for the keys that queries see; keys and values once, queries and outputs once."""
        seen = self.num_queries * self.context - self.num_queries * (self.num_queries - 1) // 2
        rows = self.num_seqs * self.num_queries * self.model.num_heads * self.model.head_dim
        num_flop = 4 * self.num_seqs * seen * self.model.num_heads * self.model.head_dim
        return Work(self._kv_bytes(self.kv_dtype) + 2 * rows * self.dtype.itemsize, num_flop, self.dtype)

    def ours(self) -> Call:
        """The paged op over a cache of its own."""
        blocks_per_seq = -(-self.context // BLOCK_SIZE)
        num_blocks = self.num_seqs * blocks_per_seq
        cache = self._cache(num_blocks)
        return partial(
            ops.paged_attention,
            self._random(self.num_seqs * self.num_queries, self.model.num_heads, self.model.head_dim),
            cache.keys,
            cache.values,
            key_scales=cache.key_scales,
            value_scales=cache.value_scales,
            cu_seqlens_q=self._int32(torch.arange(self.num_seqs + 1) * self.num_queries),
            context_lens=self._int32(torch.full((self.num_seqs,), self.context)),
            block_tables=self._int32(torch.randperm(num_blocks).view(self.num_seqs, -1)),
            num_decodes=self.num_seqs if self.num_queries == 1 else 0,
            scale=self.model.head_dim**-0.5,
            max_seqlen_q=self.num_queries,
            max_context_len=self.context,
        )

    def peers(self) -> dict[str, Maker]:
        """torch's attention in the activations' dtype, by each of its backends that can; none where it is too much."""
        if self._kv_bytes(self.dtype) > MOST_WITH_PEER[self.device.type]:
            return {}
        if self.device.type == "cpu":
            return {"sdpa": partial(self._sdpa, None), "flex": self._flex}
        is_decode = self.num_queries == 1
        wanted = ["flash", "cudnn"] if is_decode else ["flash", "cudnn", "efficient"]
        if not is_decode and self.num_seqs * self.model.num_heads * self.num_queries * self.context <= MOST_SCORES:
            wanted.append("math")
        return {name: partial(self._sdpa, name) for name in wanted} | {"flex": self._flex}

    def _sdpa(self, backend: str | None) -> Call:
        query, key, value = self._dense()
        if backend == "efficient":  # it does not know shared heads
            key, value = (x.repeat_interleave(self.model.num_heads // x.shape[1], 1) for x in (key, value))
        attend = partial(
            F.scaled_dot_product_attention,
            *(query, key, value),
            is_causal=self.num_queries > 1,
            enable_gqa=key.shape[1] < query.shape[1],
        )
        return attend if backend is None else partial(with_backend, BACKENDS[backend], attend)

    def _flex(self) -> Call:
        mask = None
        if self.num_queries > 1:
            mask = create_block_mask(is_seen, None, None, self.num_queries, self.context, device=str(self.device))
        return partial(compiled(flex_attention), *self._dense(), block_mask=mask, enable_gqa=True)

    def _dense(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shape = (self.num_seqs, self.model.num_kv_heads, self.context, self.model.head_dim)
        query = self._random(self.num_seqs, self.model.num_heads, self.num_queries, self.model.head_dim)
        return query, self._random(*shape), self._random(*shape)

    def _kv_bytes(self, dtype: torch.dtype) -> int:
        return self.num_seqs * self.context * kv_bytes_per_token(replace(self.model, num_layers=1), dtype)

    def _int32(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.device, torch.int32)

    def _random(self, *shape: int) -> torch.Tensor:
        """As many values as make a block of the cache many times; drawing all takes a processor minutes."""
        size = math.prod(shape)
        some = torch.randn(min(size, 2**22), device=self.device).to(self.dtype)
        return some.repeat(-(-size // len(some)))[:size].view(shape)

    def _cache(self, num_blocks: int) -> LayerKVCache:
        (cache,) = allocate_kv_cache(
            replace(self.model, num_layers=1),
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            dtype=self.kv_dtype,
            device=self.device,
        )
        for rows, scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales)):
            if scales is None:
                rows.copy_(torch.randn(rows.shape[1:], device=self.device).to(self.kv_dtype))
            else:
                rows.copy_(torch.randint(-127, 128, rows.shape[1:], device=self.device))
                scales.fill_(1 / 64)
        return cache


def with_backend(backend: SDPBackend, attend: Callable[..., object], *inputs: torch.Tensor) -> object:
    """A call of torch's attention that only this backend may serve."""
    with sdpa_kernel(backend):
        return attend(*inputs)


def is_seen(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The causal mask, as FlexAttention takes it."""
    return query >= key
