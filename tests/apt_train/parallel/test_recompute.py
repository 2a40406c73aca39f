"""Recomputation keeps less for the backward pass and changes no bit of a gradient."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch

from apt_train.parallel.recompute import recompute_layers
from tests.apt_train.corpus import text_batch
from tests.apt_train.test_loop import CONFIG, new_model

DEEP = replace(CONFIG, num_layers=6)


def gradients_and_bytes(kind: str) -> tuple[list[torch.Tensor], int]:
    """Of a pass; and the bytes of all that lives between forward and backward, but did not before."""
    model, batch = new_model(config=DEEP), text_batch(3, lengths=(40, 25, 31))
    if kind != "none":
        recompute_layers(model.model.model.layers, kind)
    before = living()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        losses, _ = model(batch)
    kept = sum(size for place, size in living().items() if place not in before)
    losses.backward()
    return [p.grad for p in model.parameters()], kept


def living() -> dict[int, int]:
    """Bytes of the tensors that Python knows, by their place; those that oneDNN has packed for others have none."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor and each.layout is torch.strided]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


@pytest.fixture(scope="module")
def whole():
    return gradients_and_bytes("none")


@pytest.mark.parametrize(("kind", "most"), [("full", 0.6), ("selective", 0.8)])
def test_keeps_less_and_gives_the_same_gradients(kind, most, whole):
    expected, kept_by_all = whole
    found, kept = gradients_and_bytes(kind)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    print(f"{kind}: {1 - kept / kept_by_all:.0%} less is kept than {kept_by_all} bytes")
    assert kept <= most * kept_by_all


def test_parameters_keep_their_names():
    model = new_model()
    before = [name for name, _ in model.named_parameters()]
    recompute_layers(model.model.model.layers, "full")
    assert [name for name, _ in model.named_parameters()] == before
