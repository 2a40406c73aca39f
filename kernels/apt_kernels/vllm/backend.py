"""What APT's backends for vLLM share: what they refuse, a step in our ops' words, and the call of the ops.

vLLM hands every backend one tensor for keys and values, logically [N, K, P, 2 D], with strides of its choosing. Our ops
take both caches as [N, P, K, D] of any strides, so they read and write vLLM's memory in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from apt_kernels import ops

CACHE_DTYPES = {"auto": None, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""vLLM's names for the types of a KV cache that our ops can read; None is the queries' own."""


class PagedAttentionBackend(AttentionBackend):
    """Causal attention of decoders. What it lacks it refuses, so that vLLM says why or takes another backend."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = list(CACHE_DTYPES)
    forward_includes_kv_cache_update: bool = False
    head_multiple: ClassVar[int]
    max_head_size: ClassVar[int] = 256

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Whether our kernels have tiles for it."""
        return head_size % cls.head_multiple == 0 and 0 < head_size <= cls.max_head_size

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Both kernels do."""
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Not tried: a connector may count on the layout that vLLM's own backend has inside a block."""
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """How many sequences decode is read on the host."""
        return False

    @classmethod
    def supports_combination(
        cls, head_size: int, dtype: torch.dtype, kv_cache_dtype: str | None, *others: object, **named: object
    ) -> str | None:
        """Why the cache cannot be read by queries of this type, if it cannot."""
        cache_dtype = CACHE_DTYPES.get(kv_cache_dtype or "auto")
        return f"a KV cache in {cache_dtype} with queries in {dtype}" if cache_dtype not in (None, dtype) else None


@dataclass(frozen=True, slots=True)
class PagedMetadata(AttentionMetadata):
    """A step, as `ops.paged_attention` takes it."""

    num_tokens: int
    """Without those that only pad the step."""
    cu_seqlens_q: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    num_decodes: int
    max_seqlen_q: int
    max_context_len: int


class PagedMetadataBuilder(AttentionMetadataBuilder[PagedMetadata]):
    """From vLLM's description of a step to ours."""

    reorder_batch_threshold = 1  # sequences of one query come first

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> PagedMetadata:
        """See vLLM's AttentionMetadataBuilder."""
        step = common_attn_metadata
        if step.causal is not True:
            raise NotImplementedError("APT's attention is causal only")
        return PagedMetadata(
            num_tokens=step.num_actual_tokens,
            cu_seqlens_q=step.query_start_loc,
            context_lens=step.seq_lens,
            block_tables=step.block_table_tensor,
            num_decodes=num_decodes(step),
            max_seqlen_q=step.max_query_len,
            max_context_len=step.max_seq_len,
        )


def num_decodes(step: CommonAttentionMetadata) -> int:
    """How many leading sequences have one query. Those without any, which pad a step of decodes only, count as well."""
    if step.max_query_len <= 1:
        return int(step.num_reqs)
    starts = step.query_start_loc_cpu
    others = ((starts[1:] - starts[:-1]) != 1).nonzero()
    return int(others[0]) if len(others) else int(step.num_reqs)


class PagedAttentionImpl(AttentionImpl[PagedMetadata]):
    """One layer's attention.

    Raises:
        ValueError: the layer needs what our ops lack; names all of it.
    """

    backend: ClassVar[type[PagedAttentionBackend]]
    has_soft_cap: ClassVar[bool]

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.window = sliding_window
        self.soft_cap = logits_soft_cap or None  # 0 is none, too
        self.kv_cache_dtype = kv_cache_dtype
        wanted = {
            f"heads of {head_size}": not self.backend.supports_head_size(head_size),
            f"{torch.get_default_dtype()}": not self.backend.supports_dtype(torch.get_default_dtype()),
            f"a KV cache in {kv_cache_dtype}": not self.backend.supports_kv_cache_dtype(kv_cache_dtype),
            f"attention of type {attn_type}": not self.backend.supports_attn_type(attn_type),
            "ALiBi": alibi_slopes is not None,
            "a soft cap": self.soft_cap is not None and not self.has_soft_cap,
            "a KV connector": get_current_vllm_config().kv_transfer_config is not None,
        } | {name: value is not None for name, value in others.items()}
        if lacking := [name for name, is_lacking in wanted.items() if is_lacking]:
            raise ValueError(f"APT's attention in vLLM does not have {', '.join(lacking)}; vLLM's own may")

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store a step's keys and values, [T, K, D], of which those past slot_mapping's end only pad it."""
        num_tokens = slot_mapping.shape[0]
        ops.store_kv(key[:num_tokens], value[:num_tokens], *self._caches(kv_cache), slot_mapping)

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: PagedMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Queries [T, H, D] to output, whose rows that only pad the step stay as they are."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("APT's attention does not quantize its output")
        if attn_metadata is None:  # a run without a KV cache, which measures memory
            return output.fill_(0)
        step = attn_metadata
        ops.paged_attention(
            query[: step.num_tokens],
            *self._caches(kv_cache),
            cu_seqlens_q=step.cu_seqlens_q,
            context_lens=step.context_lens,
            block_tables=step.block_tables,
            num_decodes=step.num_decodes,
            scale=self.scale,
            window=self.window,
            soft_cap=self.soft_cap,
            max_seqlen_q=step.max_seqlen_q,
            max_context_len=step.max_context_len,
            out=output[: step.num_tokens].view(-1, self.num_heads, self.head_size),
        )
        return output

    def _caches(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [N, P, K, D] in the memory of kv_cache [N, K, P, 2 D]."""
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        return keys, values
