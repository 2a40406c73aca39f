"""4-bit tensors of a GGUF keep the file's own values under int4."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as QuantType

from apt_core.checkpoint import open_checkpoint
from apt_core.quantization import Int4Tensor
from apt_kernels.cpu import native
from tests.apt_core.checkpoint.quantized import load_model, logits
from tests.apt_core.checkpoint.tiny import hf_model, write_gguf


def save(folder: Path, quant: QuantType, arch: str = "llama") -> Path:
    model = hf_model(arch)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data / 10 + ("norm" in name)
    return write_gguf(folder / "m.gguf", model, arch=arch, quant=quant)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("quant", [QuantType.Q4_0, QuantType.Q4_1], ids=lambda quant: quant.name)
def test_the_files_own_values_are_kept(quant: QuantType, arch: str, tmp_path: Path) -> None:
    path = save(tmp_path, quant, arch)
    for _ in ("converted", "from the cache"):
        checkpoint = open_checkpoint(str(path))
        exact = dict(checkpoint.tensors())
        kept = {name: weight for name, weight in checkpoint.weights() if isinstance(weight, Int4Tensor)}
        assert len(kept) == 2 * 7 + 1
        for name, weight in kept.items():
            assert torch.equal(weight.dequantize(), exact[name]), name
        assert {name for name, _ in checkpoint.weights()} == exact.keys()


@pytest.mark.parametrize("quant", [QuantType.Q4_0, QuantType.Q4_1], ids=lambda quant: quant.name)
def test_logits_differ_as_far_as_inputs_in_int8_make_them(quant: QuantType, tmp_path: Path) -> None:
    path = save(tmp_path, quant)
    model = load_model(path, "int4")
    if native.is_enabled():
        assert type(model.model.layers[0].self_attn.qkv_proj.weight).__name__ == "Int4Weight"
    expected = logits(load_model(path, "float32"))
    assert (logits(model) - expected).norm() / expected.norm() < 0.04


@pytest.mark.parametrize("quant", [QuantType.F32, QuantType.Q8_0], ids=lambda quant: quant.name)
def test_other_types_are_floats(quant: QuantType, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save(tmp_path, quant)))
    assert checkpoint.weight_format is None
    assert all(isinstance(weight, torch.Tensor) for _, weight in checkpoint.weights())


def test_a_gguf_is_a_plain_checkpoint_unless_int4_is_asked_for(tmp_path: Path) -> None:
    assert not open_checkpoint(str(save(tmp_path, QuantType.Q4_0))).is_quantized
