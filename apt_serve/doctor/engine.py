"""The device, its kernels, the model, and whether it fits."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from apt_core.checkpoint import Checkpoint, open_checkpoint
from apt_core.checkpoint.sources import EMBEDDED_MODEL
from apt_core.errors import CheckpointError, ConfigError
from apt_kernels.cpu import native
from apt_serve.doctor.finding import Finding, ok, problem, warning
from apt_serve.engine.config import EngineConfig
from apt_serve.engine.load import memory_need
from apt_serve.engine.vllm import VllmEngine

GIB = 2**30


def device(config: EngineConfig) -> Finding:
    """Whether the device that is asked for is there, with what computes on it."""
    if config.engine == "vllm":
        return _vllm(config)
    if config.device != "cpu" and torch.cuda.is_available():
        return _gpu()
    if config.device == "cuda":
        return problem(
            "device", "there is no CUDA device", "install its driver and a CUDA build of torch; or --model.device cpu"
        )
    if not native.is_enabled():
        return warning("device", f"ops: {native.description()}", "python -m apt_kernels.cpu.build, with g++ installed")
    return ok("device", f"processor, ops: {native.description()}, {torch.get_num_threads()} threads")


def _vllm(config: EngineConfig) -> Finding:
    try:
        VllmEngine(config)
    except ConfigError as error:
        return problem("device", str(error), "docs/vllm.md")
    return ok("device", "vLLM is installed, and chooses it")


def _gpu() -> Finding:
    name = torch.cuda.get_device_name()
    if find_spec("triton") is None:
        return problem("device", f"{name}, but Triton is not installed", "pip install triton")
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return problem("device", f"{name}, but no C compiler for Triton's launchers", "on Debian: apt-get install gcc")
    return ok("device", f"{torch.cuda.device_count()} x {name}, CUDA {torch.version.cuda}")


def model(config: EngineConfig) -> list[Finding]:
    """Whether the model can be read, and then whether it fits."""
    if _would_be_downloaded(config.source):
        message = f"{config.source} is not on this machine; the first start downloads it"
        return [warning("model", message, f"hf download {config.source}, where the hub can be reached")]
    try:
        checkpoint = open_checkpoint(config.source, tokenizer=config.tokenizer)
    except CheckpointError as error:
        return [
            problem("model", str(error), "model.source names a folder, a .gguf file or a hub id: see docs/models.md")
        ]
    shape = checkpoint.config
    found = ok(
        "model", f"{checkpoint.path}: {shape.architecture}, {shape.num_layers} layers, {shape.vocab_size} tokens"
    )
    return [found, _memory(config, checkpoint)] if config.engine == "native" else [found]


def _memory(config: EngineConfig, checkpoint: Checkpoint) -> Finding:
    try:
        need = memory_need(config, checkpoint)
    except ConfigError as error:
        return problem("memory", str(error), "see docs/deployment.md for how large what is")
    sizes = f"weights {need.weights / GIB:.2f} GiB, KV cache {need.kv_cache / GIB:.2f} GiB"
    there = f"{need.available / GIB:.1f} GiB available"
    if need.weights + need.kv_cache > need.available:
        advice = "a smaller model, --model.weight_precision int8, a lower --model.max_model_len, or more memory"
        return problem("memory", f"{sizes}, {there}", advice)
    return ok("memory", f"{sizes}, {there}")


def _would_be_downloaded(source: str) -> bool:
    if source.lower() == EMBEDDED_MODEL or Path(source).expanduser().exists():
        return False
    try:
        snapshot_download(source, local_files_only=True)
    except LocalEntryNotFoundError:
        return True
    except HFValidationError:  # no name of the hub's: a path to nothing
        return False
    return False
