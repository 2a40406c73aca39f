"""Which shapes are measured: those of a model that a processor serves, and of one for a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from apt_core.checkpoint.hf_config import parse_model_config
from apt_core.document import Document
from apt_core.model_config import ModelConfig
from benchmarks.models import SHAPES

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Sizes:
    """The shapes of all ops."""

    models: tuple[tuple[str, ModelConfig], ...]
    dtype: torch.dtype
    """Of activations."""
    kv_dtypes: tuple[torch.dtype, ...]
    decodes: tuple[tuple[int, int], ...]
    """(batch, context)."""
    prompts: tuple[int, ...]
    """Tokens of a prompt."""
    weights: tuple[str, ...]
    """Kinds of packed weights: see linear.KINDS."""
    rows: tuple[int, ...]
    """Of a product."""
    tokens: tuple[int, ...]
    """Of norms, rope and gates."""
    documents: tuple[tuple[int, int], ...]
    """(number, tokens) of packed sequences in training."""
    loss_tokens: tuple[int, ...]
    samples: tuple[int, ...]
    """Rows of logits."""


def _model(name: str) -> tuple[str, ModelConfig]:
    return name, parse_model_config(Document(SHAPES[name], "config.json"))


PROCESSOR = Sizes(
    models=(_model("smollm2-135m"), _model("qwen3-0.6b")),
    dtype=torch.bfloat16,
    kv_dtypes=(torch.bfloat16, torch.int8),
    decodes=((1, 1024), (1, 16384), (8, 1024), (32, 1024), (32, 4096)),
    prompts=(512, 2048),
    weights=("bfloat16", "int8", "int4"),
    rows=(1, 8, 32, 256),
    tokens=(1, 32, 512),
    documents=((2, 512),),
    loss_tokens=(256,),
    samples=(1, 32),
)
GPU = Sizes(
    models=(_model("qwen3-8b"),),
    dtype=torch.bfloat16,
    kv_dtypes=(torch.bfloat16, torch.int8, FP8),
    decodes=((1, 4096), (1, 32768), (8, 4096), (64, 1024), (64, 4096)),
    prompts=(4096, 16384),
    weights=("w8a16", "w4a16", "w8a8", "fp8"),
    rows=(1, 8, 32, 512, 4096),
    tokens=(64, 8192),
    documents=((4, 4096), (1, 16384)),
    loss_tokens=(4096,),
    samples=(1, 64),
)


def sizes_for(device: torch.device) -> Sizes:
    """What is measured on a device."""
    return GPU if device.type == "cuda" else PROCESSOR
