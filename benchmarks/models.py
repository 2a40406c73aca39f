"""Models to measure speed on without a checkpoint: the shape of a known model, filled with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

from apt_core.checkpoint import open_checkpoint
from apt_core.checkpoint.export import WEIGHTS, hf_documents
from apt_core.checkpoint.gguf_import import CONFIG, TOKENIZER, TOKENIZER_CONFIG, import_gguf
from apt_core.checkpoint.hf_config import parse_model_config
from apt_core.document import Document
from apt_core.registry import build_model
from apt_kernels.cache import cache_folder
from apt_serve.engine.config import EMBEDDED_MODEL

RANDOM = "random:"

QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
"""config.json of Qwen/Qwen3-0.6B, what speed does not depend on left out."""
QWEN3_8B = QWEN3_06B | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "tie_word_embeddings": False,
}
"""The same of Qwen/Qwen3-8B."""
SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-05,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 49152,
}
"""The same of HuggingFaceTB/SmolLM2-135M."""
SHAPES: dict[str, dict[str, Any]] = {"smollm2-135m": SMOLLM2_135M, "qwen3-0.6b": QWEN3_06B, "qwen3-8b": QWEN3_8B}


def resolve(source: str) -> str:
    """A source the engine can open: of random:NAME a folder in the cache, filled at the first call.

    Raises:
        SystemExit: NAME is none of SHAPES.
    """
    if not source.startswith(RANDOM):
        return source
    name = source.removeprefix(RANDOM)
    if name not in SHAPES:
        raise SystemExit(f"{source}: no such shape; there are {', '.join(RANDOM + known for known in SHAPES)}")
    folder = cache_folder() / "benchmarks" / f"random-{name}"
    if not folder.is_dir():
        tokenizer = hf_documents(import_gguf(open_checkpoint(EMBEDDED_MODEL).path).documents, torch.bfloat16)
        write_random(folder, SHAPES[name], {file: tokenizer[file] for file in (TOKENIZER, TOKENIZER_CONFIG)})
    return str(folder)


def write_random(folder: Path, config: dict[str, Any], tokenizer: dict[str, str]) -> None:
    """A Hugging Face folder with random bfloat16 weights, the same at each call. It appears whole or not at all.

    Args:
        folder: where it is to be; it must not exist.
        config: contents of config.json.
        tokenizer: the tokenizer's files by name. It may know fewer tokens than the model has.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    model = build_model(parse_model_config(Document(config, CONFIG)))
    with TemporaryDirectory(dir=folder.parent) as temporary:
        whole = Path(temporary) / folder.name
        whole.mkdir()
        for name, text in {CONFIG: json.dumps(config), **tokenizer}.items():
            (whole / name).write_text(text, encoding="utf-8")
        tensors = {
            name: _random(parameter.shape, config["initializer_range"], generator)
            for name, parameter in model.named_parameters()
        }
        save_file(tensors, whole / WEIGHTS, metadata={"format": "pt"})
        whole.rename(folder)


def _random(shape: torch.Size, deviation: float, generator: torch.Generator) -> torch.Tensor:
    """Norms are ones, as at the beginning of training."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, generator=generator).mul_(deviation).to(torch.bfloat16)
