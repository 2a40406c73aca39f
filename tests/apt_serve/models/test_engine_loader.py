"""How large further models are, and what is left of one that has ended."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from apt_core.errors import CheckpointError
from apt_serve.engine.async_engine import AsyncEngine
from apt_serve.engine.config import EngineConfig
from apt_serve.engine.metrics import NullMetrics
from apt_serve.models.engine_loader import EngineLoader, free_memory
from tests.apt_serve.published import base_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return base_folder(tmp_path / "model")


def loader_of(source: Path, **settings: Any) -> EngineLoader:
    config = EngineConfig(str(source), name="m", max_num_batched_tokens=64, **({"max_num_seqs": 4} | settings))
    return EngineLoader({"m": config}, lambda name: NullMetrics())


async def test_the_kv_cache_has_the_size_that_was_reserved(folder: Path) -> None:
    loader = loader_of(folder, dtype="float32")
    need = await loader.memory_need("m")
    engine = await loader.load("m")
    num_blocks = engine.stats().num_kv_blocks
    kv_bytes = num_blocks * 16 * 2 * 2 * 2 * 16 * 4  # tokens, keys and values, layers, kv heads, head_dim, float32
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert need - kv_bytes == pytest.approx(weights, rel=0.05)
    await loader.stop("m", engine, 0.0)


async def test_a_larger_kv_cache_needs_more(folder: Path) -> None:
    small = await loader_of(folder, num_kv_blocks=256, max_model_len=512).memory_need("m")
    assert await loader_of(folder, num_kv_blocks=512, max_model_len=512).memory_need("m") > small


async def test_what_is_not_there_is_looked_for_again(folder: Path) -> None:
    source = folder.parent / "later"
    loader = loader_of(source)
    with pytest.raises(CheckpointError):
        await loader.memory_need("m")
    source.symlink_to(folder)
    assert await loader.memory_need("m") > 0


async def test_a_stopped_engine_is_collected_and_what_is_left_is_frozen(folder: Path) -> None:
    loader = loader_of(folder)
    engine = await loader.load("m")
    assert isinstance(engine, AsyncEngine)
    left = weakref.ref(engine)
    await loader.stop("m", engine, 0.0)
    del engine
    loader.reclaim()
    assert left() is None
    assert gc.get_freeze_count() > 0
    gc.unfreeze()


def test_some_of_the_free_memory_is_left_for_steps() -> None:
    with open("/proc/meminfo", encoding="ascii") as meminfo:
        total = int(meminfo.readline().split()[1]) * 1024
    assert 0 < free_memory({"m": EngineConfig(device="cpu")}) < 0.9 * total
