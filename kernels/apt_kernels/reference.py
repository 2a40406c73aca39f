"""Every op in plain PyTorch: specification, test oracle, benchmark baseline and last resort.

Shapes: T packed tokens, B sequences, H query heads, K kv heads, D head_dim, C hidden size, N blocks, P block size.
Written for clarity; all of it is differentiable except `store_kv`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

INT8_INPUT_GROUP = 32
"""Inputs that share a scale in a product with int8 weights."""
FP8 = torch.float8_e4m3fn
"""The 8-bit float a KV cache may be in, without scales: a float carries its own, and one more would not make it finer.
What needs numbers beyond 448 takes int8, which has scales and smaller errors; fp8 takes less work to read."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm (arXiv 1910.07467) over the last dimension, in at least float32: [..., C] -> [..., C]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype)


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The new residual stream x + residual, and its RMSNorm: (normed, residual), both [T, C]."""
    residual = x + residual
    return rms_norm(residual, weight, eps), residual


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each head by its position (arXiv 2104.09864), halves paired as in Hugging Face checkpoints.

    Args:
        x: [T, heads, D].
        cos, sin: [T, D/2], of x's dtype.
    """
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    """Write each token's key and value [T, K, D] into its slot of the caches [N, P, K, D]; slot -1 is skipped.

    A cache in FP8 keeps the nearest number it has, of what lies beyond its range the largest.

    Args:
        key_scales, value_scales: float32 [N, P, K] of int8 caches: each token's head is its scale times its integers,
            the largest magnitude at 127.
    """
    is_stored = slot_mapping >= 0
    if not bool(is_stored.all()):
        slot_mapping, key, value = slot_mapping[is_stored], key[is_stored], value[is_stored]
    places = (slot_mapping // key_cache.shape[1], slot_mapping % key_cache.shape[1])
    for x, cache, scales in ((key, key_cache, key_scales), (value, value_cache, value_scales)):
        if cache.dtype == FP8:
            largest = torch.finfo(FP8).max
            cache[places] = x.clamp(-largest, largest).to(FP8)
        elif scales is None:
            cache[places] = x
        else:
            integers, x_scales = quantize_rows(x.flatten(0, 1), x.shape[2])
            cache[places] = integers.view(x.shape).to(cache.dtype)
            scales[places] = x_scales.view(x.shape[:2])


def dequantize_kv(cache: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Keys or values [..., D] of int8, with scales [...], or of FP8 in dtype; those of any other dtype as they are."""
    if scales is None:
        return cache.to(dtype) if cache.dtype == FP8 else cache
    return (cache.float() * scales.unsqueeze(-1)).to(dtype)


def rope_and_store_kv(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    num_heads: int,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    eps: float,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """From the projections of packed tokens to rotated queries, with keys and values stored.

    Args:
        qkv: [T, (H + 2 K) D]: all query heads, then all key heads, then all value heads.
        cos, sin: [T, D/2], of qkv's dtype.
        key_cache, value_cache: [N, P, K, D]. slot_mapping: [T] int64; slot -1 is skipped.
        query_weight, key_weight: [D], of the RMSNorm before the rotation (Qwen 3); None without one. eps: theirs.
        key_scales, value_scales: of int8 caches, see `store_kv`.

    Returns:
        The rotated queries [T, H, D].
    """
    num_kv_heads, head_dim = key_cache.shape[2:]
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
    query, key, value = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if query_weight is not None and key_weight is not None:
        query, key = rms_norm(query, query_weight, eps), rms_norm(key, key_weight, eps)
    store_kv(apply_rope(key, cos, sin), value, key_cache, value_cache, slot_mapping, key_scales, value_scales)
    return apply_rope(query, cos, sin)


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
    window: int | None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """Causal attention of packed queries over a paged KV cache, prefill and decode mixed.

    The q queries of a sequence are the last q of its context: query i sees keys 0 .. context_len - q + i.

    Args:
        query: [T, H, D].
        key_cache, value_cache: [N, P, K, D]; H is a multiple of K.
        cu_seqlens_q: [B+1] int32. context_lens: [B] int32. block_tables: [B, max_blocks] int32.
        scale: multiplies the scores. window: a query sees at most this many keys, itself included.
        key_scales, value_scales: of int8 caches, see `store_kv`.
        soft_cap: scaled scores become soft_cap * tanh(score / soft_cap) (Gemma 2, arXiv 2408.00118).

    Returns:
        [T, H, D].
    """
    block_size = key_cache.shape[1]
    out = torch.empty_like(query)
    starts, contexts = cu_seqlens_q.tolist(), context_lens.tolist()
    for b, context_len in enumerate(contexts):
        blocks = block_tables[b, : -(-context_len // block_size)].long()
        keys, values = (
            dequantize_kv(cache[blocks], None if scales is None else scales[blocks], torch.float32)
            for cache, scales in ((key_cache, key_scales), (value_cache, value_scales))
        )
        keys, values = (x.flatten(0, 1)[:context_len] for x in (keys, values))
        rows = slice(starts[b], starts[b + 1])
        out[rows] = _attend(query[rows], keys, values, scale, window, soft_cap)
    return out


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Causal attention within each packed sequence, without a cache: q [T, H, D], k and v [T, K, D] -> [T, H, D]."""
    bounds = cu_seqlens.tolist()
    spans = [slice(start, end) for start, end in pairwise(bounds)]
    return torch.cat([_attend(query[s], key[s], value[s], scale, window) for s in spans])


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """SwiGLU's gate (arXiv 2002.05202): silu(gate) * up, gate and up side by side: [T, 2 I] -> [T, I]."""
    return gated_silu(*gate_up.chunk(2, dim=-1))


def gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, [T, I] each."""
    return F.silu(gate) * up


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore_index: int, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over tokens of the cross-entropy of the logits hidden @ weight.T, and how many tokens count.

    Args:
        hidden: [T, C]. weight: [V, C].
        targets: [T] int64; tokens whose target is ignore_index do not count.
        z_loss: adds so much of the square of each token's logsumexp (arXiv 2204.02311), which keeps logits near 0.

    Returns:
        The sum [] in at least float32, and the number [] int64. The caller divides, by the tokens of all its devices.
    """
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    is_ignored = targets == ignore_index
    chosen = logits.gather(1, targets.masked_fill(is_ignored, 0).unsqueeze(1)).squeeze(1)
    logsumexp = logits.logsumexp(-1)
    losses = logsumexp - chosen + z_loss * logsumexp.square()
    return losses.masked_fill(is_ignored, 0).sum(), (~is_ignored).sum()


def int8_linear(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    """Linear layer on int8 weights [out, in], one scale [out] each, with x [T, in] in int8.

    x has a scale per row and INT8_INPUT_GROUP inputs, whose sums are exact integers. One scale for a whole row would be
    faster, but its outliers would cost several per cent of perplexity.
    """
    values, x_scales = quantize_rows(x, INT8_INPUT_GROUP)
    groups = F.pad(weight, (0, -weight.shape[1] % INT8_INPUT_GROUP)).unflatten(1, (-1, INT8_INPUT_GROUP))
    sums = torch.einsum("tgk,ogk->tgo", values.double(), groups.double())
    out = (sums * x_scales).sum(1).float() * scales
    return (out if bias is None else out + bias).to(out_dtype)


def int4_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    minima: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Linear layer on 4-bit weights, see `dequantize_int4`, with x [T, in] in int8, one scale per row and group."""
    values, x_scales = quantize_rows(x, weight.shape[1] // scales.shape[1])
    wide = (values.double() * x_scales.double()).flatten(1)
    out = wide @ dequantize_int4(weight, scales, minima, torch.float64).T
    return (out if bias is None else out + bias).to(out_dtype)


def weight_only_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    """Linear layer on a dequantized weight [out, in], with x [T, in] as it is; sums are float64, rounded once."""
    out = x.double() @ weight.double().T
    return (out if bias is None else out + bias).to(out_dtype)


def int8_row_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    input_scale: float | None = None,
) -> torch.Tensor:
    """Linear layer on int8 weights [out, in], one scale [out] each, with x [T, in] in int8, one scale per row.

    Args:
        input_scale: of every row; what it does not reach is cut off. None gives each row its own.
    """
    if input_scale is None:
        values, row_scales = (part.squeeze(1) for part in quantize_rows(x, x.shape[1]))
    else:
        scale = torch.tensor(input_scale, dtype=torch.float32, device=x.device)
        values = (x.float() * scale.reciprocal()).clamp(-127, 127).round()
        row_scales = torch.where(x.isfinite().all(1, keepdim=True), scale, torch.nan)
    return weight_only_linear(
        values.double() * row_scales, dequantize_int8(weight, scales, torch.float64), bias, out_dtype
    )


def float8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    *,
    block: tuple[int, int] | None,
    quantizes_x: bool,
) -> torch.Tensor:
    """Linear layer on float8 e4m3 weights, see `dequantize_float8`, with x [T, in] in float8 as well or as it is.

    Args:
        block: None with one scale per output.
        quantizes_x: whether x becomes float8 e4m3 too, the largest magnitude of each row at 448.
    """
    values = dequantize_float8(weight, scales, block or (1, weight.shape[1]), torch.float64)
    if quantizes_x:
        largest = x.float().abs().amax(1, keepdim=True)
        inverse = torch.where(largest == 0, torch.zeros_like(largest), torch.full_like(largest, 448).div(largest))
        x = (x.float() * inverse).clamp(-448, 448).to(torch.float8_e4m3fn).double() * (largest / 448)
    return weight_only_linear(x, values, bias, out_dtype)


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """[R, V] -> [R] int64: the first of the largest logits; NaN is larger than everything else."""
    return logits.argmax(-1)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """Draw one token a row from softmax(logits / temperature), less what min_p, then top_k, then top_p leave out.

    The best tokens are kept: those with the largest logits, of equal ones those with the lower ids. min_p keeps what is
    at least this likely relative to the best token (arXiv 2407.01082), top_k so many, and top_p the fewest that have
    this share of the probability that the other two left (nucleus, arXiv 1904.09751); one token always stays. Drawn is
    the token at which the kept probabilities, summed up in the order of the ids, exceed `uniform` times their sum.

    A row whose temperature is 0, or whose largest logit is not finite, gets its `argmax`.

    Args:
        logits: [R, V].
        temperature: [R] float32. top_k: [R] int64; 0 keeps all. top_p, min_p: [R] float32; 1 and 0 keep all.
        uniform: [R] float64 in [0, 1).

    Returns:
        [R] int64.
    """
    token_ids = argmax(logits)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    rows = ((temperature > 0) & wide.amax(-1).isfinite()).nonzero().squeeze(1)
    wide, temperature, top_k = wide[rows], temperature[rows].unsqueeze(1), top_k[rows].unsqueeze(1)
    top_p, min_p = top_p[rows].unsqueeze(1).double(), min_p[rows].unsqueeze(1).double()

    ordered, ids = wide.sort(dim=-1, descending=True, stable=True)
    best = ordered[:, :1]
    weights = ((ordered - best) / temperature).exp().double()
    rank = torch.arange(wide.shape[1], device=wide.device)
    kept = ordered >= (best + temperature * min_p.log()).to(wide.dtype)
    kept &= (top_k == 0) | (rank < top_k)
    weights *= kept
    before = weights.cumsum(-1) - weights
    weights *= (top_p == 1) | (before < top_p * weights.sum(-1, keepdim=True)) | (rank == 0)

    cumulative = torch.zeros_like(weights).scatter_(1, ids, weights).cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform[rows].unsqueeze(1) * cumulative[:, -1:], right=True)
    token_ids[rows] = drawn.squeeze(1).clamp_(max=wide.shape[1] - 1)
    return token_ids


def top_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities, in at least float32, of the given tokens and of the most likely ones, equal ones by their ids.

    A row whose largest logit is not finite has none: they are NaN.

    Args:
        logits: [R, V]. token_ids: [R] int64. num_top: how many of the most likely tokens.

    Returns:
        Log-probabilities of token_ids [R], and of the best tokens [R, num_top], whose ids are the third [R, num_top].
    """
    logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    chosen = logprobs.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    best = logits.argsort(dim=-1, descending=True, stable=True)[:, :num_top]
    return chosen, logprobs.gather(1, best), best


def quantize_rows(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, in] in groups of its last dimension as int8 times a scale: ([T, groups, size] integers, [T, groups, 1]).

    The largest magnitude of a group becomes 127; values are float32, since a NaN stays one. A last group that is too
    short is filled with zeros.
    """
    groups = F.pad(x.float(), (0, -x.shape[1] % group_size)).unflatten(-1, (-1, group_size))
    largest = groups.abs().amax(-1, keepdim=True)
    # Not 127 / largest, which torch computes as 127 * (1 / largest): halves would round differently.
    inverse = torch.where(largest == 0, torch.zeros_like(largest), torch.full_like(largest, 127).div(largest))
    return (groups * inverse).round(), largest / 127


def dequantize_int8(weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """int8 [out, in] and scales [out]: value = scale * weight."""
    return weight.to(dtype) * scales.to(dtype).unsqueeze(1)


def dequantize_int4(
    weight: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """uint8 in 0 .. 15 [out, in]; scales and minima [out, groups]: value = scale * weight + minimum.

    The algebra of GGUF's Q4_0 and Q4_1, AWQ and GPTQ.
    """
    groups = weight.to(dtype).unflatten(1, (scales.shape[1], -1))
    values: torch.Tensor = groups * scales.to(dtype).unsqueeze(2) + minima.to(dtype).unsqueeze(2)
    return values.flatten(1)


def dequantize_float8(
    weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """float8 [out, in], one scale per block of outputs and inputs, the last blocks cut off: value = scale * weight."""
    rows, columns = (
        torch.arange(size, device=weight.device) // step for size, step in zip(weight.shape, block, strict=True)
    )
    per_weight = scales.reshape(-(-weight.shape[0] // block[0]), -1)[rows][:, columns]
    return weight.to(dtype) * per_weight.to(dtype)


def causal_mask(num_queries: int, context_len: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[num_queries, context_len] bool, True where a query may look; queries are the last of the context."""
    q_pos = torch.arange(context_len - num_queries, context_len, device=device).unsqueeze(1)
    k_pos = torch.arange(context_len, device=device).unsqueeze(0)
    mask = k_pos <= q_pos
    return mask if window is None else mask & (k_pos > q_pos - window)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """One sequence: q [t, H, D] over k, v [L, K, D]; scores and softmax in at least float32."""
    group = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.repeat_interleave(group, dim=1).to(wide) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.to(wide), k) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores.masked_fill(~causal_mask(q.shape[0], k.shape[0], window, q.device), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(q.dtype)
