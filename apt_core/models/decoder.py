"""The Llama family of decoders: Llama, Mistral, Qwen2 and Qwen3 differ by the flags of ModelConfig only.

Modules and parameters are named as in Hugging Face checkpoints, so a checkpoint's tensor names are the parameter names.
The unfused parameters are the truth; `fuse_projections` and `pack_linears` are transforms applied after loading.
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import nn

from apt_core.kv_cache import LayerKVCache
from apt_core.layers.linear import Embedding, Linear, PackedLinear, QuantizedLinear, fused_linear
from apt_core.layers.norm import RMSNorm
from apt_core.layers.rotary import RotaryEmbedding, RotaryValues
from apt_core.metadata import AttentionMetadata
from apt_core.model_config import ModelConfig
from apt_core.quantization import WeightPrecision, own_precision, pack_weight, pack_weights
from apt_kernels import ops

log = logging.getLogger(__name__)


class DecoderForCausalLM(nn.Module):
    """A decoder with its embedding and output head, over packed tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head: nn.Module | None = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, C]."""
        embedded: torch.Tensor = self.model.embed_tokens(input_ids)
        return embedded

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        metadata: AttentionMetadata,
        kv_cache: list[LayerKVCache] | None = None,
    ) -> torch.Tensor:
        """Embedded tokens [T, C] at positions [T] -> final hidden states [T, C], normed.

        With a KV cache, new keys and values are stored and attention reads the cache; without one, sequences attend to
        their own tokens only.
        """
        hidden: torch.Tensor = self.model(x, positions, metadata, kv_cache)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, C] -> [rows, V]."""
        if self.lm_head is None:
            return F.linear(hidden, self.model.embed_tokens.weight)
        logits: torch.Tensor = self.lm_head(hidden)
        return logits


class Decoder(nn.Module):
    """The stack of layers between embedding and output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config, i) for i in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config.rope, config.head_dim)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        metadata: AttentionMetadata,
        kv_cache: list[LayerKVCache] | None,
    ) -> torch.Tensor:
        """See DecoderForCausalLM.forward."""
        rotary = self.rotary(positions, x.dtype)
        residual: torch.Tensor | None = None
        for i, layer in enumerate(self.layers):
            x, residual = layer(x, residual, rotary, metadata, kv_cache[i] if kv_cache is not None else None)
        return self.norm(x) if residual is None else self.norm.add(x, residual)[0]


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each before its residual (pre-norm)."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        rotary: RotaryValues,
        metadata: AttentionMetadata,
        cache: LayerKVCache | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer before's output x and residual, not yet added -> this layer's, both [T, C]."""
        if residual is None:
            x, residual = self.input_layernorm(x), x
        else:
            x, residual = self.input_layernorm.add(x, residual)
        x = self.self_attn(x, rotary, metadata, cache)
        x, residual = self.post_attention_layernorm.add(x, residual)
        return self.mlp(x), residual


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rope, over a paged cache or over the batch itself."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.window = config.window(index)
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = Linear(q_size, config.hidden_size, bias=config.attention_out_bias)
        self.qkv_proj: nn.Module | None = None  # set by fuse_projections
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.has_qk_norm, self.norm_eps = config.qk_norm, config.rms_norm_eps

    def forward(
        self,
        x: torch.Tensor,
        rotary: RotaryValues,
        metadata: AttentionMetadata,
        cache: LayerKVCache | None,
    ) -> torch.Tensor:
        """[T, C] -> [T, C]."""
        qkv = self._project(x)
        if cache is None:
            out = self._attend_to_batch(qkv, rotary, metadata)
        else:
            out = self._attend_to_cache(qkv, rotary, metadata, cache)
        projected: torch.Tensor = self.o_proj(out.flatten(1))
        return projected

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        """[T, C] -> query, key and value heads side by side, [T, (H + 2 K) D]."""
        if self.qkv_proj is not None:
            qkv: torch.Tensor = self.qkv_proj(x)
            return qkv
        return torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), dim=-1)

    def _attend_to_batch(self, qkv: torch.Tensor, rotary: RotaryValues, metadata: AttentionMetadata) -> torch.Tensor:
        """Sequences attend to their own tokens of this batch; differentiable."""
        heads = qkv.view(qkv.shape[0], -1, self.head_dim)
        # Rope treats queries and keys alike.
        qk, value = torch.split(heads, [self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.has_qk_norm:
            query, key = torch.split(qk, [self.num_heads, self.num_kv_heads], dim=1)
            qk = torch.cat((self.q_norm(query), self.k_norm(key)), dim=1)
        qk = ops.apply_rope(qk, rotary.cos, rotary.sin)
        query, key = torch.split(qk, [self.num_heads, self.num_kv_heads], dim=1)
        return ops.varlen_attention(
            query, key, value, cu_seqlens=metadata.cu_seqlens_q, scale=self.scale, window=self.window
        )

    def _attend_to_cache(
        self, qkv: torch.Tensor, rotary: RotaryValues, metadata: AttentionMetadata, cache: LayerKVCache
    ) -> torch.Tensor:
        """Keys and values are stored, then sequences attend to all of theirs."""
        assert metadata.slot_mapping is not None and metadata.block_tables is not None
        query = ops.rope_and_store_kv(
            qkv,
            rotary.cos,
            rotary.sin,
            cache.keys,
            cache.values,
            metadata.slot_mapping,
            num_heads=self.num_heads,
            key_scales=cache.key_scales,
            value_scales=cache.value_scales,
            query_weight=self.q_norm.weight if self.has_qk_norm else None,
            key_weight=self.k_norm.weight if self.has_qk_norm else None,
            eps=self.norm_eps,
        )
        return ops.paged_attention(
            query,
            cache.keys,
            cache.values,
            cu_seqlens_q=metadata.cu_seqlens_q,
            context_lens=metadata.context_lens,
            block_tables=metadata.block_tables,
            num_decodes=metadata.num_decodes,
            max_seqlen_q=metadata.max_seqlen_q,
            max_context_len=metadata.max_context_len,
            scale=self.scale,
            window=self.window,
            key_scales=cache.key_scales,
            value_scales=cache.value_scales,
        )

    def fuse(self) -> None:
        """Replace the q, k and v projections by one."""
        self.qkv_proj = fused_linear([self.q_proj, self.k_proj, self.v_proj])
        del self.q_proj, self.k_proj, self.v_proj


class MLP(nn.Module):
    """SwiGLU feed-forward (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.gate_up_proj: nn.Module | None = None  # set by fuse_projections

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, C] -> [T, C]."""
        if self.gate_up_proj is not None:
            gated = ops.silu_and_mul(self.gate_up_proj(x))
        else:
            gated = ops.gated_silu(self.gate_proj(x), self.up_proj(x))
        out: torch.Tensor = self.down_proj(gated)
        return out

    def fuse(self) -> None:
        """Replace the gate and up projections by one."""
        self.gate_up_proj = fused_linear([self.gate_proj, self.up_proj])
        del self.gate_proj, self.up_proj


def fuse_projections(model: DecoderForCausalLM) -> None:
    """Post-load transform: one product for q, k and v, and one for gate and up."""
    for module in model.modules():
        if isinstance(module, Attention | MLP):
            module.fuse()


def pack_linears(
    model: DecoderForCausalLM,
    precision: WeightPrecision | None = None,
    head_precision: WeightPrecision | None = None,
) -> None:
    """Post-load transform: weights into the packed layouts of the device they are on, the tied output head included.

    A tied head gets a packed copy: the embedding needs plain rows. Logits are float32 wherever the format can. A GPU
    has no layout for weights in 16 or 32 bits, so these stay as they are.

    Args:
        precision: of the packed weights; None keeps their own, or that of the checkpoint where it is quantized.
        head_precision: of the output head; None takes precision, but int8 with int4, because 4 bits in the head alone
            cost about 5 % of perplexity.
    """
    if head_precision is None:
        head_precision = "int8" if precision == "int4" else precision
    num_dequantized = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            wanted = head_precision if child is model.lm_head else precision
            if isinstance(child, QuantizedLinear):
                own = own_precision(child.parts)
                num_dequantized += wanted is None and own in ("bfloat16", "float32")
                setattr(parent, name, PackedLinear(pack_weights(child.parts, wanted or own), child.bias))
            elif isinstance(child, nn.Linear) and (wanted is not None or ops.can_pack(child.weight)):
                setattr(parent, name, _packed(child.weight, child.bias, wanted))
    embedding = model.model.embed_tokens.weight
    if model.lm_head is None and (head_precision is not None or ops.can_pack(embedding)):
        model.lm_head = _packed(embedding, None, head_precision)
    if isinstance(model.lm_head, PackedLinear):
        model.lm_head.out_dtype = torch.float32
    if num_dequantized:
        log.info("%d linear layers have no product in the checkpoint's format: kept in bfloat16", num_dequantized)


def _packed(weight: torch.Tensor, bias: torch.Tensor | None, precision: WeightPrecision | None) -> PackedLinear:
    weight = weight.detach()
    packed = ops.pack_linear_weight(weight) if precision is None else pack_weight(weight, precision)
    return PackedLinear(packed, bias)
