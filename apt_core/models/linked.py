"""A decoder's whole step as one C++ op, where a processor has every part of it."""

from __future__ import annotations

import torch

from apt_core.kv_cache import LayerKVCache
from apt_core.layers.linear import PackedLinear
from apt_core.models.decoder import DecoderForCausalLM, DecoderLayer
from apt_kernels import ops


def link_layers(
    model: DecoderForCausalLM, kv_cache: list[LayerKVCache], max_positions: int
) -> ops.DecoderLayers | None:
    """A fused and packed model over this cache, for positions below max_positions, as one op.

    It gives what the model gives, bit for bit. None where a part has no C++ op; only the output head may lack one.
    """
    config, decoder = model.config, model.model
    layers = [_layer_weights(layer) for layer in decoder.layers]
    weights = [layer for layer in layers if layer is not None]
    if len(weights) < len(layers) or not ops.can_run_layers(weights, config.head_dim):
        return None
    embedding = decoder.embed_tokens.weight.detach()
    rotary = decoder.rotary(torch.arange(max_positions), embedding.dtype)
    linked = ops.DecoderLayers(
        weights,
        _head(model.lm_head),
        embedding=embedding,
        final_norm=decoder.norm.weight.detach(),
        cos=rotary.cos,
        sin=rotary.sin,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        eps=config.rms_norm_eps,
        scale=config.head_dim**-0.5,
    )
    linked.bind_caches(
        [cache.keys for cache in kv_cache],
        [cache.values for cache in kv_cache],
        [cache.key_scales for cache in kv_cache],
        [cache.value_scales for cache in kv_cache],
    )
    return linked


def _head(head: torch.nn.Module | None) -> ops.Projection | None:
    if isinstance(head, PackedLinear) and ops.has_product(head.weight):
        return ops.Projection(head.weight, head.bias)
    return None


def _layer_weights(layer: torch.nn.Module) -> ops.LayerWeights | None:
    """A layer's weights, if they are fused and packed."""
    assert isinstance(layer, DecoderLayer)
    attention, mlp = layer.self_attn, layer.mlp
    linears = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
    projections = [ops.Projection(linear.weight, linear.bias) for linear in linears if isinstance(linear, PackedLinear)]
    if len(projections) < len(linears):
        return None
    qkv, attention_out, gate_up, down = projections
    return ops.LayerWeights(
        input_norm=layer.input_layernorm.weight.detach(),
        qkv=qkv,
        query_norm=attention.q_norm.weight.detach() if attention.has_qk_norm else None,
        key_norm=attention.k_norm.weight.detach() if attention.has_qk_norm else None,
        attention_out=attention_out,
        post_attention_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=gate_up,
        down=down,
        window=attention.window,
    )
