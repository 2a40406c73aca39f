"""The KV cache takes memory only as it is used."""

from __future__ import annotations

import psutil
import torch

from apt_core.kv_cache import CACHE_LINE, allocate_kv_cache, kv_bytes_per_token
from tests.apt_serve.engine.tiny_engine import CONFIG


def test_an_unused_cache_takes_no_memory_and_a_used_block_takes_its_own() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    num_blocks = 2**30 // (16 * kv_bytes_per_token(CONFIG, torch.bfloat16))
    cache = allocate_kv_cache(
        CONFIG, num_blocks=num_blocks, block_size=16, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in cache) > 2**30 - 2**20
    cache[0].keys[num_blocks // 2] = 1.0
    assert process.memory_info().rss - before < 2**28
    assert not cache[0].keys[num_blocks // 2 + 1].any() and not cache[1].values[0].any()


def test_layers_have_the_models_shape_and_begin_on_a_cache_line() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int8):
        cache = allocate_kv_cache(CONFIG, num_blocks=3, block_size=5, dtype=dtype, device=torch.device("cpu"))
        assert len(cache) == CONFIG.num_layers
        for layer in cache:
            assert layer.keys.shape == layer.values.shape == (3, 5, CONFIG.num_kv_heads, CONFIG.head_dim)
            assert layer.keys.dtype == dtype and layer.keys.data_ptr() % CACHE_LINE == 0
            for scales in (layer.key_scales, layer.value_scales):
                assert (scales is not None) == (dtype == torch.int8)
                assert scales is None or (scales.shape == layer.keys.shape[:3] and scales.dtype == torch.float32)


def test_a_block_is_one_piece_of_memory_in_which_a_head_has_its_tokens_side_by_side() -> None:
    cache = allocate_kv_cache(CONFIG, num_blocks=3, block_size=5, dtype=torch.int8, device=torch.device("cpu"))
    for rows in (cache[0].keys, cache[0].values):
        assert rows.transpose(1, 2).is_contiguous()
    assert cache[0].key_scales is not None and cache[0].key_scales.transpose(1, 2).is_contiguous()


def test_the_bytes_of_a_token_are_those_that_are_allocated() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        cache = allocate_kv_cache(CONFIG, num_blocks=3, block_size=5, dtype=dtype, device=torch.device("cpu"))
        tensors = [x for layer in cache for x in (layer.keys, layer.values, layer.key_scales, layer.value_scales)]
        assert sum(x.nbytes for x in tensors if x is not None) == 15 * kv_bytes_per_token(CONFIG, dtype)
