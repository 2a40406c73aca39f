"""How many blocks the KV cache gets."""

import pytest
import torch

from apt_core.errors import ConfigError
from apt_core.kv_cache import kv_bytes_per_token
from apt_serve.engine.config import EngineConfig
from apt_serve.engine.kv_memory import HOST_MEMORY_SHARE, TYPICAL_CONTEXT, KVMemory, num_kv_blocks
from tests.apt_serve.engine.tiny_engine import CONFIG

BLOCK_BYTES = 16 * kv_bytes_per_token(CONFIG, torch.bfloat16)
MAX_MODEL_LEN = 4096
ONE_CONTEXT = MAX_MODEL_LEN // 16


def blocks(memory, **settings):
    return num_kv_blocks(EngineConfig(**settings), CONFIG, torch.bfloat16, MAX_MODEL_LEN, memory)


def host(num_blocks):
    return KVMemory(available=num_blocks * BLOCK_BYTES, default=None)


def gpu(num_blocks):
    return KVMemory(available=num_blocks * BLOCK_BYTES, default=num_blocks * BLOCK_BYTES)


def test_a_gpu_gives_the_cache_all_that_is_left():
    assert blocks(gpu(5000)) == 5000


def test_a_processor_gives_what_the_sequences_usually_need():
    assert blocks(host(10**6), max_num_seqs=8) == 8 * TYPICAL_CONTEXT // 16


def test_a_processor_gives_no_more_than_a_share_of_its_memory_but_one_context():
    assert blocks(host(2000)) == 2000 * HOST_MEMORY_SHARE
    assert blocks(host(300)) == ONE_CONTEXT


@pytest.mark.parametrize("memory", [host, gpu])
def test_settings_say_how_many(memory):
    assert blocks(memory(10**6), num_kv_blocks=777) == 777
    assert blocks(memory(10**6), kv_cache_gib=0.5) == 2**29 // BLOCK_BYTES


@pytest.mark.parametrize("memory", [host, gpu])
@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({}, "max_model_len"),
        ({"num_kv_blocks": ONE_CONTEXT - 1}, "num_kv_blocks"),
        ({"num_kv_blocks": 10**6}, "num_kv_blocks"),
        ({"kv_cache_gib": 1e-4}, "kv_cache_gib"),
        ({"kv_cache_gib": 1e4}, "kv_cache_gib"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_the_settings_name(memory, settings, field):
    with pytest.raises(ConfigError) as refusal:
        blocks(memory(ONE_CONTEXT - 1 if not settings else 5000), **settings)
    assert refusal.value.field == field


def test_a_refusal_says_how_much_there_is_and_what_to_do():
    with pytest.raises(ConfigError, match=r"needs a KV cache of 10\.0 GiB; 0\.1 GiB are available: lower it"):
        blocks(KVMemory(available=2**30 // 8, default=None), kv_cache_gib=10)
