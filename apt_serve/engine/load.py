"""From settings to a model that can take steps: checkpoint, weights, transforms, KV cache, runner."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from apt_core.checkpoint import Checkpoint, open_checkpoint
from apt_core.errors import ConfigError
from apt_core.kv_cache import allocate_kv_cache, kv_bytes_per_token
from apt_core.manifest import version_of
from apt_core.model_config import ModelConfig
from apt_core.models.joining import join_ranks
from apt_core.models.sharding import DECODER_PLAN, Shard, check_divisible
from apt_core.parallel import Communicator
from apt_core.registry import build_model
from apt_kernels import ops
from apt_kernels.cpu import native
from apt_serve.engine.client import ModelInfo
from apt_serve.engine.config import EngineConfig
from apt_serve.engine.cpus import step_threads
from apt_serve.engine.executor import Executor
from apt_serve.engine.kv_memory import KVMemory, available_memory, kv_memory, num_kv_blocks
from apt_serve.engine.model_runner import ModelRunner
from apt_serve.engine.ranks import Ranks
from apt_serve.engine.tensor_parallel import TensorParallelExecutor
from apt_serve.engine.weights import WeightForm, load_weights, num_weight_bytes

log = logging.getLogger(__name__)

MAX_STEPS_IN_FLIGHT = {"cpu": 1, "cuda": 2}
"""A processor computes a step where it launches it."""
BYTES_PER_WEIGHT = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "float8": 1.0, "int4": 0.625}
"""By precision of linear layers, about; 4 bits have a scale and a minimum for each group."""


@dataclass(frozen=True)
class ServedWeights:
    """Where weights came from and what became of them."""

    checkpoint: Checkpoint
    tokenizer: str | None
    """The setting: what takes the place of the checkpoint's own."""
    form: WeightForm
    num_bytes: int
    """In memory."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to take steps."""

    info: ModelInfo
    executor: Executor[Any]
    num_kv_blocks: int
    served: ServedWeights | None = None
    """What others would have to replace; None where the model is from no checkpoint."""


def load(config: EngineConfig, checkpoint: Checkpoint | None = None) -> LoadedModel:
    """Load a model for the native engine. Call it on the thread that will run the steps: it sets its thread count.

    Args:
        checkpoint: takes the place of the one that ``config.source`` names.

    Raises:
        CheckpointError: the checkpoint is damaged, or does not fit.
        ConfigError: a setting that does not go with the checkpoint or the machine.
        EngineBrokenError: another rank could not load its part.
    """
    checkpoint = checkpoint or open_checkpoint(config.source, tokenizer=config.tokenizer)
    if config.tensor_parallel_size == 1:
        return load_rank(config, checkpoint, None)
    device = _device(config)
    check_divisible(checkpoint.config, DECODER_PLAN, config.tensor_parallel_size)
    if device.type == "cuda" and torch.cuda.device_count() < config.tensor_parallel_size:
        problem = f"{config.tensor_parallel_size} ranks need a GPU each, {torch.cuda.device_count()} are there"
        raise ConfigError(problem, field="tensor_parallel_size")
    ranks = Ranks(
        partial(_load_rank_of, config),
        size=config.tensor_parallel_size,
        device_type=device.type,
        stall_timeout_s=config.stall_timeout_s,
    )
    with ranks.joined() as communicator:
        loaded = load_rank(config, checkpoint, communicator)
    return replace(loaded, executor=TensorParallelExecutor(loaded.executor, ranks))


def load_rank(config: EngineConfig, checkpoint: Checkpoint, communicator: Communicator | None) -> LoadedModel:
    """Load a model, or the part of it that is this rank's."""
    started = time.perf_counter()
    num_ranks = 1 if communicator is None else communicator.size
    ops.set_num_threads(step_threads(config.num_threads, num_ranks))
    device = _device(config) if communicator is None else communicator.device
    if device.type == "cpu":
        native.log_state()
    form = WeightForm.of(config, checkpoint.config, device)
    max_model_len = _max_model_len(config, checkpoint.config)
    kv_dtype = _kv_cache_dtype(config, form.dtype)

    shard = None if communicator is None else Shard(DECODER_PLAN, communicator.rank, communicator.size)
    model_config = checkpoint.config if shard is None else shard.config(checkpoint.config)
    model = load_weights(checkpoint, form, shard=shard)
    if shard is not None and communicator is not None:
        join_ranks(model, checkpoint.config, shard, communicator)
    num_blocks = num_kv_blocks(config, model_config, kv_dtype, max_model_len, kv_memory(model, config, device))
    if communicator is not None:
        num_blocks = communicator.minimum(num_blocks)
    kv_cache = allocate_kv_cache(
        model_config, num_blocks=num_blocks, block_size=config.block_size, dtype=kv_dtype, device=device
    )
    info = _model_info(config, checkpoint, max_model_len)
    runner = ModelRunner(
        model,
        kv_cache,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        eos_token_ids=info.eos_token_ids,
        weight_version=info.weight_version,
        pads_decodes=device.type == "cuda",
        max_steps_in_flight=MAX_STEPS_IN_FLIGHT[device.type],
    )
    if device.type == "cuda":
        runner.warm_up(config.max_num_batched_tokens)
    log.info(
        "%s ready in %.1f s: %s, weights %s, on %s, %d threads, %d KV blocks of %d tokens (%s), contexts up to %d",
        info.name,
        time.perf_counter() - started,
        str(form.dtype).removeprefix("torch."),
        form.precision or ("as stored" if checkpoint.is_quantized else "alike"),
        device,
        torch.get_num_threads(),
        num_blocks,
        config.block_size,
        str(kv_dtype).removeprefix("torch."),
        max_model_len,
    )
    served = ServedWeights(checkpoint, config.tokenizer, form, num_weight_bytes(model))
    return LoadedModel(info, runner, num_blocks, served)


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes that a model would take, before anything is loaded."""

    weights: int
    kv_cache: int
    num_kv_blocks: int
    """That the KV cache has."""
    available: int
    """On the device, without either."""


def memory_need(config: EngineConfig, checkpoint: Checkpoint) -> MemoryNeed:
    """What one rank of the native engine would take; of a quantized checkpoint, weights as it stores them.

    Raises:
        ConfigError: a setting that does not go with the checkpoint or the machine, such as a KV cache that does not fit
            beside the weights.
    """
    device = _device(config)
    size = config.tensor_parallel_size
    if size > 1:
        check_divisible(checkpoint.config, DECODER_PLAN, size)
    form = WeightForm.of(config, checkpoint.config, device)
    kv_dtype = _kv_cache_dtype(config, form.dtype)
    model_config = checkpoint.config if size == 1 else Shard(DECODER_PLAN, 0, size).config(checkpoint.config)
    num_weights = sum(parameter.numel() for parameter in build_model(model_config).parameters())
    weights = int(num_weights * BYTES_PER_WEIGHT.get(str(form.precision), form.dtype.itemsize))
    if checkpoint.is_quantized and form.precision is None:
        weights = sum(file.path.stat().st_size for file in checkpoint.weight_files) // size
    available = available_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    left = KVMemory(max(available - weights, 0), default=None)
    num_blocks = num_kv_blocks(config, model_config, kv_dtype, _max_model_len(config, checkpoint.config), left)
    kv_cache = num_blocks * config.block_size * kv_bytes_per_token(model_config, kv_dtype)
    return MemoryNeed(weights, kv_cache, num_blocks, available)


def _load_rank_of(config: EngineConfig, communicator: Communicator) -> Executor[Any]:
    checkpoint = open_checkpoint(config.source, tokenizer=config.tokenizer)
    return load_rank(config, checkpoint, communicator).executor


def _device(config: EngineConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device is available", field="device")
    if config.device != "auto":
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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


def _model_info(config: EngineConfig, checkpoint: Checkpoint, max_model_len: int) -> ModelInfo:
    return ModelInfo(
        name=config.served_name,
        created=int(time.time()),
        max_model_len=max_model_len,
        max_num_choices=config.max_num_seqs + config.max_waiting_requests,
        vocab_size=checkpoint.config.vocab_size,
        tokenizer=checkpoint.tokenizer,
        eos_token_ids=frozenset(checkpoint.generation.eos_token_ids),
        default_sampling=checkpoint.generation.sampling_defaults,
        weight_version=version_of(checkpoint.path),
    )
