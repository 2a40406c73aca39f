"""GPTQ checkpoints, packed by hand from AutoGPTQ's description of its qlinear."""

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


def save(
    folder: Path,
    *,
    bits: int = 4,
    group_size: int = 128,
    is_symmetric: bool = False,
    layout: str = "gptq",
    is_act_order: bool = False,
    **settings: Any,
) -> Saved:
    def quantize(module: str, num_out: int, num_in: int, generator: torch.Generator) -> Layer | None:
        if module == "lm_head":
            return None
        size = group_size if group_size > 0 else num_in
        num_groups = num_in // size
        codes = random_codes(num_out, num_in, bits, generator)
        scales = random_scales(num_out, num_groups, bits, generator)
        zeros = random_zeros(num_out, num_groups, bits, generator)
        if is_symmetric:
            zeros = torch.full_like(zeros, 2 ** (bits - 1))
        index = torch.arange(num_in) // size
        if is_act_order:
            index = index[torch.randperm(num_in, generator=generator)]
        parts = {
            "qweight": pack_rows(codes, bits).T,
            "qzeros": pack_rows(zeros.T - (1 if layout == "gptq" else 0), bits),
            "scales": scales.T,
            "g_idx": index.int(),
        }
        if module.endswith("o_proj"):
            parts["bias"] = torch.zeros(num_out)  # which AutoGPTQ writes where the model has none
        return Layer(parts, dequantized(codes, scales, zeros, index))

    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": is_symmetric,
        "desc_act": is_act_order,
        "checkpoint_format": layout,
    }
    return save_quantized(folder, config | settings, quantize)


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("is_symmetric", "group_size"), [(True, 128), (False, 32), (False, 64), (True, -1)])
def test_logits_of_4_bits(layout: str, is_symmetric: bool, group_size: int, tmp_path: Path) -> None:
    saved = save(tmp_path, layout=layout, is_symmetric=is_symmetric, group_size=group_size)
    assert_exact_in_float32(saved)
    assert_close_in_own_format(saved, {"Int4Weight"})


@pytest.mark.parametrize(("group_size", "form"), [(-1, "Int8Weight"), (32, "Bf16Weight")])
def test_logits_of_8_bits(group_size: int, form: str, tmp_path: Path) -> None:
    """One scale an output is int8's own; groups have no product."""
    saved = save(tmp_path, bits=8, group_size=group_size, is_symmetric=True)
    assert_exact_in_float32(saved)
    assert_close_in_own_format(saved, {form})


def test_act_order_is_dequantized_with_one_log_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = save(tmp_path, group_size=32, is_act_order=True)
    assert_exact_in_float32(saved)
    caplog.clear()
    with caplog.at_level("INFO"):
        assert_close_in_own_format(saved, {"Bf16Weight"})
    (line,) = [record.getMessage() for record in caplog.records if "bfloat16" in record.getMessage()]
    assert line.startswith("8 linear layers")


def test_a_bias_that_the_model_does_not_have_must_be_zero(tmp_path: Path) -> None:
    saved = save(tmp_path)
    name = "model.layers.0.self_attn.o_proj.bias"
    saved.edit(lambda tensors: tensors.update({name: torch.ones(128)}))
    with pytest.raises(CheckpointError, match="not expected") as caught:
        load_model(saved.folder, None)
    assert caught.value.field == name


def test_layers_that_dynamic_leaves_alone(tmp_path: Path) -> None:
    assert_exact_in_float32(save(tmp_path, dynamic={"-:.*lm_head.*": {}}))


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"bits": 3}, "bits"),
        ({"bits": None}, "bits"),
        ({"group_size": 16}, "group_size"),
        ({"group_size": None}, "group_size"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format"),
        ({"checkpoint_format": None, "format": "bitblas"}, "format"),
        ({"dynamic": {"+:.*down_proj": {"bits": 8}}}, "dynamic"),
    ],
)
def test_settings_that_are_not_read(settings: dict[str, Any], field: str, tmp_path: Path) -> None:
    saved = save(tmp_path)
    saved.edit_config(lambda config: config["quantization_config"].update(settings))
    with pytest.raises(CheckpointError, match=r"not read|is missing") as caught:
        open_checkpoint(str(saved.folder))
    assert caught.value.field == f"quantization_config.{field}"


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_a_missing_part_is_named(part: str, tmp_path: Path) -> None:
    saved = save(tmp_path)
    saved.edit(lambda tensors: tensors.pop(f"{PART}.{part}"))
    with pytest.raises(CheckpointError, match="is missing") as caught:
        load_model(saved.folder, None)
    assert caught.value.field == f"{PART}.{part}"


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("qweight", torch.zeros(16, 256)),
        ("scales", torch.ones(2, 256)),
        ("qzeros", torch.zeros(1, 31, dtype=torch.int32)),
        ("g_idx", torch.zeros(64, dtype=torch.int32)),
        ("g_idx", torch.full((128,), 7, dtype=torch.int32)),
    ],
)
def test_a_part_that_does_not_fit_is_named(part: str, wrong: torch.Tensor, tmp_path: Path) -> None:
    saved = save(tmp_path)
    saved.edit(lambda tensors: tensors.update({f"{PART}.{part}": wrong}))
    with pytest.raises(CheckpointError) as caught:
        load_model(saved.folder, None)
    assert caught.value.field == f"{PART}.{part}"
