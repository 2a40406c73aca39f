"""GGUF files written as Hugging Face folders: what is in them, and that they are whole or not there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import SafetensorError

from apt_core.checkpoint import export, exported, open_checkpoint
from apt_core.errors import CheckpointError
from tests.apt_core.checkpoint.tiny import hf_model, write_gguf

TEXT = "Rivers: 1. the Nile,\n\t2. l'Oise"


@pytest.fixture
def source(tmp_path: Path, cache: Path) -> Path:
    return write_gguf(tmp_path / "model.gguf", hf_model("llama"))


@pytest.mark.parametrize(
    ("family", "arch", "window"),
    [("llama", "llama", None), ("mistral", "llama", 8), ("qwen2", "qwen2", None), ("qwen3", "qwen3", None)],
)
def test_transformers_reads_the_model_and_computes_what_it_was(
    family: str, arch: str, window: int | None, tmp_path: Path, cache: Path
) -> None:
    model = hf_model(family, **({"sliding_window": window} if window else {}))
    extra = {"attention.sliding_window": window} if window else {}
    folder = exported(write_gguf(tmp_path / "model.gguf", model, arch=arch, extra=extra), torch.float32)
    read = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(read) is type(model)
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.allclose(read(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_apt_reads_the_folder_as_it_reads_the_file(source: Path) -> None:
    own, folder = open_checkpoint(str(source)), open_checkpoint(str(exported(source, torch.float32)))
    assert (folder.config, folder.generation) == (own.config, own.generation)
    assert folder.tokenizer.encode(TEXT) == own.tokenizer.encode(TEXT)
    messages = [{"role": "user", "content": "x"}]
    assert folder.tokenizer.apply_chat_template(messages) == own.tokenizer.apply_chat_template(messages)
    tensors = dict(folder.tensors())
    assert tensors.keys() == dict(own.tensors()).keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in own.tensors())


def test_transformers_cuts_texts_as_apt_does() -> None:
    folder = exported(open_checkpoint("smollm2-135m-instruct").path, torch.bfloat16)
    own = open_checkpoint("smollm2-135m-instruct").tokenizer.encode(TEXT)
    assert transformers.AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"] == list(own)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_rounded_to_the_type_asked_for(source: Path, dtype: torch.dtype) -> None:
    folder = exported(source, dtype)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    rounded = dict(open_checkpoint(str(folder)).tensors())
    assert all(torch.equal(rounded[name], tensor.to(dtype)) for name, tensor in open_checkpoint(str(source)).tensors())
    assert exported(source, torch.float32) != folder


def test_it_is_written_once_and_again_when_the_file_has_changed(source: Path) -> None:
    folder = exported(source, torch.float32)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert exported(source, torch.float32) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    os.utime(source, ns=(1, 1))
    assert exported(source, torch.float32) != folder


def test_what_fails_midway_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise SafetensorError("disk on fire")

    monkeypatch.setattr(export, "_write_weights", fail)
    with pytest.raises(SafetensorError):
        exported(source, torch.float32, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_another_process_may_be_faster(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out" / exported(source, torch.float32).name
    write = export._write_weights

    def be_overtaken(path: Path, *args: Any) -> None:
        write(path, *args)
        shutil.copytree(path.parent, folder)
        (folder / "theirs").touch()

    monkeypatch.setattr(export, "_write_weights", be_overtaken)
    assert exported(source, torch.float32, tmp_path / "out") == folder
    assert (folder / "theirs").exists()
    assert list((tmp_path / "out").iterdir()) == [folder]


def test_a_folder_that_cannot_be_written_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot be written.*\$APT_CACHE"):
        exported(source, torch.float32, tmp_path / "file" / "out")


def test_a_tokenizer_that_is_not_read_is_left_out() -> None:
    config = {"architectures": ["LlamaForCausalLM"], "rope_parameters": {"rope_theta": 1e5}}
    documents = {"config.json": json.dumps(config), "generation_config.json": "{}", "tokenizer_fault": "{}"}
    assert set(export.hf_documents(documents, torch.float32)) == {"config.json", "generation_config.json"}
