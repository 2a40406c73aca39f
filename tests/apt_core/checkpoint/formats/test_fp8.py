"""Hugging Face's fp8 checkpoints, made by plain torch conversions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from apt_core.checkpoint import open_checkpoint
from apt_core.errors import CheckpointError
from tests.apt_core.checkpoint.quantized import (
    Layer,
    Saved,
    assert_close_in_own_format,
    assert_exact_in_float32,
    load_model,
    save_quantized,
)

PART = "model.layers.1.mlp.up_proj"


def save(folder: Path, block: tuple[int, int] | None, *, scale: str = "weight_scale_inv", **settings: Any) -> Saved:
    def quantize(module: str, num_out: int, num_in: int, generator: torch.Generator) -> Layer | None:
        if module in ("lm_head", "model.layers.0.mlp.down_proj"):
            return None
        rows, columns = block or (num_out, num_in)
        values = torch.randn(num_out, num_in, generator=generator).to(torch.float8_e4m3fn)
        scales = torch.rand(-(-num_out // rows), -(-num_in // columns), generator=generator) * 0.1 + 0.05
        weight = torch.empty(num_out, num_in)
        for i in range(num_out):
            for j in range(0, num_in, columns):
                weight[i, j : j + columns] = values[i, j : j + columns].float() * scales[i // rows, j // columns]
        return Layer({"weight": values, scale: scales if block else scales.reshape(())}, weight)

    config = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block) if block else None,
    }
    return save_quantized(folder, config | settings, quantize)


@pytest.mark.parametrize(
    ("block", "scale"),
    [
        ((128, 128), "weight_scale_inv"),
        ((96, 48), "weight_scale_inv"),
        (None, "weight_scale_inv"),
        (None, "weight_scale"),
    ],
)
def test_logits(block: tuple[int, int] | None, scale: str, tmp_path: Path) -> None:
    saved = save(tmp_path, block, scale=scale)
    assert_exact_in_float32(saved)
    # The layer that was left alone keeps its own precision.
    assert_close_in_own_format(saved, {"Bf16Weight", "OneDnnWeight"}, most=0.01)


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"fmt": "e5m2"}, "fmt"), ({"weight_block_size": [128]}, "weight_block_size")],
)
def test_settings_that_are_not_read(settings: dict[str, Any], field: str, tmp_path: Path) -> None:
    saved = save(tmp_path, None)
    saved.edit_config(lambda config: config["quantization_config"].update(settings))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(saved.folder))
    assert caught.value.field == f"quantization_config.{field}"


def test_float8_without_its_scale_is_refused(tmp_path: Path) -> None:
    saved = save(tmp_path, (128, 128))
    saved.edit(lambda tensors: tensors.pop(f"{PART}.weight_scale_inv"))
    with pytest.raises(CheckpointError, match="is missing") as caught:
        load_model(saved.folder, None)
    assert caught.value.field == f"{PART}.weight_scale_inv"


@pytest.mark.parametrize("wrong", [torch.ones(3, 1), torch.ones(2), torch.full((2, 1), torch.inf)])
def test_scales_that_do_not_fit_are_refused(wrong: torch.Tensor, tmp_path: Path) -> None:
    saved = save(tmp_path, (128, 128))
    saved.edit(lambda tensors: tensors.update({f"{PART}.weight_scale_inv": wrong}))
    with pytest.raises(CheckpointError) as caught:
        load_model(saved.folder, None)
    assert caught.value.field == f"{PART}.weight_scale_inv"


def test_float8_in_a_checkpoint_that_declares_nothing_is_refused(tmp_path: Path) -> None:
    saved = save(tmp_path, None)
    saved.edit_config(lambda config: config.pop("quantization_config"))
    saved.edit(lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith("_inv")])
    with pytest.raises(CheckpointError, match="16 bits or more"):
        load_model(saved.folder, None)
