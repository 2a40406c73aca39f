"""What is written of a stored weight, its reader makes the same weight of; packing against plain loops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from apt_core.checkpoint import open_checkpoint
from apt_core.checkpoint.formats.bits import pack_int32, unpack_int32
from apt_core.checkpoint.formats.compressed_tensors_writer import WritableWeight, quantization_config, stored_parts
from apt_core.quantization import Int8Tensor, quantize_float8, quantize_grouped, quantize_int8
from tests.apt_core.checkpoint.quantized import SHAPE, pack_rows
from tests.apt_core.checkpoint.tiny import save_folder


@pytest.mark.parametrize(("num_bits", "num_values"), [(4, 64), (4, 20), (8, 64), (8, 6)])
def test_packing_is_that_of_plain_loops(num_bits: int, num_values: int) -> None:
    values = torch.randint(0, 2**num_bits, (3, num_values), dtype=torch.uint8)
    packed = pack_int32(values, num_bits)
    assert packed.dtype == torch.int32 and torch.equal(packed, pack_rows(values, num_bits))
    assert torch.equal(unpack_int32(packed, num_bits)[:, :num_values], values)


def int8(weight: torch.Tensor, **inputs: object) -> Int8Tensor:
    plain = quantize_int8(weight)
    return Int8Tensor(plain.values, plain.scales, **inputs)  # type: ignore[arg-type]


KINDS = {
    "weights only": int8,
    "dynamic": lambda weight: int8(weight, has_int8_inputs=True),
    "static": lambda weight: int8(weight, has_int8_inputs=True, input_scale=0.25),
    "groups of 64": lambda weight: quantize_grouped(weight, 64),
    "groups of 32": lambda weight: quantize_grouped(weight, 32),
    "float8": quantize_float8,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_read_as_it_was_written(kind: str, tmp_path: Path) -> None:
    save_folder(tmp_path, **SHAPE)
    path, config_path = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors = load_file(path)
    stored: dict[str, WritableWeight] = {
        name: KINDS[kind](tensors.pop(name)) for name in list(tensors) if name.endswith("proj.weight")
    }
    for name, weight in stored.items():
        module = name.removesuffix("weight")
        tensors |= {f"{module}{part}": tensor.contiguous() for part, tensor in stored_parts(weight).items()}
    save_file(tensors, path)
    config = json.loads(config_path.read_text())
    example = next(iter(stored.values()))
    config_path.write_text(json.dumps(config | {"quantization_config": quantization_config(example)}))
    read = dict(open_checkpoint(str(tmp_path)).weights())
    for name, weight in stored.items():
        found = read[name]
        assert type(found) is type(weight)
        assert torch.equal(found.dequantize(), weight.dequantize())
        if isinstance(weight, Int8Tensor):
            assert (found.has_int8_inputs, found.input_scale) == (weight.has_int8_inputs, weight.input_scale)


def test_grouped_codes_are_the_nearest_and_use_the_whole_range() -> None:
    weight = torch.randn(7, 128, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    found = quantize_grouped(weight, 32)
    scales = found.scales.float().repeat_interleave(32, 1)
    assert found.scales.dtype == torch.bfloat16 and found.codes.min() == 0 and found.codes.max() == 15
    change = (found.dequantize() - weight).abs()
    # 7.5 steps on the positive side have no code beyond 7; scales are rounded to 8 bits.
    assert bool((change <= scales * 0.54 + 1e-7).all())
    assert torch.equal(found.dequantize()[2], weight[2])
