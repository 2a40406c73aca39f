"""Tiny quantized checkpoints of random codes, packed by plain loops, beside the same model with dequantized weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from apt_core.checkpoint import load_into, open_checkpoint
from apt_core.checkpoint.formats.stored_module import is_linear
from apt_core.layers.linear import PackedLinear
from apt_core.metadata import AttentionMetadata
from apt_core.models.decoder import DecoderForCausalLM, fuse_projections, pack_linears
from apt_core.quantization import WeightPrecision
from apt_core.registry import build_model
from apt_kernels.cpu import native
from tests.apt_core.checkpoint.tiny import save_folder

SHAPE = {"hidden_size": 128, "intermediate_size": 256}
"""Groups of 128 divide all inputs."""
CPU = torch.device("cpu")


@dataclass
class Layer:
    """One linear layer: its stored parts and what they stand for."""

    parts: dict[str, torch.Tensor]
    weight: torch.Tensor
    """[out, in] float32."""


@dataclass
class Saved:
    """A quantized folder and its plain twin."""

    folder: Path
    plain: Path

    def edit(self, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        """Change the stored tensors in place."""
        path = self.folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    def edit_config(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change config.json in place."""
        path = self.folder / "config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))


def save_quantized(
    folder: Path,
    quantization: dict[str, Any],
    quantize: Callable[[str, int, int, torch.Generator], Layer | None],
    family: str = "llama",
    **config: Any,
) -> Saved:
    """Replace the weights of a random model's linear layers.

    Args:
        quantization: config.json's quantization_config.
        quantize: makes a layer of its name, outputs and inputs; None leaves it as it is.
    """
    saved = Saved(folder / "quantized", folder / "plain")
    save_folder(saved.plain, family, **(SHAPE | config))
    shutil.copytree(saved.plain, saved.folder)
    plain = load_file(saved.plain / "model.safetensors")
    stored = dict(plain)
    generator = torch.Generator().manual_seed(1)
    for name, weight in list(plain.items()):
        module = name.removesuffix(".weight")
        if is_linear(module) and weight.dim() == 2 and (layer := quantize(module, *weight.shape, generator)):
            del stored[name]
            stored |= {f"{module}.{part}": tensor.contiguous() for part, tensor in layer.parts.items()}
            plain[name] = layer.weight
        elif name != "model.embed_tokens.weight":
            # Norms about 1 and small weights, so that errors do not grow from layer to layer.
            stored[name] = plain[name] = weight / 10 + ("norm" in name)
    save_file(plain, saved.plain / "model.safetensors")
    save_file(stored, saved.folder / "model.safetensors")
    saved.edit_config(lambda values: values.update(quantization_config=quantization))
    return saved


def load_model(
    folder: Path, precision: WeightPrecision | None, dtype: torch.dtype = torch.float32
) -> DecoderForCausalLM:
    """As the engine loads it."""
    checkpoint = open_checkpoint(str(folder))
    model = build_model(checkpoint.config)
    load_into(model, checkpoint, dtype=dtype, device=CPU, keeps_quantized=True)
    model.eval().requires_grad_(False)
    fuse_projections(model)
    pack_linears(model, precision)
    return model


@torch.inference_mode()
def logits(model: DecoderForCausalLM) -> torch.Tensor:
    """[T, V] of one sequence."""
    ids = torch.arange(3, 60)
    hidden = model(model.embed(ids), torch.arange(len(ids)), AttentionMetadata.for_full_sequences([len(ids)]))
    return model.logits(hidden).float()


def assert_exact_in_float32(saved: Saved) -> None:
    """With weight_precision float32, whatever the dtype of the rest, the model is the dequantized one bit for bit."""
    assert torch.equal(logits(load_model(saved.folder, "float32")), logits(load_model(saved.plain, "float32")))
    expected, found = (dict(open_checkpoint(str(path)).tensors()) for path in (saved.plain, saved.folder))
    assert found.keys() >= expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def assert_close_in_own_format(saved: Saved, forms: set[str], most: float = 0.05) -> None:
    """As it is stored, logits differ as far as inputs in int8 make them; every layer is in one of the forms."""
    model = load_model(saved.folder, None)
    projections = [module for module in model.model.layers.modules() if isinstance(module, PackedLinear)]
    assert len(projections) == 4 * model.config.num_layers
    if native.is_enabled():
        assert {type(module.weight).__name__ for module in projections} == forms
    expected, found = logits(load_model(saved.plain, "float32")), logits(model)
    assert (found - expected).norm() / expected.norm() < most


def pack_words(values: list[int], num_bits: int) -> list[int]:
    """Little by little: the first value in the lowest bits of the first signed 32-bit word."""
    words = []
    for first in range(0, len(values), 32 // num_bits):
        word = 0
        for i, value in enumerate(values[first : first + 32 // num_bits]):
            assert 0 <= value < 2**num_bits
            word |= value << (num_bits * i)
        words.append(word - 2**32 if word >= 2**31 else word)
    return words


def pack_rows(values: torch.Tensor, num_bits: int) -> torch.Tensor:
    """[rows, n] -> [rows, n * num_bits / 32] int32, each row by itself."""
    return torch.tensor([pack_words(row, num_bits) for row in values.tolist()], dtype=torch.int32)


def random_codes(num_out: int, num_in: int, num_bits: int, generator: torch.Generator) -> torch.Tensor:
    """[out, in] int64, every code."""
    return torch.randint(0, 2**num_bits, (num_out, num_in), generator=generator)


def random_zeros(num_out: int, num_groups: int, num_bits: int, generator: torch.Generator) -> torch.Tensor:
    """[out, groups] int64 about the middle of the codes."""
    middle = 2 ** (num_bits - 1)
    return torch.randint(middle - middle // 4, middle + middle // 4, (num_out, num_groups), generator=generator)


def random_scales(num_out: int, num_groups: int, num_bits: int, generator: torch.Generator) -> torch.Tensor:
    """[out, groups] float16, such that weights are about 0.1."""
    return ((torch.rand(num_out, num_groups, generator=generator) + 0.5) * 0.4 / 2**num_bits).half()


def dequantized(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, index: torch.Tensor | None = None
) -> torch.Tensor:
    """scale * (code - zero) in float32; codes [out, in], the others [out, groups]."""
    if index is None:
        index = torch.arange(codes.shape[1]) // (codes.shape[1] // scales.shape[1])
    return scales.float()[:, index] * (codes - zeros[:, index]).float()
