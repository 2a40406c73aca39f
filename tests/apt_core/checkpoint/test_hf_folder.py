"""Hugging Face folders as transformers saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from apt_core.checkpoint import open_checkpoint
from tests.apt_core.checkpoint.tiny import FAMILIES, TEMPLATE, byte_level_bpe, save_folder


def assert_same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_those_that_were_saved(family: str, tmp_path: Path) -> None:
    model = save_folder(tmp_path, family)

    checkpoint = open_checkpoint(str(tmp_path))

    assert_same_tensors(dict(checkpoint.tensors()), model.state_dict())
    assert checkpoint.path == tmp_path
    assert checkpoint.config.architecture == FAMILIES[family][1].__name__


def test_tensors_keep_their_stored_dtype(tmp_path: Path) -> None:
    model = save_folder(tmp_path, dtype=torch.bfloat16)

    checkpoint = open_checkpoint(str(tmp_path))

    assert checkpoint.config.dtype == "bfloat16"
    assert_same_tensors(dict(checkpoint.tensors()), model.state_dict())


def test_a_tied_model_is_stored_without_its_output_matrix(tmp_path: Path) -> None:
    save_folder(tmp_path, tie_word_embeddings=True)

    checkpoint = open_checkpoint(str(tmp_path))

    assert checkpoint.config.tie_word_embeddings
    assert "lm_head.weight" not in dict(checkpoint.tensors())


def test_shards_read_as_one(tmp_path: Path) -> None:
    model = save_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="64KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2

    checkpoint = open_checkpoint(str(tmp_path))

    assert_same_tensors(dict(checkpoint.tensors()), model.state_dict())


def test_tensors_can_be_iterated_again(tmp_path: Path) -> None:
    save_folder(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))

    assert [name for name, _ in checkpoint.tensors()] == [name for name, _ in checkpoint.tensors()]


def test_generation_config_is_read(tmp_path: Path) -> None:
    save_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0], "temperature": 0.5}))

    generation = open_checkpoint(str(tmp_path)).generation

    assert generation.eos_token_ids == (2, 0)
    assert generation.temperature == 0.5
    assert generation.bos_token_id == 1


def test_without_generation_config_config_json_names_the_end_token(tmp_path: Path) -> None:
    save_folder(tmp_path)
    (tmp_path / "generation_config.json").unlink()

    assert open_checkpoint(str(tmp_path)).generation.eos_token_ids == (2,)


def test_the_tokenizer_is_the_folders_own(tmp_path: Path) -> None:
    save_folder(tmp_path)

    tokenizer = open_checkpoint(str(tmp_path)).tokenizer

    text = "The quick brown fox<|im_end|>"
    assert tokenizer.encode(text) == byte_level_bpe().encode(text).ids
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n"


def test_another_tokenizer_can_be_named_by_folder_or_file(tmp_path: Path) -> None:
    save_folder(tmp_path / "model")
    other = tmp_path / "other"
    other.mkdir()
    byte_level_bpe(300).save(str(other / "tokenizer.json"))

    for name in (other, other / "tokenizer.json"):
        tokenizer = open_checkpoint(str(tmp_path / "model"), tokenizer=str(name)).tokenizer

        assert tokenizer.vocab_size == 300
        assert not tokenizer.has_chat_template


TEMPLATE_FILES: dict[str, dict[str, Any]] = {
    "jinja": {"chat_template.jinja": TEMPLATE},
    "json": {"chat_template.json": {"chat_template": TEMPLATE}},
    "tokenizer_config": {"tokenizer_config.json": {"chat_template": TEMPLATE}},
    "several": {
        "tokenizer_config.json": {
            "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}]
        }
    },
    "jinja before tokenizer_config": {
        "chat_template.jinja": TEMPLATE,
        "tokenizer_config.json": {"chat_template": "no"},
    },
}


@pytest.mark.parametrize("files", TEMPLATE_FILES.values(), ids=TEMPLATE_FILES.keys())
def test_the_chat_template_is_found_wherever_it_lies(files: dict[str, Any], tmp_path: Path) -> None:
    save_folder(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))

    tokenizer = open_checkpoint(str(tmp_path)).tokenizer

    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]).startswith("<|im_start|>user")


def test_named_templates_without_a_default_are_no_template(tmp_path: Path) -> None:
    save_folder(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    config = {"chat_template": [{"name": "tool_use", "template": "x"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))

    assert not open_checkpoint(str(tmp_path)).tokenizer.has_chat_template
