"""GGUF tensors under their Hugging Face names, in Hugging Face layout."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from apt_core.checkpoint.formats.gguf_q4 import q4_parts
from apt_core.checkpoint.gguf_file import GGUFFile, GGUFTensor
from apt_core.model_config import ModelConfig

_MODEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_DERIVED = frozenset({"rope_freqs.weight"})
"""Not parameters: config.json's rope parameters say the same."""
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


@dataclass(frozen=True)
class HFTensor:
    """A tensor of a GGUF as it will be under its Hugging Face name."""

    name: str
    source: GGUFTensor
    num_permuted_heads: int = 0
    """Heads whose rows llama.cpp has reordered; 0 for a tensor it leaves alone."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, in either layout."""
        return self.source.shape

    def values(self) -> npt.NDArray[np.float32]:
        """Dequantized, in Hugging Face's order of rows."""
        return self._ordered(self.source.dequantize())

    def q4_parts(self) -> dict[str, npt.NDArray[Any]]:
        """Its own 4-bit values by name, if it is a linear layer's matrix that has such; see formats/gguf_q4.py."""
        module = self.name.removesuffix(".weight")
        parts = q4_parts(module, self.source.stored.tensor_type, self.source.stored.data)
        return {f"{module}.{part}": np.ascontiguousarray(self._ordered(values)) for part, values in parts.items()}

    def _ordered(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return unpermute(values, self.num_permuted_heads) if self.num_permuted_heads else values


def hf_tensors(file: GGUFFile, config: ModelConfig) -> Iterator[HFTensor]:
    """All parameters of a file.

    Raises:
        CheckpointError: a tensor has a name that no parameter of the model has, or cannot be split into heads.
    """
    for tensor in file.tensors.values():
        if tensor.name in _DERIVED:
            continue
        name = _hf_name(tensor.name)
        if name is None:
            raise file.metadata.error(tensor.name, f"unexpected tensor in a model of {config.architecture}")
        heads = _num_permuted_heads(file, config, name)
        if heads and tensor.shape[0] % (2 * heads):
            raise file.metadata.error(tensor.name, f"{tensor.shape[0]} rows cannot be split into {heads} heads")
        yield HFTensor(name, tensor, heads)


def unpermute(values: npt.NDArray[Any], num_heads: int) -> npt.NDArray[Any]:
    """Undo llama.cpp's reordering of the rows of q and k (convert_hf_to_gguf.py, LlamaModel.permute).

    llama.cpp rotates neighbouring dimensions (0, 1), (2, 3) of a head, Hugging Face dimensions half a head apart.

    Args:
        values: [H * D, C] or, for a bias, [H * D], with the two halves of each head interleaved.
        num_heads: H.

    Returns:
        The same shape with the two halves of each head one after the other.
    """
    halves = values.reshape(num_heads, values.shape[0] // num_heads // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def _hf_name(name: str) -> str | None:
    if name in _MODEL_NAMES:
        return _MODEL_NAMES[name]
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in _BLOCK_NAMES:
        return None
    return f"model.layers.{match[1]}.{_BLOCK_NAMES[match[2]]}.{match[3]}"


def _num_permuted_heads(file: GGUFFile, config: ModelConfig, name: str) -> int:
    """Only the llama architecture is stored permuted: the others use llama.cpp's second kind of rope."""
    if file.architecture != "llama":
        return 0
    if ".q_proj." in name:
        return config.num_heads
    return config.num_kv_heads if ".k_proj." in name else 0
