"""A tiny random model whose activations have outliers, and a text for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from apt_core.checkpoint import Checkpoint, load_into, open_checkpoint
from apt_core.models.decoder import DecoderForCausalLM
from apt_core.registry import build_model
from apt_train.quantize import QuantizationReport, QuantizeSettings, TextSettings, quantize
from apt_train.quantize.simulate import simulate
from tests.apt_core.checkpoint.tiny import CORPUS, save_folder

SHAPE = {"hidden_size": 128, "intermediate_size": 192}
"""Groups of 64 divide all inputs; heads of 32 share values two by two."""
OUTLIERS = [3, 77]


def save_model(folder: Path, family: str = "llama", **config: Any) -> Path:
    """Weights of about 0.1, norms before products about 1, two channels thirty times as large as the others."""
    model = save_folder(folder, family, **(SHAPE | config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter.div_(10).add_(1)
                parameter[OUTLIERS] *= 30
            elif "norm" not in name:
                parameter.div_(10)
    model.save_pretrained(folder)
    return folder


def save_text(folder: Path) -> str:
    """Some thousand tokens."""
    path = folder / "text.txt"
    path.write_text("\n".join(f"{i}: {line}" for i, line in enumerate(CORPUS * 4)), encoding="utf-8")
    return str(path)


def settings(folder: Path, **others: Any) -> QuantizeSettings:
    """With few short windows."""
    text = TextSettings(save_text(folder), windows=8, length=32)
    return QuantizeSettings(**({"calibration": text, "evaluation": text} | others))


def quantized(folder: Path, source: Path, output: str = "out", **others: Any) -> QuantizationReport:
    """Write a folder within another."""
    return quantize(str(source), str(folder / output), settings(folder, **others))


def loaded(checkpoint: Checkpoint) -> DecoderForCausalLM:
    """As a server computes, in float32."""
    model = build_model(checkpoint.config)
    load_into(
        model, checkpoint, dtype=torch.float32, device=torch.device("cpu"), keeps_quantized=checkpoint.is_quantized
    )
    simulate(model)
    return model.eval().requires_grad_(False)


def open_output(folder: Path) -> Checkpoint:
    return open_checkpoint(str(folder / "out"))
