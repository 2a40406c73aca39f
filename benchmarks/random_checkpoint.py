"""A checkpoint that is on no disk: random weights, made on a device whenever they are asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from apt_core.checkpoint import Checkpoint
from apt_core.checkpoint.hf_config import parse_model_config
from apt_core.document import Document
from apt_core.model_config import GenerationConfig
from apt_core.quantization import StoredWeight
from apt_core.registry import build_model
from apt_core.tokenizer import HFTokenizer, TokenizerFiles, build_tokenizer
from benchmarks.machine import CPU

SEED = 0


@dataclass(frozen=True)
class RandomCheckpoint(Checkpoint):
    """The shape of a model with the same random bfloat16 weights each time, norms as at the beginning of training."""

    device: torch.device = CPU
    """Where they are made: those of two kinds of device differ."""
    deviation: float = 0.02

    def weights(self) -> Iterator[tuple[str, torch.Tensor | StoredWeight]]:
        """As ``tensors``."""
        return iter(self.tensors())

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Hugging Face parameter name and its tensor, one at a time; tied ones once."""
        generator = torch.Generator(self.device).manual_seed(SEED)
        for name, parameter in build_model(self.config).named_parameters():
            values = torch.ones(parameter.shape, dtype=torch.bfloat16, device=self.device)
            yield name, values if values.dim() == 1 else values.normal_(0, self.deviation, generator=generator)


def random_checkpoint(config: dict[str, Any], device: torch.device) -> RandomCheckpoint:
    """A model by its config.json, with a tokenizer that knows all of its tokens."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]
    return RandomCheckpoint(
        path=Path(f"random-{digest}"),
        config=parse_model_config(Document(config, "config.json")),
        generation=GenerationConfig(),
        tokenizer=random_tokenizer(config["vocab_size"]),
        weight_files=(),
        device=device,
        deviation=config["initializer_range"],
    )


def random_tokenizer(vocab_size: int) -> HFTokenizer:
    """Single bytes first, then words that are their own numbers."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"Ġ{number}" for number in range(len(letters), vocab_size))][:vocab_size]
    tokenizer = RustTokenizer(BPE({token: number for number, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    settings = Document({}, "tokenizer_config.json")
    return build_tokenizer(TokenizerFiles(tokenizer.to_str(), "tokenizer.json", settings, None, ""))
