"""One model for all engines: what APT serves, written as a Hugging Face folder in bfloat16."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from apt_core.checkpoint import Checkpoint, open_checkpoint
from apt_core.checkpoint.gguf_import import CONFIG, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, import_gguf
from benchmarks.peers.engine import Weights

_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def shared_weights(source: str, folder: Path) -> Weights:
    """Open a model; one that came from a GGUF is written to a folder below ``folder``, once.

    Raises:
        CheckpointError: the source cannot be read.
    """
    checkpoint = open_checkpoint(source)
    path, name = checkpoint.path.resolve(), _name(checkpoint)
    if path.is_dir():
        return Weights(name, source, path, None, checkpoint.config.vocab_size)
    return Weights(name, source, _exported(checkpoint, folder / name), path, checkpoint.config.vocab_size)


def hf_documents(documents: dict[str, str]) -> dict[str, str]:
    """A converted GGUF's documents with what transformers and its kin ask for in addition, by file name."""
    config: dict[str, Any] = json.loads(documents[CONFIG])
    config |= {
        "model_type": _MODEL_TYPES[config["architectures"][0]],
        "torch_dtype": "bfloat16",
        "rope_theta": config["rope_parameters"]["rope_theta"],
    }
    # Named, or the class of the model's architecture is taken, which splits words in its own way.
    tokenizer_config = json.loads(documents[TOKENIZER_CONFIG]) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    return {
        CONFIG: json.dumps(config),
        GENERATION_CONFIG: documents[GENERATION_CONFIG],
        TOKENIZER: documents[TOKENIZER],
        TOKENIZER_CONFIG: json.dumps(tokenizer_config),
    }


def _name(checkpoint: Checkpoint) -> str:
    """Another one for each place, size and time of change."""
    is_folder = checkpoint.path.is_dir()
    files = [file.path for file in checkpoint.weight_files] if is_folder else [checkpoint.path]
    stats = [f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return f"{checkpoint.path.stem}-{hashlib.sha256(' '.join(stats).encode()).hexdigest()[:12]}"


def _exported(checkpoint: Checkpoint, folder: Path) -> Path:
    weights = folder / "model.safetensors"
    if not weights.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in hf_documents(import_gguf(checkpoint.path).documents).items():
            (folder / name).write_text(text, encoding="utf-8")
        temporary = weights.with_name(f"{weights.name}.{os.getpid()}.tmp")
        tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in checkpoint.tensors()}
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.replace(weights)
    return folder
