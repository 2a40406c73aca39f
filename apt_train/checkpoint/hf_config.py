"""config.json of a new model, as transformers reads it."""

from __future__ import annotations

from typing import Any

from apt_core.model_config import GenerationConfig, ModelConfig

_MODEL_TYPES = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}
"""The architectures that `apt_train.model.new_config` makes."""


def model_document(config: ModelConfig, generation: GenerationConfig, dtype: str) -> dict[str, Any]:
    """What `apt_core.checkpoint.hf_config.parse_model_config` reads back as the same config."""
    return {
        "architectures": [config.architecture],
        "model_type": _MODEL_TYPES[config.architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": False,
        "bos_token_id": generation.bos_token_id,
        "eos_token_id": list(generation.eos_token_ids),
        "torch_dtype": dtype,
    }
