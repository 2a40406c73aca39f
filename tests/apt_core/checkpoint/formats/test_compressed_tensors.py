"""compressed-tensors checkpoints, packed by hand from the description of pack_to_int32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from apt_core.checkpoint import open_checkpoint
from apt_core.errors import CheckpointError
from apt_core.quantization import Int8Tensor
from apt_kernels.cpu import native
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
IGNORED = ["lm_head"]


def weights(num_bits: int, strategy: str, *, kind: str = "int", symmetric: bool = True, **more: Any) -> dict[str, Any]:
    return {"num_bits": num_bits, "type": kind, "strategy": strategy, "symmetric": symmetric, "dynamic": False} | more


def config(layout: str, weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": IGNORED,
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
    } | more


def int8_layer(num_out: int, num_in: int, generator: torch.Generator, groups: int, symmetric: bool) -> Layer:
    codes = random_codes(num_out, num_in, 8, generator) - 128
    scales = random_scales(num_out, groups, 8, generator).bfloat16()
    zeros = random_zeros(num_out, groups, 8, generator) - 128 if not symmetric else torch.zeros(num_out, groups).long()
    parts = {"weight": codes.to(torch.int8), "weight_scale": scales}
    if not symmetric:
        parts["weight_zero_point"] = zeros.to(torch.int8)
    return Layer(parts, dequantized(codes, scales, zeros))


def packed_layer(
    num_out: int, num_in: int, generator: torch.Generator, num_bits: int, groups: int, symmetric: bool
) -> Layer:
    """Codes as they are packed, that is shifted by 2 ** (bits - 1)."""
    codes = random_codes(num_out, num_in, num_bits, generator)
    scales = random_scales(num_out, groups, num_bits, generator).bfloat16()
    zeros = torch.full((num_out, groups), 2 ** (num_bits - 1))
    parts = {
        "weight_packed": pack_rows(codes, num_bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor([num_out, num_in]),
    }
    if not symmetric:
        zeros = random_zeros(num_out, groups, num_bits, generator)
        parts["weight_zero_point"] = pack_rows(zeros.T, num_bits).T
    return Layer(parts, dequantized(codes, scales, zeros))


def float8_layer(num_out: int, num_in: int, generator: torch.Generator, shape: tuple[int, ...], block: Any) -> Layer:
    values = torch.randn(num_out, num_in, generator=generator).to(torch.float8_e4m3fn)
    scales = (torch.rand(shape, generator=generator) * 0.1 + 0.05).bfloat16()
    wide = scales.float().reshape(-1, shape[-1])
    rows, columns = block or (num_out // wide.shape[0], num_in)
    wide = wide.repeat_interleave(rows, 0)[:num_out].repeat_interleave(columns, 1)[:, :num_in]
    return Layer({"weight": values, "weight_scale": scales}, values.float() * wide)


def save_int8(folder: Path, strategy: str = "channel", *, symmetric: bool = True, **more: Any) -> Saved:
    size = 64 if strategy == "group" else None

    def quantize(module: str, num_out: int, num_in: int, generator: torch.Generator) -> Layer | None:
        return (
            None
            if module in IGNORED
            else int8_layer(num_out, num_in, generator, num_in // size if size else 1, symmetric)
        )

    args = weights(8, strategy, symmetric=symmetric, group_size=size)
    return save_quantized(folder, config("int-quantized", args, **more), quantize)


def save_packed(
    folder: Path, num_bits: int = 4, group_size: int | None = 128, *, symmetric: bool = True, **more: Any
) -> Saved:
    def quantize(module: str, num_out: int, num_in: int, generator: torch.Generator) -> Layer | None:
        groups = num_in // group_size if group_size else 1
        return None if module in IGNORED else packed_layer(num_out, num_in, generator, num_bits, groups, symmetric)

    args = weights(num_bits, "group" if group_size else "channel", symmetric=symmetric, group_size=group_size)
    return save_quantized(folder, config("pack-quantized", args, **more), quantize)


@pytest.mark.parametrize(
    ("strategy", "symmetric", "form"),
    [("channel", True, "Int8Weight"), ("channel", False, "Bf16Weight"), ("group", True, "Bf16Weight")],
)
def test_logits_of_int8(strategy: str, symmetric: bool, form: str, tmp_path: Path) -> None:
    """Asymmetric codes use more than int8's range, and no product has int8 in groups."""
    saved = save_int8(tmp_path, strategy, symmetric=symmetric)
    assert_exact_in_float32(saved)
    assert_close_in_own_format(saved, {form})


@pytest.mark.parametrize("group_size", [32, 64, 128, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_logits_of_packed_4_bits(group_size: int | None, symmetric: bool, tmp_path: Path) -> None:
    saved = save_packed(tmp_path, 4, group_size, symmetric=symmetric)
    assert_exact_in_float32(saved)
    assert_close_in_own_format(saved, {"Int4Weight"})


@pytest.mark.parametrize(("group_size", "form"), [(None, "Int8Weight"), (64, "Bf16Weight")])
def test_logits_of_packed_8_bits(group_size: int | None, form: str, tmp_path: Path) -> None:
    saved = save_packed(tmp_path, 8, group_size)
    assert_exact_in_float32(saved)
    assert_close_in_own_format(saved, {form})


@pytest.mark.parametrize("layout", ["float-quantized", "naive-quantized"])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_logits_of_float8(layout: str, strategy: str, tmp_path: Path) -> None:
    block = (128, 96) if strategy == "block" else None

    def quantize(module: str, num_out: int, num_in: int, generator: torch.Generator) -> Layer | None:
        shapes = {"tensor": (1,), "channel": (num_out, 1), "block": (-(-num_out // 128), -(-num_in // 96))}
        return None if module in IGNORED else float8_layer(num_out, num_in, generator, shapes[strategy], block)

    args = weights(8, strategy, kind="float", block_structure=block)
    saved = save_quantized(tmp_path, config(layout, args), quantize)
    assert_exact_in_float32(saved)
    assert_close_in_own_format(saved, {"Bf16Weight"}, most=0.02)


def test_act_order_in_groups_is_dequantized(tmp_path: Path) -> None:
    def quantize(module: str, num_out: int, num_in: int, generator: torch.Generator) -> Layer | None:
        if module in IGNORED:
            return None
        layer = packed_layer(num_out, num_in, generator, 4, num_in // 32, True)
        index = (torch.arange(num_in) // 32)[torch.randperm(num_in, generator=generator)]
        # A permutation of inputs within the same groups: the same codes under other scales.
        codes = torch.tensor(
            [
                [(int(word) >> (4 * i)) & 15 for word in row for i in range(8)]
                for row in layer.parts["weight_packed"].tolist()
            ]
        )
        scales = layer.parts["weight_scale"]
        parts = layer.parts | {"weight_g_idx": index.int()}
        return Layer(parts, dequantized(codes, scales, torch.full(scales.shape, 8), index))

    args = weights(4, "group", group_size=32, actorder="group")
    saved = save_quantized(tmp_path, config("pack-quantized", args), quantize)
    assert_exact_in_float32(saved)
    assert_close_in_own_format(saved, {"Bf16Weight"})


def test_static_input_scales_are_read_and_not_needed(tmp_path: Path) -> None:
    saved = save_int8(tmp_path)
    inputs = {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True, "dynamic": False}
    saved.edit_config(lambda c: c["quantization_config"]["config_groups"]["group_0"].update(input_activations=inputs))
    names = [n.removesuffix(".weight_scale") for n in load_file(saved.folder / "model.safetensors") if "_scale" in n]
    extra = {f"{name}.input_scale": torch.tensor([0.02]) for name in names}
    extra |= {f"{name}.input_zero_point": torch.tensor([3], dtype=torch.int8) for name in names}
    saved.edit(lambda tensors: tensors.update(extra))
    assert_exact_in_float32(saved)

    found = [weight for _, weight in open_checkpoint(str(saved.folder)).weights() if isinstance(weight, Int8Tensor)]
    assert found and all(w.has_int8_inputs and w.input_scale == pytest.approx(0.02) for w in found)

    saved.edit(lambda tensors: tensors.update({f"{PART}.input_scale": torch.tensor([0.0])}))
    with pytest.raises(CheckpointError, match="positive") as caught:
        load_model(saved.folder, None)
    assert caught.value.field == f"{PART}.input_scale"

    saved.edit(lambda tensors: tensors.pop(f"{PART}.input_scale"))
    with pytest.raises(CheckpointError, match="missing") as caught:
        load_model(saved.folder, None)
    assert caught.value.field == f"{PART}.input_scale"


def test_scales_of_the_kv_cache_are_not_used_and_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = save_int8(tmp_path, kv_cache_scheme={"num_bits": 8, "type": "float", "strategy": "tensor"})
    scales = {f"model.layers.0.self_attn.{name}": torch.ones(1) for name in ("k_scale", "v_scale")}
    saved.edit(lambda tensors: tensors.update(scales))
    with caplog.at_level("INFO"):
        load_model(saved.folder, None)
    assert sum("kv_cache_scheme" in record.getMessage() for record in caplog.records) == 1
    assert_exact_in_float32(saved)


def test_groups_patterns_and_ignored_names(tmp_path: Path) -> None:
    """Patterns come before the class Linear; a fused product of several formats is dequantized."""
    group = {"targets": ["re:.*mlp.*"], "format": "pack-quantized", "weights": weights(4, "group", group_size=32)}
    settings = config("mixed-precision", weights(8, "channel"))
    settings["config_groups"]["group_0"]["format"] = "int-quantized"
    settings["config_groups"]["group_1"] = group
    settings["ignore"] = ["lm_head", "model.layers.0.self_attn.k_proj", "re:.*layers.1.mlp.up_proj"]
    plain = {"lm_head", "model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj"}

    def quantize(module: str, num_out: int, num_in: int, generator: torch.Generator) -> Layer | None:
        if module in plain:
            return None
        if ".mlp." in module:
            return packed_layer(num_out, num_in, generator, 4, num_in // 32, True)
        return int8_layer(num_out, num_in, generator, 1, True)

    saved = save_quantized(tmp_path, settings, quantize)
    assert_exact_in_float32(saved)
    model = load_model(saved.folder, None)
    found = [
        (type(layer.self_attn.qkv_proj.weight).__name__, type(layer.mlp.gate_up_proj.weight).__name__)
        for layer in model.model.layers
    ]
    assert not native.is_enabled() or found == [("OneDnnWeight", "Int4Weight"), ("Int8Weight", "OneDnnWeight")]
    assert_close_in_own_format(saved, {"OneDnnWeight", "Int4Weight", "Int8Weight"})


def test_parts_of_a_layer_in_different_shards(tmp_path: Path) -> None:
    saved = save_packed(tmp_path, symmetric=False)
    tensors = load_file(saved.folder / "model.safetensors")
    (saved.folder / "model.safetensors").unlink()
    shards = {name: f"model-0000{i % 3}.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(shards.values()):
        save_file({name: tensors[name] for name, place in shards.items() if place == shard}, saved.folder / shard)
    index = saved.folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    assert_exact_in_float32(saved)


def edited(change: dict[str, Any]) -> dict[str, Any]:
    """Settings with the leaves of `change` put in, along their dotted paths."""
    settings = config("pack-quantized", weights(4, "group", group_size=128))
    for path, value in change.items():
        place = settings
        *parents, last = path.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return settings


WEIGHTS = "config_groups.group_0.weights"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method"),
        ({"quant_method": None}, "quant_method"),
        ({"format": "marlin-24"}, "format"),
        ({"format": None}, "format"),
        ({"config_groups.group_0.format": "nvfp4-pack-quantized"}, "config_groups.group_0.format"),
        ({"config_groups": {}}, "config_groups"),
        ({WEIGHTS: None}, WEIGHTS),
        ({f"{WEIGHTS}.num_bits": 3}, f"{WEIGHTS}.num_bits"),
        ({f"{WEIGHTS}.type": "float"}, f"{WEIGHTS}.type"),
        ({f"{WEIGHTS}.strategy": "tensor_group"}, f"{WEIGHTS}.strategy"),
        ({f"{WEIGHTS}.group_size": 16}, f"{WEIGHTS}.group_size"),
        ({"sparsity_config.format": "sparse-24-bitmask"}, "sparsity_config.format"),
        ({"transform_config.config_groups": {"R1": {}}}, "transform_config.config_groups"),
        ({"ignore": ["re:["]}, "ignore"),
        ({"ignore": [1]}, "ignore"),
    ],
)
def test_settings_that_are_not_read(change: dict[str, Any], field: str, tmp_path: Path) -> None:
    saved = save_packed(tmp_path)
    saved.edit_config(lambda values: values.update(quantization_config=edited(change)))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(saved.folder))
    assert caught.value.field == f"quantization_config.{field}"


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_shape", "weight_zero_point"])
def test_a_missing_part_is_named(part: str, tmp_path: Path) -> None:
    saved = save_packed(tmp_path, symmetric=False)
    saved.edit(lambda tensors: tensors.pop(f"{PART}.{part}"))
    with pytest.raises(CheckpointError, match="is missing") as caught:
        load_model(saved.folder, None)
    assert caught.value.field == f"{PART}.{part}"


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("weight_packed", torch.zeros(256, 15, dtype=torch.int32)),
        ("weight_packed", torch.zeros(256, 16, dtype=torch.int8)),
        ("weight_scale", torch.ones(256, 2)),
        ("weight_scale", torch.full((256, 1), torch.inf)),
        ("weight_shape", torch.tensor([128])),
        ("weight_zero_point", torch.zeros(31, 1, dtype=torch.int32)),
    ],
)
def test_a_part_that_does_not_fit_is_named(part: str, wrong: torch.Tensor, tmp_path: Path) -> None:
    saved = save_packed(tmp_path, symmetric=False)
    saved.edit(lambda tensors: tensors.update({f"{PART}.{part}": wrong}))
    with pytest.raises(CheckpointError) as caught:
        load_model(saved.folder, None)
    assert caught.value.field in (f"{PART}.{part}", f"{PART}.weight_packed")


def test_floats_where_int8_is_declared_are_refused(tmp_path: Path) -> None:
    saved = save_int8(tmp_path)
    saved.edit(lambda tensors: tensors.update({f"{PART}.weight": torch.ones(256, 128)}))
    with pytest.raises(CheckpointError, match="expected int8") as caught:
        load_model(saved.folder, None)
    assert caught.value.field == f"{PART}.weight"
