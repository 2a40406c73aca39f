"""Perplexity and agreement."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from apt_core.checkpoint import load_into, open_checkpoint
from apt_core.perplexity import Measured, measure
from apt_core.registry import build_model
from tests.apt_core.checkpoint.tiny import save_folder

WINDOWS = [torch.arange(3, 40), torch.arange(50, 87)]


def test_loss_is_that_of_transformers_with_a_cache_and_without(tmp_path: Path) -> None:
    oracle = save_folder(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    model = build_model(checkpoint.config)
    load_into(model, checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    ids = torch.stack(WINDOWS)
    with torch.no_grad():
        expected = oracle(ids, labels=ids)
    for kv_dtype in (None, torch.float32):
        found = measure(model.eval(), WINDOWS, kv_dtype)
        assert found.loss == pytest.approx(expected.loss.item(), rel=1e-4)
        assert torch.equal(found.choices, expected.logits[:, :-1].argmax(-1).flatten())


def test_comparison() -> None:
    exact = Measured(2.0, torch.tensor([1, 2, 3, 4]))
    found = Measured(2.0 + math.log(1.05), torch.tensor([1, 2, 0, 4]))
    assert found.over(exact) == pytest.approx(0.05) and found.agreement(exact) == 0.75
    assert exact.perplexity == pytest.approx(math.e**2)
