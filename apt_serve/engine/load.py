"""From settings to a model that can take steps: checkpoint, weights, transforms, KV cache, runner."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch

from apt_core.checkpoint import Checkpoint, PackedCache, load_into, open_checkpoint
from apt_core.errors import ConfigError
from apt_core.kv_cache import allocate_kv_cache, kv_bytes_per_token
from apt_core.model_config import GenerationConfig, ModelConfig
from apt_core.models.decoder import fuse_projections, pack_linears
from apt_core.quantization import WeightPrecision
from apt_core.registry import build_model
from apt_kernels import ops
from apt_kernels.cpu import native
from apt_serve.engine.client import ModelInfo
from apt_serve.engine.config import EngineConfig
from apt_serve.engine.cpus import step_threads
from apt_serve.engine.executor import Executor
from apt_serve.engine.model_runner import ModelRunner

log = logging.getLogger(__name__)

TYPICAL_CONTEXT = 2048
"""Tokens per sequence that the default KV cache has room for."""
KV_CACHE_MEMORY_SHARE = 0.2
"""Most of the available memory that the default KV cache may take."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to take steps."""

    info: ModelInfo
    executor: Executor[Any]
    num_kv_blocks: int


def load(config: EngineConfig) -> LoadedModel:
    """Load a model for the native engine. Call it on the thread that will run the steps: it sets its thread count.

    Raises:
        CheckpointError: the checkpoint is damaged, or does not fit.
        ConfigError: a setting that does not go with the checkpoint or the machine.
    """
    started = time.perf_counter()
    ops.set_num_threads(step_threads(config.num_threads))
    checkpoint = open_checkpoint(config.source, tokenizer=config.tokenizer)
    device = _device(config)
    if device.type == "cpu":
        native.log_state()
    dtype = _dtype(config, checkpoint.config, device)
    precision = _weight_precision(config, "weight_precision", dtype, device)
    head_precision = _weight_precision(config, "lm_head_precision", dtype, device)
    max_model_len = _max_model_len(config, checkpoint.config)
    kv_dtype = _kv_cache_dtype(config, dtype)
    num_blocks = _num_kv_blocks(config, checkpoint.config, kv_dtype, max_model_len)

    cache = None
    if device.type == "cpu" and native.is_enabled():
        cache = PackedCache(checkpoint, dtype=dtype, precision=precision, head_precision=head_precision)
    model = cache.read() if cache is not None else None
    if model is None:
        model = build_model(checkpoint.config)
        keeps_quantized = _keeps_quantized(checkpoint, precision, dtype, device)
        load_into(model, checkpoint, dtype=dtype, device=device, keeps_quantized=keeps_quantized)
        model.eval().requires_grad_(False)
        fuse_projections(model)
        pack_linears(model, precision, head_precision)
        if cache is not None:
            cache.write(model)
    kv_cache = allocate_kv_cache(
        checkpoint.config, num_blocks=num_blocks, block_size=config.block_size, dtype=kv_dtype, device=device
    )
    info = _model_info(config, checkpoint, max_model_len)
    runner = ModelRunner(
        model,
        kv_cache,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        eos_token_ids=info.eos_token_ids,
    )
    log.info(
        "%s ready in %.1f s: %s, weights %s, on %s, %d threads, %d KV blocks of %d tokens (%s), contexts up to %d",
        info.name,
        time.perf_counter() - started,
        str(dtype).removeprefix("torch."),
        precision or ("as stored" if checkpoint.is_quantized else "alike"),
        device,
        torch.get_num_threads(),
        num_blocks,
        config.block_size,
        str(kv_dtype).removeprefix("torch."),
        max_model_len,
    )
    return LoadedModel(info, runner, num_blocks)


def _device(config: EngineConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device is available", field="device")
    if config.device != "auto":
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _dtype(config: EngineConfig, model: ModelConfig, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the device multiplies in it; on a GPU float16 for a float16 checkpoint; else float32."""
    if config.dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.dtype)
        return dtype
    if device.type == "cuda":
        return torch.float16 if model.dtype == "float16" else torch.bfloat16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def _weight_precision(
    config: EngineConfig,
    field: Literal["weight_precision", "lm_head_precision"],
    dtype: torch.dtype,
    device: torch.device,
) -> WeightPrecision | None:
    """What one of the two settings asks for; None: auto."""
    precision = config.weight_precision if field == "weight_precision" else config.lm_head_precision
    if precision == "auto":
        return None
    if device.type != "cpu":
        raise ConfigError(f"{precision} is for processors; this is {device}", field=field)
    if dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"{precision} goes with dtype float32 or bfloat16, not {config.dtype}", field=field)
    return precision


def _keeps_quantized(
    checkpoint: Checkpoint, precision: WeightPrecision | None, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether weights in fewer bits stay so until they are packed; a GGUF's 4 bits only if int4 is asked for."""
    is_packed = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
    return is_packed and (checkpoint.is_quantized or precision == "int4")


def _kv_cache_dtype(config: EngineConfig, dtype: torch.dtype) -> torch.dtype:
    if config.kv_cache_dtype == "auto":
        return dtype
    wanted: torch.dtype = getattr(torch, config.kv_cache_dtype)
    if wanted not in (dtype, torch.int8):
        there = str(dtype).removeprefix("torch.")
        raise ConfigError(f"{config.kv_cache_dtype} does not go with dtype {there}", field="kv_cache_dtype")
    return wanted


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    trained = model.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > trained:
        raise ConfigError(f"must be at most the model's {trained}, got {config.max_model_len}", field="max_model_len")
    return config.max_model_len or trained


def _num_kv_blocks(config: EngineConfig, model: ModelConfig, kv_dtype: torch.dtype, max_model_len: int) -> int:
    """Blocks the settings ask for.

    Raises:
        ConfigError: fewer than one full context needs, or more than memory holds.
    """
    block_bytes = kv_bytes_per_token(model, kv_dtype) * config.block_size
    one_context = -(-max_model_len // config.block_size)
    available = available_memory()
    if config.num_kv_blocks is not None:
        field, num_blocks = "num_kv_blocks", config.num_kv_blocks
    elif config.kv_cache_gib is not None:
        field, num_blocks = "kv_cache_gib", int(config.kv_cache_gib * 2**30) // block_bytes
    else:
        field = "max_model_len"
        typical = config.max_num_seqs * -(-min(max_model_len, TYPICAL_CONTEXT) // config.block_size)
        num_blocks = max(min(typical, int(available * KV_CACHE_MEMORY_SHARE) // block_bytes), one_context)
    if num_blocks < one_context:
        problem = f"gives {num_blocks} KV blocks; one context of max_model_len {max_model_len} needs {one_context}"
        raise ConfigError(problem, field=field)
    if num_blocks * block_bytes > available:
        needed, there = num_blocks * block_bytes / 2**30, available / 2**30
        raise ConfigError(f"needs a KV cache of {needed:.1f} GiB; {there:.1f} GiB are available", field=field)
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


def _model_info(config: EngineConfig, checkpoint: Checkpoint, max_model_len: int) -> ModelInfo:
    return ModelInfo(
        name=config.served_name,
        created=int(time.time()),
        max_model_len=max_model_len,
        max_num_choices=config.max_num_seqs + config.max_waiting_requests,
        vocab_size=checkpoint.config.vocab_size,
        tokenizer=checkpoint.tokenizer,
        eos_token_ids=frozenset(checkpoint.generation.eos_token_ids),
        default_sampling=_default_sampling(checkpoint.generation),
    )


def _default_sampling(generation: GenerationConfig) -> dict[str, float | int]:
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return {name: getattr(generation, name) for name in names if getattr(generation, name) is not None}
