"""Engines of further models: how much memory each takes, its start, and its end without a trace."""

from __future__ import annotations

import asyncio
import ctypes
import gc
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from apt_core.checkpoint import open_checkpoint
from apt_core.errors import ConfigError
from apt_serve.engine.client import EngineClient
from apt_serve.engine.config import EngineConfig
from apt_serve.engine.factory import make_engine
from apt_serve.engine.kv_memory import available_memory
from apt_serve.engine.load import memory_need
from apt_serve.engine.metrics import MetricsSink

FREE_SHARE = 0.9
"""Of the free memory that further models may take where no setting says how much: steps need some beside them."""


class EngineLoader:
    """The ModelLoader of native engines.

    Args:
        configs: by the model's name.
        sink_of: where an engine reports to, by the model's name.
    """

    def __init__(self, configs: Mapping[str, EngineConfig], sink_of: Callable[[str], MetricsSink]) -> None:
        self._configs = dict(configs)
        self._sink_of = sink_of
        self._sized: dict[str, tuple[EngineConfig, int]] = {}
        """Settings with the size of the KV cache, and the bytes that they come to."""

    async def memory_need(self, name: str) -> int:
        """See ModelLoader."""
        if name not in self._sized:
            self._sized[name] = await asyncio.to_thread(_sized, self._configs[name])
        return self._sized[name][1]

    async def load(self, name: str) -> EngineClient:
        """See ModelLoader."""
        await self.memory_need(name)
        config, _ = self._sized[name]
        engine = make_engine(config, self._sink_of(name))
        try:
            await engine.start()
        except Exception:
            del self._sized[name]  # the checkpoint may be another one at the next try
            raise
        _return_heap()  # what only the load needed
        return engine

    async def stop(self, name: str, engine: EngineClient, grace_s: float) -> None:
        """See ModelLoader."""
        await engine.stop(grace_s)

    def reclaim(self) -> None:
        """See ModelLoader."""
        gc.collect()
        gc.freeze()  # the models that are still there: an engine's end has unfrozen all
        _return_heap()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _return_heap() -> None:
    """Let the allocator give freed memory back to the system; else what was one model's is not there for the next."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except AttributeError:  # not glibc
        return
    trim(0)


def free_memory(configs: Mapping[str, EngineConfig]) -> int:
    """Bytes that further models may take where no setting says how much.

    Raises:
        ConfigError: some run on a GPU and others on a processor, whose memory is not one.
    """
    on_gpu = {name: _is_on_gpu(config) for name, config in configs.items()}
    if len(set(on_gpu.values())) > 1:
        odd = next(name for name, is_on_gpu in on_gpu.items() if is_on_gpu != next(iter(on_gpu.values())))
        raise ConfigError("all further models run on the same kind of device", field=f"models.others.{odd}.device")
    free = torch.cuda.mem_get_info()[0] if any(on_gpu.values()) else available_memory()
    return int(free * FREE_SHARE)


def _is_on_gpu(config: EngineConfig) -> bool:
    return config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())


def _sized(config: EngineConfig) -> tuple[EngineConfig, int]:
    """Settings with the size of the KV cache: one that depends on what is free would not be what was reserved."""
    if _is_on_gpu(config) and config.kv_cache_gib is None and config.num_kv_blocks is None:
        raise ConfigError("say how large its KV cache is on a GPU", field="kv_cache_gib")
    need = memory_need(config, open_checkpoint(config.source, tokenizer=config.tokenizer))
    num_ranks = 1 if _is_on_gpu(config) else config.tensor_parallel_size
    return replace(config, num_kv_blocks=need.num_kv_blocks), (need.weights + need.kv_cache) * num_ranks
