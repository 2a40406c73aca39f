"""What is exported is the model that was trained, wherever it is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers

from apt_core.checkpoint import load_into, open_checkpoint
from apt_core.metadata import AttentionMetadata
from apt_core.models.decoder import DecoderForCausalLM
from apt_train.cli import USAGE_ERROR, main
from apt_train.config import ModelSettings
from apt_train.export import export
from apt_train.lora import LoraLinear
from apt_train.model import ModelSource
from tests.apt_train.runs import write_config

IDS = torch.randint(49152, (23,), generator=torch.Generator().manual_seed(0))


def logits(model: DecoderForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        hidden = model(model.embed(IDS), torch.arange(len(IDS)), AttentionMetadata.for_full_sequences([len(IDS)]))
        return model.logits(hidden)


def loaded(folder: Path) -> DecoderForCausalLM:
    """As the server loads it."""
    checkpoint = open_checkpoint(str(folder))
    with torch.device("meta"):
        model = DecoderForCausalLM(checkpoint.config)
    load_into(model, checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    return model


@pytest.fixture(scope="module", params=["full", "qk_norm", "lora"])
def trained(request, tmp_path_factory):
    """A run's folder, and the logits of the model as it was trained."""
    folder = tmp_path_factory.mktemp(request.param)
    flags = {"full": [], "qk_norm": ["--model.qk_norm", "true"], "lora": ["--lora.rank", "2"]}[request.param]
    seen: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        build = ModelSource.build

        def kept(self: ModelSource, *args, **options):
            model = build(self, *args, **options)
            models.append(model)
            return model

        models: list[DecoderForCausalLM] = []
        patch.setattr(ModelSource, "build", kept)
        patch.setattr("apt_train.train.export", lambda *args, **options: seen.append(logits(models[0])))
        assert main(["run", *flags, write_config(folder, 4), "--optimizer.learning_rate", "0.01"]) == 0
    if request.param == "lora":
        assert any(isinstance(m, LoraLinear) and m.lora_b.abs().max() > 0 for m in models[0].modules())
    return folder / "run/checkpoints/step-00000004", seen[0]


def test_server_and_transformers_compute_the_same_logits(trained, tmp_path):
    checkpoint, expected = trained
    assert main(["export", str(checkpoint), str(tmp_path / "out")]) == 0
    assert (logits(loaded(tmp_path / "out")) - expected).abs().max() < 1e-5
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert (other(IDS[None]).logits[0] - expected).abs().max() < 1e-5


def test_the_tokenizer_is_the_one_it_was_trained_with(trained, tmp_path):
    export(trained[0], tmp_path / "out")
    source = ModelSource(ModelSettings())
    text = "Shall I compare thee to a summer's day?"
    assert open_checkpoint(str(tmp_path / "out")).tokenizer.encode(text) == source.tokenizer.encode(text)


def test_half_the_bytes_and_readable_by_others(trained, tmp_path):
    for dtype in ("float32", "bfloat16"):
        export(trained[0], tmp_path / dtype, dtype=dtype)
    sizes = [(tmp_path / dtype / "model.safetensors").stat().st_size for dtype in ("float32", "bfloat16")]
    assert sizes[1] < 0.51 * sizes[0]
    assert open_checkpoint(str(tmp_path / "bfloat16")).config.dtype == "bfloat16"
    assert (tmp_path / "float32/model.safetensors").stat().st_mode & 0o044 == 0o044


def test_damage_is_named_and_nothing_is_left(trained, tmp_path, capsys):
    copy = tmp_path / "step-00000004"
    shutil.copytree(trained[0], copy)
    (copy / "__0_0.distcp").write_bytes(b"")
    assert main(["export", str(copy), str(tmp_path / "out")]) == 1
    assert "__0_0.distcp: has 0 bytes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(trained, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    assert main(["export", str(trained[0]), str(tmp_path / "out")]) == USAGE_ERROR
    assert "out: " in capsys.readouterr().err
    assert main(["export", str(tmp_path), str(tmp_path / "new")]) == 1
    assert "manifest.json" in capsys.readouterr().err
