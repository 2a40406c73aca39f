"""A step's sequences over a paged KV cache in which all that must not be read is NaN."""

from __future__ import annotations

import torch

from apt_kernels import reference
from apt_kernels.triton.paged_attention import paged_attention

FP8 = torch.float8_e4m3fn
SCALE = 0.25


class Paged:
    """Sequences of the given (queries, context) lengths, decodes first.

    Blocks lie anywhere in the cache; within one, the tokens of a head lie side by side. Slots past a context and blocks
    of nobody hold NaN (an int8 cache's scales do), and so do the tables' entries past a context: numbers of no block.
    """

    def __init__(
        self,
        lengths: list[tuple[int, int]],
        *,
        device: torch.device,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        head_dim: int = 16,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        torch.manual_seed(0)
        query_lens, contexts = [q for q, _ in lengths], [c for _, c in lengths]
        blocks = [-(-c // block_size) for c in contexts]
        num_blocks, is_int8 = sum(blocks) + 3, cache_dtype == torch.int8
        self.cache_dtype = cache_dtype or dtype
        shape = (num_blocks, num_kv_heads, block_size, head_dim)
        fill = -128 if is_int8 else float("nan")
        self.keys, self.values = (
            torch.full(shape, fill, dtype=torch.float32).to(self.cache_dtype).transpose(1, 2) for _ in range(2)
        )
        self.scales = [torch.full(shape[:3], float("nan")).transpose(1, 2) if is_int8 else None for _ in range(2)]
        self.query = torch.randn(sum(query_lens), num_heads, head_dim).to(dtype)
        self.cu_seqlens_q = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
        self.context_lens = torch.tensor(contexts, dtype=torch.int32)
        self.block_tables = torch.full((len(lengths), max(blocks) + 2), 2**30, dtype=torch.int32)
        free = torch.randperm(num_blocks).to(torch.int32)
        for b, context in enumerate(contexts):
            table, free = free[: blocks[b]], free[blocks[b] :]
            self.block_tables[b, : blocks[b]] = table
            slots = (table.long().unsqueeze(1) * block_size + torch.arange(block_size)).flatten()[:context]
            kv = torch.randn(2, context, num_kv_heads, head_dim).to(dtype)
            reference.store_kv(kv[0], kv[1], self.keys, self.values, slots, *self.scales)
        self.num_decodes = next((i for i, q in enumerate(query_lens) if q != 1), len(lengths))
        self.max_seqlen_q, self.max_context_len = max(query_lens), max(contexts)
        self._move(device)

    def _move(self, device: torch.device) -> None:
        for name, x in vars(self).items():
            if isinstance(x, torch.Tensor):
                # Not contiguous(): the layout is part of what is tested.
                setattr(self, name, x.to(device))
        self.scales = [x if x is None else x.to(device) for x in self.scales]

    def run(
        self,
        window: int | None = None,
        soft_cap: float | None = None,
        num_segments: int | None = None,
        **changed: object,
    ) -> torch.Tensor:
        """The kernel's result, with some arguments changed."""
        arguments: dict[str, object] = {
            "cu_seqlens_q": self.cu_seqlens_q,
            "context_lens": self.context_lens,
            "block_tables": self.block_tables,
            "num_decodes": self.num_decodes,
            "max_seqlen_q": self.max_seqlen_q,
            "max_context_len": self.max_context_len,
            "scale": SCALE,
            "window": window,
            "soft_cap": soft_cap,
            "key_scales": self.scales[0],
            "value_scales": self.scales[1],
            "num_segments": num_segments,
        }
        caches = (changed.pop("key_cache", self.keys), changed.pop("value_cache", self.values))
        return paged_attention(changed.pop("query", self.query), *caches, **(arguments | changed))

    def expected(self, window: int | None = None, soft_cap: float | None = None) -> torch.Tensor:
        """The reference's result."""
        tables = self.block_tables.clamp(max=len(self.keys) - 1)
        layout = (self.cu_seqlens_q, self.context_lens, tables)
        return reference.paged_attention(
            self.query, self.keys, self.values, *layout, SCALE, window, *self.scales, soft_cap
        )

    def alone(self, b: int, first: int = 0, end: int | None = None, **changed: object) -> torch.Tensor:
        """Queries first .. end of sequence b, as a step of their own."""
        start, stop = self.cu_seqlens_q[b : b + 2].tolist()
        count = stop - start
        end = count if end is None else end
        context = self.context_lens[b : b + 1] - (count - end)
        return self.run(
            query=self.query[start + first : start + end],
            cu_seqlens_q=torch.tensor([0, end - first], dtype=torch.int32, device=self.query.device),
            context_lens=context,
            block_tables=self.block_tables[b : b + 1],
            num_decodes=min(self.num_decodes, 1) if count == 1 else 0,
            **changed,
        )
