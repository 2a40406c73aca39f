"""A small model trained here from random weights: what few bits cost a model that never had few.

The embedded model's weights were 4-bit once. This one is trained in float32, on Shakespeare without King Lear, which it
is then measured on.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from apt_core.checkpoint.hf_config import parse_model_config
from apt_core.document import Document
from apt_core.metadata import AttentionMetadata
from apt_core.models.decoder import DecoderForCausalLM
from apt_core.registry import build_model
from apt_kernels.cache import cache_folder
from benchmarks.quality.text import other_plays

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "vocab_size": 2048,
}


@dataclass(frozen=True)
class Training:
    """How long and how fast."""

    num_steps: int = 600
    batch: int = 4
    """Windows in a step."""
    length: int = 256
    """Tokens of a window."""
    warmup_steps: int = 50
    learning_rate: float = 2e-3
    """The highest; it rises to it linearly and falls along half a cosine."""
    weight_decay: float = 0.1
    max_norm: float = 1.0
    """Gradients are scaled down to it."""

    def learning_rate_at(self, step: int) -> float:
        """Of a step from 0 on."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def small_model() -> Path:
    """A Hugging Face folder in the cache; trained at the first call, which takes some minutes on two cores."""
    folder = cache_folder() / "benchmarks" / "small-shakespeare"
    if not folder.is_dir():
        write_small_model(folder, other_plays(), CONFIG, Training())
    return folder


def write_small_model(folder: Path, text: str, config: dict[str, Any], training: Training) -> None:
    """Train tokenizer and model on a text. The folder appears whole or not at all.

    Args:
        folder: where the model is to be, in Hugging Face layout, float32; it must not exist.
        text: to train on.
        config: contents of config.json.
        training: how.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(text, config["vocab_size"])
    model = build_model(parse_model_config(Document(config, "config.json")), device="cpu")
    train(model, torch.tensor(tokenizer.encode(text).ids), training, deviation=config["initializer_range"])
    with TemporaryDirectory(dir=folder.parent) as temporary:
        whole = Path(temporary) / folder.name
        whole.mkdir()
        (whole / "config.json").write_text(json.dumps(config), encoding="utf-8")
        tokenizer.save(str(whole / "tokenizer.json"))
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        save_file(weights, whole / "model.safetensors", metadata={"format": "pt"})
        whole.rename(folder)


def train(model: DecoderForCausalLM, ids: torch.Tensor, training: Training, *, deviation: float) -> float:
    """AdamW from random weights, the same each time, with a line of progress now and then.

    Args:
        model: its weights are replaced.
        ids: [tokens] the text.
        training: how.
        deviation: standard deviation of the first weights.

    Returns:
        Mean negative log-likelihood of the last step.
    """
    generator = torch.Generator().manual_seed(0)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    norms = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    for matrix in matrices:
        torch.nn.init.normal_(matrix, std=deviation, generator=generator)
    for norm in norms:
        torch.nn.init.ones_(norm)
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    metadata = AttentionMetadata.for_full_sequences([training.length] * training.batch)
    positions = torch.arange(training.length).repeat(training.batch)
    began, loss = time.perf_counter(), torch.tensor(math.nan)
    for step, (inputs, targets) in enumerate(_batches(ids, training, generator)):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate_at(step)
        logits = model.logits(model(model.embed(inputs), positions, metadata))
        loss = torch.nn.functional.cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_norm)
        optimizer.step()
        if step % 50 == 0:
            print(f"training, step {step}: loss {loss.item():.2f}, {time.perf_counter() - began:.0f} s", flush=True)
    return loss.item()


def _batches(
    ids: torch.Tensor, training: Training, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Random windows, packed: inputs and the tokens after them, both [batch * length]."""
    for _ in range(training.num_steps):
        starts = torch.randint(len(ids) - training.length, (training.batch, 1), generator=generator)
        windows = ids[starts + torch.arange(training.length + 1)]
        yield windows[:, :-1].flatten(), windows[:, 1:].flatten()


def _tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Byte-level BPE of the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer
