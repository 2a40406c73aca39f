"""How large the KV cache is: what the settings ask for, within the memory of the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from apt_core.errors import ConfigError
from apt_core.kv_cache import kv_bytes_per_token
from apt_core.metadata import AttentionMetadata
from apt_core.model_config import ModelConfig
from apt_core.models.decoder import DecoderForCausalLM
from apt_serve.engine.config import EngineConfig
from apt_serve.engine.cuda_graph import output_bytes

TYPICAL_CONTEXT = 2048
"""Tokens per sequence that a processor's default KV cache has room for."""
HOST_MEMORY_SHARE = 0.2
"""Most of a processor's available memory that the default KV cache may take."""


@dataclass(frozen=True, slots=True)
class KVMemory:
    """Bytes for a KV cache on a device."""

    available: int
    """At most."""
    default: int | None
    """If no setting says more; None: what max_num_seqs contexts usually need, within a share of what is available."""


def kv_memory(model: DecoderForCausalLM, config: EngineConfig, device: torch.device) -> KVMemory:
    """What the loaded weights have left. On a GPU that is all it may use, less what a step needs beside the cache."""
    if device.type == "cpu":
        return KVMemory(available_memory(), default=None)
    step_bytes = _largest_step(model, config, device) + output_bytes(model, config.max_num_seqs)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    left = max(free - step_bytes - int((1 - config.gpu_memory_utilization) * total), 0)
    return KVMemory(left, default=left)


def num_kv_blocks(
    config: EngineConfig, model: ModelConfig, kv_dtype: torch.dtype, max_model_len: int, memory: KVMemory
) -> int:
    """Blocks the settings ask for.

    Raises:
        ConfigError: fewer than one full context needs, or more than memory holds.
    """
    block_bytes = kv_bytes_per_token(model, kv_dtype) * config.block_size
    one_context = -(-max_model_len // config.block_size)
    if config.num_kv_blocks is not None:
        field, num_blocks = "num_kv_blocks", config.num_kv_blocks
    elif config.kv_cache_gib is not None:
        field, num_blocks = "kv_cache_gib", int(config.kv_cache_gib * 2**30) // block_bytes
    elif memory.default is not None:
        field, num_blocks = "max_model_len", max(memory.default // block_bytes, one_context)
    else:
        field = "max_model_len"
        typical = config.max_num_seqs * -(-min(max_model_len, TYPICAL_CONTEXT) // config.block_size)
        num_blocks = max(min(typical, int(memory.available * HOST_MEMORY_SHARE) // block_bytes), one_context)
    if num_blocks < one_context:
        problem = f"gives {num_blocks} KV blocks; one context of max_model_len {max_model_len} needs {one_context}"
        raise ConfigError(problem, field=field)
    if num_blocks * block_bytes > memory.available:
        needed, there = num_blocks * block_bytes / 2**30, memory.available / 2**30
        raise ConfigError(f"needs a KV cache of {needed:.1f} GiB; {there:.1f} GiB are available: lower it", field=field)
    return num_blocks


def available_memory() -> int:
    """Bytes this process may still take: what the machine has free, or its container's limit if that is less."""
    with open("/proc/meminfo", encoding="ascii") as meminfo:
        available = next(int(line.split()[1]) * 1024 for line in meminfo if line.startswith("MemAvailable:"))
    try:
        with (
            open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit,
            open("/sys/fs/cgroup/memory.current", encoding="ascii") as current,
        ):
            return min(available, int(limit.read()) - int(current.read()))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return available


@torch.inference_mode()
def _largest_step(model: DecoderForCausalLM, config: EngineConfig, device: torch.device) -> int:
    """Bytes that a step of the most tokens and the most logits takes beside weights and cache, on a GPU."""
    num_tokens, num_rows = config.max_num_batched_tokens, config.max_num_seqs
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    input_ids = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    metadata = AttentionMetadata.for_full_sequences([num_tokens], device)
    hidden = model(model.embed(input_ids), torch.arange(num_tokens, device=device), metadata)
    logits = model.logits(hidden[:num_rows]).float()
    logits.softmax(-1)  # what sampling takes
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
