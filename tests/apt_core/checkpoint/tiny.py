"""Tiny random checkpoints: Hugging Face folders written by transformers, GGUF files written by the gguf package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog isn't amused; it's 12345 o'clock.",
    "def f(x):\n    return x ** 2  # squares\n\n\nprint(f(10))\n",
    "Zażółć gęślą jaźń. Größe, naïve café, 日本語のテキスト, русский текст, 1234567890",
    "I'll THEY'LL we've you're   spaces   \t tabs\r\nand\n\nnewlines",
] * 4
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"

SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}


def byte_level_bpe(vocab_size: int = 400) -> Tokenizer:
    """A small byte-level BPE vocabulary with three special tokens in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def bpe_parts(tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """Tokens by id, and merges as GGUF spells them."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return sorted(vocabulary, key=vocabulary.__getitem__), [" ".join(merge) for merge in merges]


def hf_model(family: str, **config: Any) -> transformers.PreTrainedModel:
    """A model of random weights, of which no two tensors are equal (norms and biases included)."""
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**(SHAPE | config)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def save_folder(folder: Path, family: str = "llama", *, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """Save a model with a tokenizer and a chat template; returns the model."""
    model = hf_model(family, **config).to(dtype)
    model.save_pretrained(folder)
    byte_level_bpe().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return model


def permute(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's reordering of q and k rows: the halves of a head [H, 2, D/2] become pairs [H, D/2, 2]."""
    rows = np.arange(weights.shape[0]).reshape(num_heads, 2, -1)
    return weights[rows.transpose(0, 2, 1).reshape(-1)]


_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(hf_name: str) -> str:
    """blk.0.attn_q.weight for model.layers.0.self_attn.q_proj.weight."""
    stem, _, kind = hf_name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{_NAMES[part]}.{kind}"
    return f"{_NAMES[stem]}.{kind}"


def write_gguf(
    path: Path,
    model: transformers.PreTrainedModel,
    *,
    arch: str = "llama",
    quant: GGMLQuantizationType = GGMLQuantizationType.F32,
    extra: dict[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    tensors: dict[str, np.ndarray] | None = None,
    tokenizer: str | None = "gpt-2",
) -> Path:
    """Write a model as llama.cpp's converter does.

    Args:
        extra: metadata to add or replace, by key without the architecture's prefix.
        drop: metadata keys and tensors to leave out.
        tensors: further tensors.
        tokenizer: tokenizer.ggml.pre, or None for a file without a tokenizer.
    """
    writer = GGUFWriter(path, arch)
    config = model.config
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim if hasattr(config, "head_dim") else None,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    } | (extra or {})
    for key, value in keys.items():
        if value is None or key in drop:
            continue
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{arch}.{key}", value)
    if tokenizer is not None:
        add_tokenizer(writer, byte_level_bpe(), pre=tokenizer)
    for name, tensor in model.state_dict().items():
        if gguf_name(name) in drop or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        values = tensor.float().numpy()
        if arch == "llama" and ".q_proj." in name:
            values = permute(values, config.num_attention_heads)
        if arch == "llama" and ".k_proj." in name:
            values = permute(values, config.num_key_value_heads)
        kind = quant if values.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name), quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    finish(writer)
    return path


def add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer, *, pre: str, **types: TokenType) -> None:
    """Add a byte-level BPE; ``types`` gives further tokens, by text, after the vocabulary."""
    tokens, merges = bpe_parts(tokenizer)
    kinds = [TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *types])
    writer.add_token_types([*kinds, *types.values()])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)


def finish(writer: GGUFWriter) -> None:
    """Write what was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
