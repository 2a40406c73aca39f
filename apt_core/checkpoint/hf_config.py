"""config.json and generation_config.json, as transformers writes them, parsed into ModelConfig and GenerationConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from apt_core.document import Document
from apt_core.errors import CheckpointError
from apt_core.model_config import GenerationConfig, ModelConfig, RopeConfig

_DTYPES = ("float32", "bfloat16", "float16")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_MISTRAL_WINDOW = 4096
"""transformers' default where a Mistral config does not mention sliding_window at all; null means none."""


@dataclass(frozen=True)
class _Family:
    """What an architecture fixes or defaults without saying so in config.json (transformers' configuration files)."""

    has_attention_bias_key: bool = False
    """Whether attention_bias and mlp_bias are read."""
    qkv_bias: bool = False
    qk_norm: bool = False
    has_layer_windows: bool = False
    """Whether use_sliding_window, max_window_layers and layer_types are read."""
    head_dim: int | None = None
    """Where config.json states none; None derives it from hidden_size."""


_FAMILIES = {
    "LlamaForCausalLM": _Family(has_attention_bias_key=True),
    "MistralForCausalLM": _Family(),
    "Qwen2ForCausalLM": _Family(qkv_bias=True, has_layer_windows=True),
    "Qwen3ForCausalLM": _Family(has_attention_bias_key=True, qk_norm=True, has_layer_windows=True, head_dim=128),
}


def parse_model_config(config: Document) -> ModelConfig:
    """ModelConfig of a config.json.

    Raises:
        CheckpointError: a key is missing, of a wrong type, or asks for what no model here does.
    """
    architecture = _architecture(config)
    family = _FAMILIES[architecture]
    _refuse_what_is_not_read(config)
    hidden_size = config.integer("hidden_size")
    num_layers = config.integer("num_hidden_layers")
    num_heads = config.integer("num_attention_heads")
    attention_bias = family.has_attention_bias_key and config.boolean("attention_bias", False)
    max_position_embeddings = config.integer("max_position_embeddings")
    return ModelConfig(
        architecture=architecture,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(config, num_heads),
        head_dim=_head_dim(config, family, hidden_size, num_heads),
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=_rope(config, max_position_embeddings),
        tie_word_embeddings=config.boolean("tie_word_embeddings", False),
        qkv_bias=family.qkv_bias or attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=architecture == "LlamaForCausalLM" and config.boolean("mlp_bias", False),
        qk_norm=family.qk_norm,
        sliding_windows=_sliding_windows(config, architecture, family, num_layers),
        dtype=_dtype(config),
    )


def parse_generation_config(generation: Document | None, config: Document) -> GenerationConfig:
    """GenerationConfig of a generation_config.json; what it lacks of token ids is taken from config.json.

    Raises:
        CheckpointError: a value is of a wrong type.
    """
    documents = [document for document in (generation, config) if document is not None]
    defaults = documents[0] if generation is not None else Document({}, config.file)
    return GenerationConfig(
        eos_token_ids=next((_token_ids(doc, "eos_token_id") for doc in documents if doc.has("eos_token_id")), ()),
        bos_token_id=next(
            (doc.integer("bos_token_id", minimum=0) for doc in documents if doc.has("bos_token_id")), None
        ),
        temperature=defaults.optional_number("temperature"),
        top_p=defaults.optional_number("top_p"),
        top_k=defaults.integer("top_k", minimum=-1) if defaults.has("top_k") else None,
        min_p=defaults.optional_number("min_p"),
        repetition_penalty=defaults.optional_number("repetition_penalty"),
    )


def _architecture(config: Document) -> str:
    names = config.items("architectures")
    if not names:
        raise config.error("architectures", "is missing")
    if names[0] not in _FAMILIES:
        raise config.error("architectures", f"{names[0]!r} is not supported; supported are {', '.join(_FAMILIES)}")
    return str(names[0])


def _refuse_what_is_not_read(config: Document) -> None:
    activation = config.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise config.error("hidden_act", f"{activation!r} is not supported; only silu is")


def _num_kv_heads(config: Document, num_heads: int) -> int:
    num_kv_heads = config.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise config.error("num_key_value_heads", f"{num_kv_heads} does not divide {num_heads} attention heads")
    return num_kv_heads


def _head_dim(config: Document, family: _Family, hidden_size: int, num_heads: int) -> int:
    if not config.has("head_dim") and family.head_dim is None and hidden_size % num_heads:
        raise config.error("head_dim", f"is missing, and hidden_size {hidden_size} is no multiple of {num_heads} heads")
    head_dim = config.integer("head_dim", family.head_dim or hidden_size // num_heads)
    if head_dim % 2:
        raise config.error("head_dim", f"rotary embedding needs an even size, got {head_dim}")
    return head_dim


def _rope(config: Document, max_position_embeddings: int) -> RopeConfig:
    """From transformers 5's rope_parameters, or from rope_theta and rope_scaling before it."""
    rope = config.child("rope_parameters") or config.child("rope_scaling") or Document({}, config.file)
    kind_key = "rope_type" if rope.has("rope_type") else "type"
    kind = rope.text(kind_key, "default")
    if kind not in _ROPE_TYPES:
        raise rope.error(kind_key, f"{kind!r} is not supported; supported are {', '.join(_ROPE_TYPES)}")
    for place in (rope, config):
        if place.number("partial_rotary_factor", 1.0) != 1.0:
            raise place.error("partial_rotary_factor", "rotary embedding of a part of each head is not supported")
    theta = rope.number("rope_theta", config.number("rope_theta", 10000.0))
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, scaling="linear", factor=rope.number("factor"))
    return RopeConfig(
        theta=theta,
        scaling=cast(Literal["llama3", "yarn"], kind),
        factor=rope.number("factor"),
        original_max_position_embeddings=rope.integer("original_max_position_embeddings", max_position_embeddings),
        low_freq_factor=rope.number("low_freq_factor", 1.0),
        high_freq_factor=rope.number("high_freq_factor", 4.0),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=rope.optional_number("attention_factor"),
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        truncate=rope.boolean("truncate", True),
    )


def _sliding_windows(config: Document, architecture: str, family: _Family, num_layers: int) -> tuple[int | None, ...]:
    if architecture == "MistralForCausalLM":
        if "sliding_window" in config.values and not config.has("sliding_window"):
            return ()
        return (config.integer("sliding_window", _MISTRAL_WINDOW),) * num_layers
    if not family.has_layer_windows or not config.boolean("use_sliding_window", False):
        return ()
    if not config.has("sliding_window"):
        return ()
    window = config.integer("sliding_window")
    windows = tuple(window if slides else None for slides in _layers_that_slide(config, num_layers))
    return windows if any(windows) else ()


def _layers_that_slide(config: Document, num_layers: int) -> list[bool]:
    if not config.has("layer_types"):
        first = config.integer("max_window_layers", 28, minimum=0)
        return [layer >= first for layer in range(num_layers)]
    kinds = config.items("layer_types")
    if len(kinds) != num_layers:
        raise config.error("layer_types", f"expected one for each of {num_layers} layers, got {len(kinds)}")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise config.error("layer_types", f"{kind!r} is not supported")
    return [kind == "sliding_attention" for kind in kinds]


def _dtype(config: Document) -> str:
    key = "dtype" if config.has("dtype") else "torch_dtype"
    name = config.text(key, "float32").removeprefix("torch.")
    if name not in _DTYPES:
        raise config.error(key, f"{name!r} is not supported; supported are {', '.join(_DTYPES)}")
    return name


def _token_ids(document: Document, key: str) -> tuple[int, ...]:
    value = document.values[key]
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) and token_id >= 0 for token_id in ids):
        raise CheckpointError(
            f"expected one or several token ids, got {value!r}", file=document.file, field=f"{document.prefix}{key}"
        )
    return tuple(ids)
