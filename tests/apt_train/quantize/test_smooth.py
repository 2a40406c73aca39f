"""SmoothQuant: the model stays what it was, and what is hard to round gets easier."""

from __future__ import annotations

import pytest
import torch

from apt_core.checkpoint import open_checkpoint
from apt_core.metadata import AttentionMetadata
from apt_core.models.channels import junctions
from apt_core.models.decoder import DecoderForCausalLM, DecoderLayer
from apt_train.quantize.rounding import Rounder
from apt_train.quantize.smooth import smooth
from apt_train.quantize.statistics import recorded
from tests.apt_train.quantize.tiny import OUTLIERS, loaded, save_model

IDS = torch.arange(3, 60)


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path) -> DecoderForCausalLM:
    """qwen2 has biases at q, k and v."""
    return loaded(open_checkpoint(str(save_model(tmp_path / "model", request.param))))


@torch.inference_mode()
def logits(model: DecoderForCausalLM) -> torch.Tensor:
    metadata = AttentionMetadata.for_full_sequences([len(IDS)])
    return model.logits(model(model.embed(IDS), torch.arange(len(IDS)), metadata))


def test_scaling_every_channel_changes_no_logit(model: DecoderForCausalLM) -> None:
    expected = logits(model)
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        assert isinstance(layer, DecoderLayer)
        for junction in junctions(layer):
            before = [reader.weight.clone() for reader in junction.readers.values()]
            junction.scale(torch.rand(junction.num_channels, generator=generator) + 0.5)
            assert all(not torch.equal(a, b.weight) for a, b in zip(before, junction.readers.values(), strict=True))
    assert torch.allclose(logits(model), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("scheme", ["w8a8-static", "w8a8-dynamic"])
def test_outliers_are_moved_and_norms_need_no_rounding(model: DecoderForCausalLM, scheme: str) -> None:
    expected = logits(model)
    for layer in model.model.layers:
        assert isinstance(layer, DecoderLayer)
        found = junctions(layer)
        with recorded(found, 1, has_hessian=False) as statistics:
            logits(model)
        largest = statistics[0].largest.clone()
        assert largest[OUTLIERS].min() > 5 * largest.median()
        rounder = Rounder(scheme, 64)  # type: ignore[arg-type]
        strengths = [
            smooth(junction, seen, rounder, torch.bfloat16) for junction, seen in zip(found, statistics, strict=True)
        ]
        assert strengths[0] > 0
        stored = layer.input_layernorm.weight.bfloat16().float()
        assert torch.allclose(stored, layer.input_layernorm.weight, rtol=1e-6)
        assert statistics[0].largest.max() / statistics[0].largest.median() < largest.max() / largest.median() / 2
        # What the statistics became is what the scaled layer sees.
        with recorded(found, 1, has_hessian=False) as again:
            logits(model)
        for seen, now in zip(statistics, again, strict=True):
            assert torch.allclose(seen.largest, now.largest, rtol=1e-2)
            assert torch.allclose(seen.samples, now.samples, rtol=1e-2, atol=1e-2 * now.samples.abs().max().item())
    assert torch.allclose(logits(model), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
