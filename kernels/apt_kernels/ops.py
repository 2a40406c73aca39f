"""The public ops: check arguments, then choose a backend by device, dtype and need of gradients.

On a processor the C++ ops serve float32 and bfloat16 wherever no gradient is wanted. On a GPU the Triton kernels serve,
with gradients where training needs them. Everything else is made of torch ops, which autograd and the compiler see
through.
"""

from __future__ import annotations

import torch

from apt_kernels import reference
from apt_kernels.cpu import attention as cpu_attention
from apt_kernels.cpu import linear as cpu_linear
from apt_kernels.cpu import native
from apt_kernels.cpu import training as cpu_training
from apt_kernels.cpu import varlen_attention as cpu_varlen_attention
from apt_kernels.cpu.decoder import DecoderLayers, LayerWeights, Projection, can_run_layers, has_product
from apt_kernels.cpu.linear import (
    PACKED_LAYOUT_VERSION,
    PORTABLE_FORMATS,
    QUANTIZED_FORMATS,
    PackedWeight,
    can_pack,
)
from apt_kernels.cross_entropy import wide_dtype
from apt_kernels.reference import apply_rope

# Triton is for NVIDIA's GPUs here: a torch without CUDA does not import it.
if torch.version.cuda is not None:
    from apt_kernels.triton import activation as triton_activation
    from apt_kernels.triton import cross_entropy as triton_cross_entropy
    from apt_kernels.triton import norm as triton_norm
    from apt_kernels.triton import packed as triton_packed
    from apt_kernels.triton import paged_attention as triton_attention
    from apt_kernels.triton import rope_store as triton_rope_store
    from apt_kernels.triton import sampling as triton_sampling
    from apt_kernels.triton import store_kv as triton_store_kv
    from apt_kernels.triton import varlen_attention as triton_varlen_attention

__all__ = [
    "PACKED_LAYOUT_VERSION",
    "PORTABLE_FORMATS",
    "QUANTIZED_FORMATS",
    "DecoderLayers",
    "LayerWeights",
    "PackedWeight",
    "Projection",
    "apply_rope",
    "argmax",
    "can_pack",
    "can_run_layers",
    "fused_add_rms_norm",
    "gated_silu",
    "has_product",
    "linear_cross_entropy",
    "pack_float8_weight",
    "pack_int4_weight",
    "pack_int8_weight",
    "pack_linear_weight",
    "packed_linear",
    "paged_attention",
    "rms_norm",
    "rope_and_store_kv",
    "sample",
    "set_num_threads",
    "silu_and_mul",
    "store_kv",
    "top_logprobs",
    "varlen_attention",
]


NATIVE_DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes the C++ ops know."""
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes the Triton kernels compute in."""


def set_num_threads(count: int) -> None:
    """How many threads an op on a processor uses: torch's and the C++ ops'."""
    torch.set_num_threads(count)
    native.set_num_threads(count)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension, [..., C] -> [..., C]; see `reference.rms_norm`."""
    if _is_native(x, weight):
        out: torch.Tensor = torch.ops.apt_cpu.rms_norm(x, weight, eps)
        return out
    if _is_triton(x, weight):
        return triton_norm.rms_norm(x, weight, eps)
    if cpu_training.can_norm(x, weight):
        return cpu_training.add_rms_norm(x, None, weight, eps)[0]
    return reference.rms_norm(x, weight, eps)


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(RMSNorm of x + residual, x + residual), both [T, C]; see `reference.fused_add_rms_norm`."""
    if _is_native(x, weight, residual):
        normed, total = torch.ops.apt_cpu.fused_add_rms_norm(x, residual, weight, eps)
        return normed, total
    if _is_triton(x, weight, residual):
        return triton_norm.fused_add_rms_norm(x, residual, weight, eps)
    if cpu_training.can_norm(x, weight, residual):
        return cpu_training.add_rms_norm(x, residual, weight, eps)
    return reference.fused_add_rms_norm(x, residual, weight, eps)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, gate and up side by side: [T, 2 I] -> [T, I]; see `reference.silu_and_mul`."""
    if _is_native(gate_up):
        out: torch.Tensor = torch.ops.apt_cpu.silu_and_mul(gate_up)
        return out
    if _is_triton(gate_up):
        return triton_activation.silu_and_mul(gate_up)
    return reference.silu_and_mul(gate_up)


def gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of two products that were not made as one; see `reference.gated_silu`."""
    if cpu_training.can_gate(gate):
        return cpu_training.gated_silu(gate, up)
    if _is_triton(gate, up):
        return triton_activation.silu_and_mul(torch.cat((gate, up), dim=-1))
    return reference.gated_silu(gate, up)


def rope_and_store_kv(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    num_heads: int,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    query_weight: torch.Tensor | None = None,
    key_weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """Rotate queries and keys, store keys and values, return the queries; see `reference.rope_and_store_kv`.

    Raises:
        ValueError: shapes that do not fit together; names the argument.
    """
    num_kv_heads, head_dim = key_cache.shape[2:]
    width = (num_heads + 2 * num_kv_heads) * head_dim
    _require(qkv.dim() == 2 and qkv.shape[1] == width, "qkv", f"must be [T, {width}], got {tuple(qkv.shape)}")
    _check_caches(key_cache, value_cache, key_scales, value_scales)
    _require((query_weight is None) == (key_weight is None), "key_weight", "must be given if query_weight is")
    if _is_triton(qkv) and not _wants_gradient(qkv):
        return triton_rope_store.rope_and_store_kv(
            *(qkv, cos, sin, key_cache, value_cache, slot_mapping),
            num_heads=num_heads,
            query_weight=query_weight,
            key_weight=key_weight,
            eps=eps,
            key_scales=key_scales,
            value_scales=value_scales,
        )
    if _is_native(qkv) and _has_native_cache(qkv, key_cache, value_cache, key_scales, value_scales):
        out: torch.Tensor = torch.ops.apt_cpu.rope_and_store_kv(
            *(qkv, cos, sin, key_cache, value_cache, key_scales, value_scales, slot_mapping),
            *(num_heads, num_kv_heads, query_weight, key_weight, eps),
        )
        return out
    return reference.rope_and_store_kv(
        *(qkv, cos, sin, key_cache, value_cache, slot_mapping),
        *(num_heads, query_weight, key_weight, eps, key_scales, value_scales),
    )


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    """Store keys and values, [T, K, D], of packed tokens into a paged KV cache; see `reference.store_kv`.

    Raises:
        ValueError: shapes that do not fit together; names the argument.
    """
    for name, x in (("key", key), ("value", value)):
        fits = x.dim() == 3 and x.shape == (slot_mapping.shape[0], *key_cache.shape[2:])
        _require(fits, name, f"must be [T, K, D] as slot_mapping and key_cache are, got {tuple(x.shape)}")
    _check_caches(key_cache, value_cache, key_scales, value_scales)
    caches = (key_cache, value_cache)
    if _is_triton(key, value):
        key, value = (x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (key, value))
        triton_store_kv.store_kv(key, value, *caches, slot_mapping, key_scales, value_scales)
    else:
        reference.store_kv(key, value, *caches, slot_mapping, key_scales, value_scales)


INT4_GROUP_SIZES = (32, 64, 128)
MAX_INT8_IN = 2**17
"""Products of two int8 are at most 127 * 128: so many fit into an int32."""
FLOAT8_BLOCK_IN = 128
"""Inputs that a product with float8 weights sums before it applies a block's scale."""


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    num_decodes: int,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_context_len: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention over a paged KV cache; see `reference.paged_attention`.

    Args:
        num_decodes: how many leading sequences have exactly one query.
        max_seqlen_q, max_context_len: bounds on the queries and the context of any sequence, by which a GPU's work is
            cut; None takes the largest the tensors allow.
        out: [T, H, D], contiguous, written and returned; None makes one.

    Raises:
        ValueError: shapes or dtypes that do not fit together; names the argument.
    """
    _check_heads(query, key_cache.shape[2], "key_cache")
    _check_caches(key_cache, value_cache, key_scales, value_scales)
    num_seqs = context_lens.shape[0]
    _require(cu_seqlens_q.shape[0] == num_seqs + 1, "cu_seqlens_q", "must have one more entry than context_lens")
    _require(block_tables.shape[0] == num_seqs, "block_tables", "must have one row per sequence")
    _require(window is None or window > 0, "window", f"must be positive, got {window}")
    _require(soft_cap is None or soft_cap > 0, "soft_cap", f"must be positive, got {soft_cap}")
    if out is not None:
        fits = out.shape == query.shape and out.dtype == query.dtype and out.is_contiguous()
        _require(fits, "out", f"must be contiguous {query.dtype} {tuple(query.shape)}")
    if _is_triton(query) and not _wants_gradient(query):
        most_keys = block_tables.shape[1] * key_cache.shape[1]
        return triton_attention.paged_attention(
            query,
            key_cache,
            value_cache,
            cu_seqlens_q=cu_seqlens_q,
            context_lens=context_lens,
            block_tables=block_tables,
            num_decodes=num_decodes,
            max_seqlen_q=max(query.shape[0], 1) if max_seqlen_q is None else max_seqlen_q,
            max_context_len=most_keys if max_context_len is None else max_context_len,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            key_scales=key_scales,
            value_scales=value_scales,
            out=out,
        )
    layout = (cu_seqlens_q, context_lens, block_tables)
    if soft_cap is not None:
        capped = reference.paged_attention(
            query, key_cache, value_cache, *layout, scale, window, key_scales, value_scales, soft_cap
        )
        return _into(out, capped)
    can_tile = query.shape[2] % 16 == 0 and scale > 0
    if can_tile and _is_native(query) and _has_native_cache(query, key_cache, value_cache, key_scales, value_scales):
        made: torch.Tensor = torch.ops.apt_cpu.paged_attention(
            query, key_cache, value_cache, key_scales, value_scales, *layout, scale, window
        )
        return _into(out, made)
    cache = (key_cache, value_cache)
    if query.device.type == "cpu":
        result = cpu_attention.paged_attention(
            query, *cache, *layout, num_decodes, scale, window, key_scales, value_scales
        )
    else:
        result = reference.paged_attention(query, *cache, *layout, scale, window, key_scales, value_scales)
    return _into(out, result)


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention within packed sequences; see `reference.varlen_attention`.

    Raises:
        ValueError: shapes or dtypes that do not fit together; names the argument.
    """
    _check_heads(query, key.shape[1], "key")
    _require(key.shape == value.shape, "value", "must have key's shape")
    if _is_triton(query, key, value):
        return triton_varlen_attention.varlen_attention(
            query, key, value, cu_seqlens=cu_seqlens, scale=scale, window=window
        )
    if query.device.type == "cpu":
        out: torch.Tensor = cpu_varlen_attention.varlen_attention(query, key, value, cu_seqlens, scale, window)
        return out
    return reference.varlen_attention(query, key, value, cu_seqlens, scale, window)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the tokens' losses, and their number, in little memory; see `reference.linear_cross_entropy`.

    The logits of a chunk of tokens exist at a time, and become the gradients at once (see `apt_kernels.cross_entropy`).

    Args:
        hidden: [T, C]. weight: [V, C], which may be that of the embedding; of hidden's dtype, or float32 where that is
            of 16 bits: then the products are made in 16, and the gradient is float32 without a cast of its own.
        targets: [T] int64, ids or ignore_index.
        z_loss: adds so much of the square of each token's logsumexp.

    Returns:
        The sum [], differentiable once in hidden and weight, and the number [] int64.

    Raises:
        ValueError: shapes or dtypes that do not fit together; names the argument.
    """
    _require(hidden.dim() == 2, "hidden", f"must be [T, C], got {tuple(hidden.shape)}")
    fits = weight.dim() == 2 and weight.shape[1] == hidden.shape[1]
    fits = fits and weight.dtype in (hidden.dtype, wide_dtype(hidden.dtype))
    _require(fits and len(weight) > 0, "weight", f"must be {hidden.dtype} [V, {hidden.shape[1]}]")
    fits = targets.shape == hidden.shape[:1] and targets.dtype == torch.int64
    _require(fits, "targets", f"must be int64 [{hidden.shape[0]}]")
    if _is_triton(hidden):
        return triton_cross_entropy.linear_cross_entropy(
            hidden, weight, targets, ignore_index=ignore_index, z_loss=z_loss
        )
    return cpu_training.linear_cross_entropy(hidden, weight, targets, ignore_index, z_loss)


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """The first of each row's largest logits, [R, V] -> [R] int64; see `reference.argmax`.

    Raises:
        ValueError: a shape that does not fit.
    """
    _check_logits(logits)
    if _is_native(logits):
        out: torch.Tensor = torch.ops.apt_cpu.argmax(logits)
        return out
    if _is_triton(logits):
        return triton_sampling.argmax(_rows(logits))
    return reference.argmax(logits)


def sample(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """Draw one token a row from the filtered distribution, [R, V] -> [R] int64; see `reference.sample`.

    A row depends on its own logits, parameters and number only, bit for bit.

    Args:
        temperature: [R] float32, 0 takes the argmax.
        top_k: [R] int64, 0 keeps all.
        top_p, min_p: [R] float32, 1 and 0 keep all.
        uniform: [R] float64 in [0, 1).

    Raises:
        ValueError: shapes or dtypes that do not fit together; names the argument.
    """
    _check_logits(logits)
    _check_per_row(temperature, "temperature", torch.float32, logits)
    _check_per_row(top_k, "top_k", torch.int64, logits)
    _check_per_row(top_p, "top_p", torch.float32, logits)
    _check_per_row(min_p, "min_p", torch.float32, logits)
    _check_per_row(uniform, "uniform", torch.float64, logits)
    if _is_native(logits):
        out: torch.Tensor = torch.ops.apt_cpu.sample(logits, temperature, top_k, top_p, min_p, uniform)
        return out
    if _is_triton(logits):
        parameters = (temperature, top_k, top_p, min_p, uniform)
        return triton_sampling.sample(_rows(logits), *(x.contiguous() for x in parameters))
    return reference.sample(logits, temperature, top_k, top_p, min_p, uniform)


def top_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of given tokens and of the num_top most likely ones; see `reference.top_logprobs`.

    Raises:
        ValueError: shapes or dtypes that do not fit together; names the argument.
    """
    _check_logits(logits)
    _check_per_row(token_ids, "token_ids", torch.int64, logits)
    _require(0 <= num_top <= logits.shape[1], "num_top", f"must be at most {logits.shape[1]}, got {num_top}")
    if _is_native(logits):
        chosen, best, ids = torch.ops.apt_cpu.top_logprobs(logits, token_ids, num_top)
        return chosen, best, ids
    if _is_triton(logits):
        return triton_sampling.top_logprobs(_rows(logits), token_ids.contiguous(), num_top)
    return reference.top_logprobs(logits, token_ids, num_top)


def _is_native(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether the C++ ops serve: plain tensors of a dtype they know, and no gradient wanted.

    Between two steps nothing of Python is in the processor's caches: every question here costs a microsecond or more.
    """
    if not native.is_enabled() or not x.is_cpu or x.dtype not in NATIVE_DTYPES or type(x) is not torch.Tensor:
        return False
    for other in others:
        if other.dtype != x.dtype:
            return False
    return not _wants_gradient(x, *others)


def _is_triton(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether the Triton kernels serve: plain tensors of one dtype they know, on one of NVIDIA's GPUs."""
    if not _is_on_gpu(x) or x.dtype not in TRITON_DTYPES or type(x) is not torch.Tensor:
        return False
    return all(other.dtype == x.dtype for other in others)


def _into(out: torch.Tensor | None, result: torch.Tensor) -> torch.Tensor:
    return result if out is None else out.copy_(result)


def _wants_gradient(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _is_on_gpu(x: torch.Tensor) -> bool:
    return torch.version.cuda is not None and x.is_cuda


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x [R, C] with what a row holds side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


def _has_native_cache(
    x: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
) -> bool:
    """Whether the C++ ops know the cache: of x's dtype or int8, keys and values laid out alike."""
    if key_cache.stride() != value_cache.stride() or key_cache.stride(3) != 1:
        return False
    if key_scales is None or value_scales is None:
        return key_cache.dtype == value_cache.dtype == x.dtype
    return key_scales.stride() == value_scales.stride()


def pack_linear_weight(weight: torch.Tensor) -> PackedWeight:
    """A weight [out, in] in its own precision, in the layout that `packed_linear` multiplies with."""
    _require(weight.dim() == 2, "weight", f"must be [out, in], got {tuple(weight.shape)}")
    return cpu_linear.PlainWeight(weight) if _is_on_gpu(weight) else cpu_linear.pack(weight)


def pack_int8_weight(
    weight: torch.Tensor,
    scales: torch.Tensor,
    *,
    has_int8_inputs: bool = False,
    input_scale: float | None = None,
) -> PackedWeight:
    """int8 [out, in] with float32 scales [out], packed.

    On a processor inputs become int8 in any case, in small groups: see `reference.int8_linear`. On a GPU they stay as
    they are, for quality (`reference.weight_only_linear`), unless they are meant to be int8.

    Args:
        has_int8_inputs: whether the weight was made for inputs in int8, one scale a row: `reference.int8_row_linear`.
        input_scale: the scale of every row of these; None gives each row its own.

    Raises:
        ValueError: a shape or dtype that does not fit; names the argument.
    """
    _require(weight.dim() == 2 and weight.dtype == torch.int8, "weight", "must be int8 [out, in]")
    _require(weight.shape[1] <= MAX_INT8_IN, "weight", f"has {weight.shape[1]} inputs; sums hold {MAX_INT8_IN}")
    fits = scales.shape == weight.shape[:1] and scales.dtype == torch.float32
    _require(fits, "scales", "must be float32 [out]")
    if _is_on_gpu(weight):
        return triton_packed.pack_int8(weight, scales, has_int8_inputs=has_int8_inputs, input_scale=input_scale)
    return cpu_linear.pack_int8(weight, scales)


def pack_int4_weight(weight: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor) -> PackedWeight:
    """4-bit weights, packed: value = scale * weight + minimum.

    On a processor inputs become int8 in the same groups: see `reference.int4_linear`. On a GPU they stay as they are:
    see `reference.weight_only_linear`.

    Args:
        weight: uint8 in 0 .. 15 [out, in].
        scales, minima: [out, in / group_size]; kept as float16.

    Raises:
        ValueError: a shape or dtype that does not fit; names the argument.
    """
    _require(weight.dim() == 2 and weight.dtype == torch.uint8, "weight", "must be uint8 [out, in]")
    _require(scales.dim() == 2 and scales.shape[0] == weight.shape[0], "scales", "must be [out, groups]")
    _require(minima.shape == scales.shape, "minima", "must have the shape of scales")
    has_group_size = any(scales.shape[1] * size == weight.shape[1] for size in INT4_GROUP_SIZES)
    _require(has_group_size, "scales", f"must hold one per group of {INT4_GROUP_SIZES} of the {weight.shape[1]} inputs")
    if _is_on_gpu(weight):
        return triton_packed.pack_int4(weight, scales, minima)
    return cpu_linear.pack_int4(weight, scales, minima)


def pack_float8_weight(
    weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] | None = None
) -> PackedWeight:
    """float8 e4m3 [out, in] on a GPU, packed; see `reference.float8_linear`.

    Inputs become float8, too, where the GPU multiplies it.

    Args:
        scales: float32, [out], or one per block.
        block: outputs and inputs of a block, the latter a multiple of FLOAT8_BLOCK_IN; None with one scale per output.

    Raises:
        ValueError: a shape, dtype or device that does not fit; names the argument.
    """
    _require(_is_on_gpu(weight), "weight", f"must be on a CUDA device, not {weight.device}")
    fits = weight.dim() == 2 and weight.dtype == torch.float8_e4m3fn
    _require(fits, "weight", "must be float8_e4m3fn [out, in]")
    num_out, num_in = weight.shape
    shape: tuple[int, ...] = (num_out,)
    if block is not None:
        _require(block[1] % FLOAT8_BLOCK_IN == 0, "block", f"must hold a multiple of {FLOAT8_BLOCK_IN} inputs")
        shape = (-(-num_out // block[0]), -(-num_in // block[1]))
    _require(scales.shape == shape and scales.dtype == torch.float32, "scales", f"must be float32 {shape}")
    return triton_packed.pack_float8(weight, scales, block)


def packed_linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Linear layer on a packed weight: [T, in] -> [T, out].

    Args:
        bias: [out] float32.
        out_dtype: float32, bfloat16 or float16; None takes x's.

    Raises:
        ValueError: shapes that do not fit together; names the argument.
    """
    _require(x.dim() == 2 and x.shape[1] == weight.in_features, "x", f"must be [T, {weight.in_features}]")
    fits = bias is None or (bias.shape == (weight.out_features,) and bias.dtype == torch.float32)
    _require(fits, "bias", f"must be float32 [{weight.out_features}]")
    wanted = out_dtype or x.dtype
    if _is_on_gpu(x) or (x.dtype in NATIVE_DTYPES and wanted in NATIVE_DTYPES):
        return weight.linear(x, bias, wanted)
    return weight.linear(x.float(), bias, torch.float32).to(wanted)


def _check_caches(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
) -> None:
    """Both caches [N, P, K, D]; int8 ones with scales [N, P, K], others without."""
    _require(key_cache.shape == value_cache.shape, "value_cache", "must have key_cache's shape")
    for name, cache, scales in (("key", key_cache, key_scales), ("value", value_cache, value_scales)):
        if cache.dtype == torch.int8:
            fits = scales is not None and scales.shape == cache.shape[:3] and scales.dtype == torch.float32
            _require(fits, f"{name}_scales", "must be float32 [N, P, K] with an int8 cache")
        else:
            _require(scales is None, f"{name}_scales", f"go with an int8 cache, not {cache.dtype}")


def _check_heads(query: torch.Tensor, num_kv_heads: int, name: str) -> None:
    _require(query.dim() == 3, "query", f"must be [T, H, D], got {tuple(query.shape)}")
    fits = query.shape[1] % num_kv_heads == 0
    _require(fits, name, f"has {num_kv_heads} heads, which do not divide the {query.shape[1]} of query")


def _check_logits(logits: torch.Tensor) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be [R, V], got {tuple(logits.shape)}")


def _check_per_row(x: torch.Tensor, name: str, dtype: torch.dtype, logits: torch.Tensor) -> None:
    fits = x.shape == logits.shape[:1] and x.dtype == dtype and x.device == logits.device
    _require(fits, name, f"must be {dtype} [{logits.shape[0]}] on {logits.device}")


def _require(ok: bool, name: str, problem: str) -> None:
    if not ok:
        raise ValueError(f"{name} {problem}")
