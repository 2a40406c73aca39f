"""ModelConfig's own arithmetic; how it is read is tested in checkpoint/test_hf_config.py."""

from __future__ import annotations

import dataclasses

from apt_core.model_config import ModelConfig

CONFIG = ModelConfig(
    architecture="Qwen2ForCausalLM",
    vocab_size=8,
    hidden_size=8,
    intermediate_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    max_position_embeddings=16,
    rms_norm_eps=1e-6,
)


def test_without_windows_every_layer_sees_all() -> None:
    assert [CONFIG.window(layer) for layer in range(2)] == [None, None]


def test_windows_are_per_layer() -> None:
    config = dataclasses.replace(CONFIG, sliding_windows=(None, 4))

    assert [config.window(layer) for layer in range(2)] == [None, 4]
