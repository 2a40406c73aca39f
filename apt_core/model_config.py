"""The shape of a model, read from a checkpoint's config.json or GGUF metadata."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (arXiv 2104.09864) and how it is stretched beyond its trained length."""

    theta: float = 10000.0
    """Base of the frequencies."""
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    """Kind of stretching; the fields below are those of config.json's rope_scaling / rope_parameters."""
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    """llama3 only."""
    high_freq_factor: float = 4.0
    """llama3 only."""
    beta_fast: float = 32.0
    """yarn (arXiv 2309.00071) only."""
    beta_slow: float = 1.0
    """yarn only."""
    attention_factor: float | None = None
    """yarn only: multiplies cos and sin; None derives it (0.1 ln(factor) + 1, or from mscale)."""
    mscale: float | None = None
    """yarn only."""
    mscale_all_dim: float | None = None
    """yarn only."""
    truncate: bool = True
    """yarn only: round the correction range to whole dimensions."""


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer of the Llama family (Llama, Mistral, Qwen2, Qwen3)."""

    architecture: str
    """Name in the registry, as in config.json's architectures, such as LlamaForCausalLM."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    """Bias on q, k and v projections (Qwen2; Llama with attention_bias)."""
    attention_out_bias: bool = False
    """Bias on the output projection (Llama with attention_bias)."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each head of q and k before rope (Qwen3)."""
    sliding_windows: tuple[int | None, ...] = ()
    """Per layer, how many keys a query sees, itself included; None = all. Empty = all layers see all."""
    dtype: str = "float32"
    """Element type the checkpoint's weights are stored in: float32, bfloat16 or float16."""

    def window(self, layer: int) -> int | None:
        """Sliding window of one layer in tokens, or None for full attention."""
        return self.sliding_windows[layer] if self.sliding_windows else None


@dataclass(frozen=True)
class GenerationConfig:
    """What a checkpoint says of generation (generation_config.json)."""

    eos_token_ids: tuple[int, ...] = ()
    """Any of these ends a generation."""
    bos_token_id: int | None = None
    temperature: float | None = None
    """The checkpoint's own sampling defaults; None where it states none."""
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @property
    def sampling_defaults(self) -> dict[str, float | int]:
        """The sampling defaults that the checkpoint states, by name."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}
