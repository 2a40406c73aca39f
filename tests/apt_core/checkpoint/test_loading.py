"""Filling a model with a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from apt_core.checkpoint import load_into, open_checkpoint
from apt_core.errors import CheckpointError
from tests.apt_core.checkpoint.tiny import hf_model, save_folder

CPU = torch.device("cpu")


def meta_model(**config: object) -> transformers.PreTrainedModel:
    with torch.device("meta"):
        return hf_model("llama", **config)


def edit_weights(folder: Path, *, add: dict[str, torch.Tensor] | None = None, drop: tuple[str, ...] = ()) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if name not in drop}
    save_file(tensors | (add or {}), path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_on_the_meta_device_gets_every_weight_in_the_asked_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    saved = save_folder(tmp_path)
    model = meta_model()

    load_into(model, open_checkpoint(str(tmp_path)), dtype=dtype, device=CPU)

    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, saved.state_dict()[name].to(dtype)), name


def test_loaded_weights_do_not_change_with_the_file(tmp_path: Path) -> None:
    saved = save_folder(tmp_path)
    model = meta_model()
    load_into(model, open_checkpoint(str(tmp_path)), dtype=torch.float32, device=CPU)

    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(16)

    assert torch.equal(model.model.norm.weight, saved.model.norm.weight)


def test_derived_and_tied_tensors_are_left_out(tmp_path: Path) -> None:
    save_folder(tmp_path, tie_word_embeddings=True)
    extra = {"lm_head.weight": torch.zeros(512, 64), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    edit_weights(tmp_path, add=extra)
    model = meta_model(tie_word_embeddings=True)

    load_into(model, open_checkpoint(str(tmp_path)), dtype=torch.float32, device=CPU)

    assert model.model.embed_tokens.weight.abs().sum() > 0


def test_missing_tensors_are_listed(tmp_path: Path) -> None:
    save_folder(tmp_path)
    dropped = ("model.norm.weight", "model.layers.1.mlp.up_proj.weight")
    edit_weights(tmp_path, drop=dropped)

    with pytest.raises(CheckpointError) as caught:
        load_into(meta_model(), open_checkpoint(str(tmp_path)), dtype=torch.float32, device=CPU)

    assert all(name in str(caught.value) for name in dropped)
    assert "missing" in str(caught.value)
    assert caught.value.field in dropped
    assert caught.value.file == str(tmp_path)


def test_unexpected_tensors_are_listed(tmp_path: Path) -> None:
    save_folder(tmp_path)
    added = {f"model.layers.{layer}.self_attn.q_norm.weight": torch.ones(16) for layer in range(12)}
    edit_weights(tmp_path, add=added)

    with pytest.raises(CheckpointError, match="not expected") as caught:
        load_into(meta_model(), open_checkpoint(str(tmp_path)), dtype=torch.float32, device=CPU)

    assert caught.value.field in added
    assert "12 tensors" in str(caught.value)
    assert "4 more" in str(caught.value)


def test_an_untied_model_needs_its_output_matrix(tmp_path: Path) -> None:
    save_folder(tmp_path)
    edit_weights(tmp_path, drop=("lm_head.weight",))

    with pytest.raises(CheckpointError) as caught:
        load_into(meta_model(), open_checkpoint(str(tmp_path)), dtype=torch.float32, device=CPU)

    assert caught.value.field == "lm_head.weight"


@pytest.mark.parametrize("wrong", [torch.zeros(65), torch.zeros(1, 64), torch.zeros(64, dtype=torch.int32)])
def test_a_tensor_of_wrong_shape_or_kind_is_named(wrong: torch.Tensor, tmp_path: Path) -> None:
    save_folder(tmp_path)
    edit_weights(tmp_path, add={"model.norm.weight": wrong})

    with pytest.raises(CheckpointError) as caught:
        load_into(meta_model(), open_checkpoint(str(tmp_path)), dtype=torch.float32, device=CPU)

    assert caught.value.field == "model.norm.weight"
