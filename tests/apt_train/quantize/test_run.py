"""`quantize` from end to end: what it writes is what it says, and what servers read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from apt_core.checkpoint import open_checkpoint
from apt_core.errors import ConfigError
from apt_core.perplexity import measure
from apt_core.quantization import Float8Weight, GroupedWeight, Int8Tensor
from apt_serve.engine.sampling_params import SamplingParams
from apt_serve.llm import LLM
from apt_train.quantize import QuantizationReport, TextSettings
from apt_train.quantize.text import evaluation_windows
from tests.apt_core.checkpoint.tiny import hf_model, write_gguf
from tests.apt_train.quantize.tiny import loaded, open_output, quantized, save_model, settings

SCHEMES = {"w8a8-dynamic": Int8Tensor, "w8a8-static": Int8Tensor, "w4a16": GroupedWeight, "fp8": Float8Weight}
PART = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("source") / "model")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_report_and_folder_agree(scheme: Any, source: Path, tmp_path: Path) -> None:
    report = quantized(tmp_path, source, scheme=scheme)
    written = open_output(tmp_path)
    assert all(isinstance(w, SCHEMES[scheme]) for name, w in written.weights() if "proj" in name)
    windows = evaluation_windows(written.tokenizer, settings(tmp_path).evaluation)
    exact, found = (measure(loaded(checkpoint), windows) for checkpoint in (open_checkpoint(str(source)), written))
    assert report.quality.perplexity_source == pytest.approx(exact.perplexity)
    assert report.quality.perplexity == pytest.approx(found.perplexity)
    assert report.quality.greedy_agreement == found.agreement(exact) > 0.6
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert report.size.total == sum(tensor.nbytes for tensor in tensors.values())
    parts = [tensor.nbytes for name, tensor in tensors.items() if "proj" in name]
    assert report.size.linears == sum(parts) and len(report.layers) == 14
    assert report.size.linears_ratio < (0.3 if scheme == "w4a16" else 0.53)
    assert all(0 < layer.output_error < 0.3 and 0 < layer.weight_error < 0.5 for layer in report.layers)
    document = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert document["quality"]["perplexity"] == report.quality.perplexity
    assert document["settings"]["scheme"] == scheme
    assert PART in (tmp_path / "out" / "quantization_report.md").read_text()


@pytest.mark.parametrize(
    ("scheme", "family"), [("w8a8-static", "qwen2"), ("w8a8-dynamic", "qwen3"), ("w4a16", "mistral")]
)
def test_our_engine_serves_what_was_written(scheme: Any, family: str, tmp_path: Path) -> None:
    """Dequantized, the greedy tokens are those of the weights; activations are then as they were."""
    source = save_model(tmp_path / "model", family)
    quantized(tmp_path, source, scheme=scheme)
    written = open_output(tmp_path)
    model = loaded(written)
    for module in model.modules():
        if hasattr(module, "stored"):
            module.stored = None
    prompts = [list(range(5, 30)), [7, 300, 20]]
    greedy = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    llm = LLM(
        str(written.path), dtype="float32", weight_precision="float32", max_model_len=64, max_num_batched_tokens=64
    )
    for prompt, result in zip(prompts, llm.generate(prompts, greedy), strict=True):
        ids = torch.tensor(prompt + list(result.token_ids))
        choices = measure(model, [ids]).choices
        assert choices[len(prompt) - 1 :].tolist() == ids[len(prompt) :].tolist()


def total_error(report: QuantizationReport) -> float:
    return sum(layer.output_error for layer in report.layers)


def test_smoothing_lessens_the_error_of_outliers(source: Path, tmp_path: Path) -> None:
    reports = {
        smoothing: quantized(tmp_path, source, str(smoothing), scheme="w8a8-static", smoothing=smoothing)
        for smoothing in (True, False)
    }
    assert total_error(reports[True]) < 0.8 * total_error(reports[False])
    assert {layer.smoothing for layer in reports[False].layers} == {0}


def test_gptq_lessens_the_error_of_outputs_and_repeats_itself(source: Path, tmp_path: Path) -> None:
    nearest, first, second = (
        quantized(tmp_path, source, name, scheme="w4a16", method=method, group_size=32)
        for name, method in (("nearest", "rtn"), ("first", "gptq"), ("second", "gptq"))
    )
    assert total_error(first) < 0.8 * total_error(nearest)
    assert first == second
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert one == other


def test_a_gguf_becomes_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "cache"))
    model = hf_model("llama", hidden_size=64, intermediate_size=64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.div_(4)
    quantized(tmp_path, write_gguf(tmp_path / "model.gguf", model), method="rtn")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["torch_dtype"] == "bfloat16"
    written = open_output(tmp_path)
    assert written.is_quantized and written.tokenizer.encode("the dog") == [*written.tokenizer.encode("the dog")]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"scheme": "w2a2"}, "scheme"),
        ({"scheme": "w4a16", "smoothing": True}, "smoothing"),
        ({"scheme": "w4a16", "group_size": 48}, "group_size"),
        ({"calibration": TextSettings("/nowhere.txt", length=64)}, "calibration.text"),
        ({"evaluation": TextSettings(windows=8, length=4096)}, "evaluation.length"),
        ({"calibration": TextSettings(windows=10**6, length=16)}, "calibration.windows"),
    ],
)
def test_what_cannot_work_is_refused_by_name(change: dict[str, Any], field: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        quantized(tmp_path, source, **change)
    assert error.value.field == field
    assert not (tmp_path / "out").exists()


def test_groups_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", intermediate_size=96)
    with pytest.raises(ConfigError, match="64 does not divide the 96 inputs"):
        quantized(tmp_path, source, scheme="w4a16")


def test_a_folder_that_holds_something_and_a_quantized_source_are_refused(source: Path, tmp_path: Path) -> None:
    quantized(tmp_path, source, method="rtn", smoothing=False)
    with pytest.raises(ConfigError, match=r"^output: .*holds something"):
        quantized(tmp_path, source)
    with pytest.raises(ConfigError, match=r"^source: .*quantized already"):
        quantized(tmp_path, tmp_path / "out", "again")


def test_an_empty_text_is_refused(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text(" \n")
    with pytest.raises(ConfigError, match=r"^calibration\.text: .*is empty"):
        quantized(tmp_path, source, calibration=TextSettings(str(path), length=64))
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match=r"^calibration\.text: .*no UTF-8"):
        quantized(tmp_path, source, calibration=TextSettings(str(tmp_path / "latin.txt"), length=64))
