"""Our C++ attention in the place of vLLM's only backend for processors."""

from __future__ import annotations

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from apt_kernels.cpu import native
from apt_kernels.vllm.backend import PagedAttentionBackend, PagedAttentionImpl, PagedMetadataBuilder

logger = init_logger("vllm.plugins.apt")  # vLLM shows the messages of its own loggers


class CpuAttentionBackend(PagedAttentionBackend):
    """Serves where vLLM asks for CPU_ATTN."""

    head_multiple = 16

    @staticmethod
    def get_name() -> str:
        """The name of the backend it replaces: vLLM knows no other on a processor."""
        return "CPU_ATTN"

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """A head's tokens side by side: a task reads one head."""
        return (KVCacheLayout.LBHNC, KVCacheLayout.LBNHC)

    @staticmethod
    def get_impl_cls() -> type[CpuAttentionImpl]:
        """See vLLM's AttentionBackend."""
        return CpuAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[CpuMetadataBuilder]:
        """See vLLM's AttentionBackend."""
        return CpuMetadataBuilder


class CpuAttentionImpl(PagedAttentionImpl):
    """One layer's attention on a processor."""

    backend = CpuAttentionBackend
    has_soft_cap = False  # only the reference does: far too slow to serve


class CpuMetadataBuilder(PagedMetadataBuilder):
    """Made once in each worker."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        logger.info("APT's attention serves %d layers (%s)", len(layer_names), native.description())
