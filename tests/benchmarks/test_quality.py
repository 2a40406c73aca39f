"""Benchmark of quality: the model that is trained for it, and what it is measured with."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from apt_core.checkpoint import open_checkpoint
from apt_core.metadata import AttentionMetadata
from apt_core.model_config import ModelConfig
from apt_core.perplexity import measure
from apt_core.registry import build_model
from benchmarks.quality.__main__ import VARIANTS, _load, _windows
from benchmarks.quality.rescale import rescale
from benchmarks.quality.small import CONFIG, Training, write_small_model

TINY = CONFIG | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 320,
}
TRAINING = Training(num_steps=40, batch=2, length=32, warmup_steps=5)
TEXT = "".join(
    f"The {word} went to the {place}, and the {word} came home again.\n"
    for word, place in [
        ("king", "castle"),
        ("fool", "heath"),
        ("daughter", "sea"),
        ("duke", "cliff"),
    ]
    * 40
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "model"
    write_small_model(path, TEXT, TINY, TRAINING)
    return path


def test_training_makes_the_text_likelier_than_chance(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    windows = _windows(checkpoint, TEXT, 4, 32)
    assert len(windows) == 4
    exact = measure(_load(checkpoint, VARIANTS[0], is_rescaled=False), windows, VARIANTS[0].cache_dtype)
    assert exact.loss < 0.6 * math.log(TINY["vocab_size"])
    few_bits = measure(_load(checkpoint, VARIANTS[-1], is_rescaled=False), windows, VARIANTS[-1].cache_dtype)
    assert few_bits.loss == pytest.approx(exact.loss, rel=0.1)
    assert few_bits.loss != exact.loss


def test_the_same_text_gives_the_same_model(folder: Path, tmp_path: Path) -> None:
    write_small_model(tmp_path / "again", TEXT, TINY, TRAINING)
    first, again = (dict(open_checkpoint(str(path)).tensors()) for path in (folder, tmp_path / "again"))
    assert all(torch.allclose(first[name], again[name], atol=1e-4) for name in first)


def test_the_learning_rate_rises_and_falls() -> None:
    training = Training(num_steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [training.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[-1] < 0.01


GROUPED = ModelConfig(
    architecture="Qwen2ForCausalLM",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    qkv_bias=True,
)


def test_a_rescaled_model_is_the_same_function_with_other_weights() -> None:
    torch.manual_seed(0)
    model = build_model(GROUPED, "cpu").double().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    ids, metadata = torch.arange(20), AttentionMetadata.for_full_sequences([20])

    def logits() -> torch.Tensor:
        return model.logits(model(model.embed(ids), torch.arange(20), metadata))

    expected = logits()
    rescale(model)
    torch.testing.assert_close(logits(), expected)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.weight", "v_proj.weight", "o_proj.weight", "gate_proj.weight", "down_proj.weight")):
            ratios = parameter / before[name]
            assert ratios.std(dim=1).min() > 0.1, name  # not one factor for a whole row
