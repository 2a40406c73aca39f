"""Our Triton attention as vLLM's backend CUSTOM."""

from __future__ import annotations

from typing import ClassVar

import torch
from vllm.v1.attention.backend import AttentionCGSupport, MultipleOf

from apt_kernels.triton.paged_attention import BLOCK_SIZES
from apt_kernels.vllm.backend import PagedAttentionBackend, PagedAttentionImpl, PagedMetadataBuilder


class CudaAttentionBackend(PagedAttentionBackend):
    """Serves where vLLM is asked for CUSTOM (`--attention-backend CUSTOM`)."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    head_multiple = 8

    @staticmethod
    def get_name() -> str:
        """The name that vLLM keeps for backends from outside."""
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: object = None) -> list[int | MultipleOf]:
        """Of a kernel's blocks; vLLM cuts larger ones of its own into these."""
        return list(BLOCK_SIZES)

    @staticmethod
    def get_impl_cls() -> type[CudaAttentionImpl]:
        """See vLLM's AttentionBackend."""
        return CudaAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[CudaMetadataBuilder]:
        """See vLLM's AttentionBackend."""
        return CudaMetadataBuilder


class CudaAttentionImpl(PagedAttentionImpl):
    """One layer's attention on a GPU."""

    backend = CudaAttentionBackend
    has_soft_cap = True


class CudaMetadataBuilder(PagedMetadataBuilder):
    """Says which steps a CUDA graph may hold: decodes, one launch each, whatever their number and contexts.

    How many sequences of a mixed step decode is a number of the host's, which a graph would keep.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
