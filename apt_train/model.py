"""The model of a run: from a checkpoint, or new."""

from __future__ import annotations

import math

import torch
from torch import nn

from apt_core.checkpoint import Checkpoint, load_into, open_checkpoint
from apt_core.errors import ConfigError
from apt_core.model_config import ModelConfig, RopeConfig
from apt_core.models.decoder import DecoderForCausalLM
from apt_core.tokenizer import Tokenizer
from apt_train.config import LoraSettings, ModelSettings
from apt_train.lora import add_adapters

VOCABULARY_MULTIPLE = 64
"""A new model's vocabulary is rounded up to it: odd sizes are slow in matrix products."""


class ModelSource:
    """What a model will be made of; opened before anything else, so that a wrong setting shows at once.

    Raises:
        ConfigError: the vocabulary is smaller than the tokenizer's.
        CheckpointError: the checkpoint cannot be used.
    """

    def __init__(self, settings: ModelSettings) -> None:
        self._settings = settings
        self._checkpoint = open_checkpoint(settings.source or settings.tokenizer)
        self.config = self._checkpoint.config if settings.source else new_config(settings, self._checkpoint.tokenizer)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self._checkpoint.tokenizer

    @property
    def checkpoint(self) -> Checkpoint:
        """Where weights, or only the tokenizer, come from."""
        return self._checkpoint

    def build(self, lora: LoraSettings, *, dtype: torch.dtype, device: torch.device, seed: int) -> DecoderForCausalLM:
        """The whole model with weights; its random ones depend on the seed only."""
        with torch.device("meta"):
            model = DecoderForCausalLM(self.config)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if self._settings.source:
                load_into(model, self._checkpoint, dtype=dtype, device=device)
            else:
                model.to_empty(device="cpu")
                initialise(model, self._settings.initial_std)
                model.to(device=device, dtype=dtype)
            if lora.rank:
                add_adapters(model, lora)
        return model


def new_config(settings: ModelSettings, tokenizer: Tokenizer) -> ModelConfig:
    """The shape of a new model.

    Raises:
        ConfigError: the vocabulary is smaller than the tokenizer's.
    """
    needed = tokenizer.vocab_size
    vocab_size = settings.vocab_size or -(-needed // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    if vocab_size < needed:
        raise ConfigError(f"the tokenizer has {needed} ids, got {vocab_size}", field="model.vocab_size")
    return ModelConfig(
        architecture="Qwen3ForCausalLM" if settings.qk_norm else "LlamaForCausalLM",
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        num_kv_heads=settings.num_kv_heads,
        head_dim=settings.hidden_size // settings.num_heads,
        max_position_embeddings=settings.max_position_embeddings,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=settings.rope_theta),
        tie_word_embeddings=settings.tie_word_embeddings,
        qk_norm=settings.qk_norm,
    )


def initialise(model: DecoderForCausalLM, std: float) -> None:
    """Normal weights, smaller where they add to the residual (GPT-2's way); norms 1, biases 0."""
    before_residual = std / math.sqrt(2 * model.config.num_layers)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 1:
            nn.init.ones_(parameter)
        else:
            is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, std=before_residual if is_output else std)
