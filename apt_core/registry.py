"""Architectures by the name a checkpoint gives them."""

from __future__ import annotations

import torch

from apt_core.errors import ConfigError
from apt_core.model_config import ModelConfig
from apt_core.models.decoder import DecoderForCausalLM

ARCHITECTURES: dict[str, type[DecoderForCausalLM]] = {
    "LlamaForCausalLM": DecoderForCausalLM,
    "MistralForCausalLM": DecoderForCausalLM,
    "Qwen2ForCausalLM": DecoderForCausalLM,
    "Qwen3ForCausalLM": DecoderForCausalLM,
}


def build_model(config: ModelConfig, device: torch.device | str = "meta") -> DecoderForCausalLM:
    """The model a config describes, without weights when device is meta.

    Raises:
        ConfigError: an architecture APT does not have.
    """
    if config.architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ConfigError(f"{config.architecture} is not one of {known}", field="architectures")
    with torch.device(device):
        return ARCHITECTURES[config.architecture](config)
