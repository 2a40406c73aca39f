"""AWQ checkpoints, packed by hand from AutoAWQ's description of WQLinear_GEMM."""

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
    dequantized,
    load_model,
    pack_rows,
    random_codes,
    random_scales,
    random_zeros,
    save_quantized,
)

PART = "model.layers.1.mlp.up_proj"


def awq_pack(values: torch.Tensor) -> torch.Tensor:
    """[rows, out] -> [rows, out / 8]; a word's outputs 0, 2, 4, 6, 1, 3, 5, 7 from its lowest bits on."""
    return pack_rows(values.unflatten(1, (-1, 8))[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1), 4)


def save(folder: Path, group_size: int = 128, *, zeros: bool = True, family: str = "llama", **config: Any) -> Saved:
    def quantize(module: str, num_out: int, num_in: int, generator: torch.Generator) -> Layer | None:
        if module == "lm_head":
            return None
        num_groups = num_in // group_size if group_size > 0 else 1
        codes = random_codes(num_out, num_in, 4, generator)
        scales = random_scales(num_out, num_groups, 4, generator)
        zero = random_zeros(num_out, num_groups, 4, generator) if zeros else torch.full((num_out, num_groups), 8)
        parts = {"qweight": awq_pack(codes.T), "scales": scales.T}
        if zeros:
            parts["qzeros"] = awq_pack(zero.T)
        return Layer(parts, dequantized(codes, scales, zero))

    settings = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": zeros, "version": "gemm"}
    return save_quantized(folder, settings | config, quantize, family)


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("zeros", [True, False])
def test_logits(group_size: int, zeros: bool, tmp_path: Path) -> None:
    saved = save(tmp_path, group_size, zeros=zeros)
    assert_exact_in_float32(saved)
    assert_close_in_own_format(saved, {"Int4Weight"})


def test_biases_of_qwen2_are_kept(tmp_path: Path) -> None:
    saved = save(tmp_path, family="qwen2")
    assert_exact_in_float32(saved)
    assert_close_in_own_format(saved, {"Int4Weight"})


def test_the_first_versions_spelling_of_settings(tmp_path: Path) -> None:
    saved = save(tmp_path)
    old = {"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "version": "GEMM"}
    saved.edit_config(lambda config: config.update(quantization_config=old))
    assert_exact_in_float32(saved)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"bits": 3}, "bits"),
        ({"group_size": 48}, "group_size"),
        ({"group_size": 0}, "group_size"),
        ({"version": "gemv"}, "version"),
    ],
)
def test_settings_that_are_not_read(settings: dict[str, Any], field: str, tmp_path: Path) -> None:
    saved = save(tmp_path)
    saved.edit_config(lambda config: config["quantization_config"].update(settings))
    with pytest.raises(CheckpointError, match="not read") as caught:
        open_checkpoint(str(saved.folder))
    assert caught.value.field == f"quantization_config.{field}"
    assert caught.value.file == str(saved.folder / "config.json")


@pytest.mark.parametrize("part", ["qweight", "scales", "qzeros"])
def test_a_missing_part_is_named(part: str, tmp_path: Path) -> None:
    saved = save(tmp_path)
    saved.edit(lambda tensors: tensors.pop(f"{PART}.{part}"))
    with pytest.raises(CheckpointError, match="is missing") as caught:
        load_model(saved.folder, None)
    assert caught.value.field == f"{PART}.{part}"


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("qweight", torch.zeros(128, 32, dtype=torch.int64)),
        ("qweight", torch.zeros(128, dtype=torch.int32)),
        ("scales", torch.ones(2, 256)),
        ("scales", torch.ones(1, 256, dtype=torch.int32)),
        ("scales", torch.full((1, 256), float("nan"))),
        ("qzeros", torch.zeros(1, 31, dtype=torch.int32)),
    ],
)
def test_a_part_that_does_not_fit_is_named(part: str, wrong: torch.Tensor, tmp_path: Path) -> None:
    saved = save(tmp_path)
    saved.edit(lambda tensors: tensors.update({f"{PART}.{part}": wrong}))
    with pytest.raises(CheckpointError) as caught:
        load_model(saved.folder, None)
    assert caught.value.field == f"{PART}.{part}"
    assert caught.value.file == str(saved.folder / "model.safetensors")
