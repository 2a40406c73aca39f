"""GGUF metadata restated as the config.json and generation_config.json that the model would have on Hugging Face.

Keys: ggml-org/ggml docs/gguf.md; their use: llama.cpp src/llama-model.cpp and conversion scripts.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from apt_core.checkpoint.gguf_file import GGUFFile
from apt_core.document import Document

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_ROPE_FREQS = "rope_freqs.weight"
_LLAMA3_LOW_FREQ_FACTOR = 1.0
_LLAMA3_HIGH_FREQ_FACTOR = 4.0
_LLAMA3_ORIGINAL_LENGTHS = tuple(2**power for power in range(10, 21))


def hf_config(file: GGUFFile) -> dict[str, Any]:
    """The config.json of a file's model.

    Raises:
        CheckpointError: the architecture is unknown, a key is missing, or it asks for what no model here does.
    """
    if file.architecture not in _ARCHITECTURES:
        supported = ", ".join(_ARCHITECTURES)
        raise file.metadata.error(
            "general.architecture", f"{file.architecture!r} is not supported; supported are {supported}"
        )
    keys = _architecture_keys(file)
    if keys.integer("expert_count", 0, minimum=0):
        raise keys.error("expert_count", "mixtures of experts are not supported")
    hidden_size = keys.integer("embedding_length")
    num_heads = keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", hidden_size // num_heads)
    _check_head_sizes(keys, head_dim)
    return {
        "architectures": [_ARCHITECTURES[file.architecture]],
        "vocab_size": _vocab_size(file),
        "hidden_size": hidden_size,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": _shortest(keys.number("attention.layer_norm_rms_epsilon")),
        "rope_parameters": _rope_parameters(file, keys, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": file.architecture == "llama" and "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "torch_dtype": "float32",
    } | _sliding_window(file, keys)


def hf_generation_config(file: GGUFFile) -> dict[str, Any]:
    """The generation_config.json of a file's model.

    A GGUF names one end-of-sequence token and, in some files, the end-of-turn and end-of-message tokens that chat
    models emit; all of them end a generation. Other tokens that merely look like an end are left alone, as in the
    generation_config.json of the models these files were made from.
    """
    metadata = file.metadata
    ends = [f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom")]
    eos = dict.fromkeys(metadata.integer(key, minimum=0) for key in ends if metadata.has(key))
    bos = "tokenizer.ggml.bos_token_id"
    return {
        "eos_token_id": list(eos) or None,
        "bos_token_id": metadata.integer(bos, minimum=0) if metadata.has(bos) else None,
    }


def _architecture_keys(file: GGUFFile) -> Document:
    """The metadata under the architecture's prefix, without it."""
    prefix = f"{file.architecture}."
    values = {key.removeprefix(prefix): value for key, value in file.metadata.values.items() if key.startswith(prefix)}
    return Document(values, file.metadata.file, prefix)


def _check_head_sizes(keys: Document, head_dim: int) -> None:
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise keys.error("attention.value_length", f"differs from the key length {head_dim}, which is not supported")
    if keys.integer("rope.dimension_count", head_dim) != head_dim:
        raise keys.error("rope.dimension_count", f"rotary embedding of a part of the {head_dim} dimensions of a head")


def _vocab_size(file: GGUFFile) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise file.metadata.error("token_embd.weight", "the tensor is missing")
    return embedding.shape[0]


def _sliding_window(file: GGUFFile, keys: Document) -> dict[str, Any]:
    """Mistral files say that they are llama; a window gives them away."""
    window = keys.integer("attention.sliding_window", 0, minimum=0)
    if not window:
        return {}
    if file.architecture == "llama":
        return {"architectures": ["MistralForCausalLM"], "sliding_window": window}
    return {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}


def _rope_parameters(file: GGUFFile, keys: Document, head_dim: int) -> dict[str, Any]:
    theta = _shortest(keys.number("rope.freq_base", 10000.0))
    kind = keys.text("rope.scaling.type", "linear" if keys.has("rope.scale_linear") else "none")
    if _ROPE_FREQS in file.tensors:
        if kind != "none":
            raise keys.error("rope.scaling.type", f"{kind!r} together with {_ROPE_FREQS} is not supported")
        return _llama3_parameters(file, theta, head_dim)
    factor = _shortest(keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0)))
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if kind == "yarn":
        return {"rope_type": "yarn", "rope_theta": theta, "factor": factor} | _yarn_parameters(keys, factor)
    raise keys.error("rope.scaling.type", f"{kind!r} is not supported; supported are none, linear, yarn")


def _yarn_parameters(keys: Document, factor: float) -> dict[str, Any]:
    """llama.cpp multiplies its own 0.1 ln(factor) + 1 by yarn_attn_factor; config.json states the product."""
    parameters: dict[str, Any] = {
        "beta_fast": _shortest(keys.number("rope.scaling.yarn_beta_fast", 32.0)),
        "beta_slow": _shortest(keys.number("rope.scaling.yarn_beta_slow", 1.0)),
    }
    if keys.has("rope.scaling.original_context_length"):
        parameters["original_max_position_embeddings"] = keys.integer("rope.scaling.original_context_length")
    if keys.has("rope.scaling.yarn_attn_factor"):
        own = _shortest(keys.number("rope.scaling.yarn_attn_factor"))
        parameters["attention_factor"] = own * (0.1 * math.log(factor) + 1.0)
    return parameters


def _llama3_parameters(file: GGUFFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's scaling from the divisors of each frequency that llama.cpp stores in its place.

    The divisors follow from five parameters, of which the factor is the largest divisor and the two bounds are the same
    in every published model. So the parameters are sought that give these divisors, which keeps one way of stating
    scaling; divisors that none give are refused, never approximated.
    """
    divisors = file.tensors[_ROPE_FREQS].dequantize().ravel()
    for length in _LLAMA3_ORIGINAL_LENGTHS:
        parameters = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": float(divisors.max()),
            "low_freq_factor": _LLAMA3_LOW_FREQ_FACTOR,
            "high_freq_factor": _LLAMA3_HIGH_FREQ_FACTOR,
            "original_max_position_embeddings": length,
        }
        expected = _llama3_divisors(parameters, head_dim)
        if expected.shape == divisors.shape and np.allclose(expected, divisors, rtol=1e-4):
            return parameters
    raise file.metadata.error(_ROPE_FREQS, "these frequency factors are not those of Llama 3's rope scaling")


def _llama3_divisors(parameters: dict[str, Any], head_dim: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """What each frequency is divided by (transformers modeling_rope_utils.py, llama3), [head_dim / 2]."""
    wavelengths = 2 * math.pi * parameters["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    kept = (parameters["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    kept = np.clip(kept, 0.0, 1.0)
    divisors: np.ndarray[tuple[int], np.dtype[np.float64]] = 1 / ((1 - kept) / parameters["factor"] + kept)
    return divisors


def _shortest(value: float) -> float:
    """The float32 of a metadata value as the decimal it was written from: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
