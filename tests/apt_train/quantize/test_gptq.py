"""GPTQ on inputs that are correlated: outputs, not weights, are what it keeps."""

from __future__ import annotations

import pytest
import torch

from apt_core.checkpoint.formats.compressed_tensors_writer import WritableWeight
from apt_train.quantize.gptq import gptq, inverse_factor
from apt_train.quantize.rounding import Rounder
from apt_train.quantize.settings import GPTQSettings, Scheme

NUM_OUT, NUM_IN = 40, 192
IN_ORDER = GPTQSettings(act_order=False)
INT4 = Rounder("w4a16", 64)
SCHEMES: tuple[Scheme, ...] = ("w4a16", "w8a8-dynamic", "w8a8-static", "fp8")
NO_INPUTS = torch.zeros(NUM_IN)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(NUM_OUT, NUM_IN, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def inputs() -> torch.Tensor:
    """[tokens, in]: mixtures of few causes, of very different size."""
    generator = torch.Generator().manual_seed(1)
    causes = torch.randn(1000, 24, generator=generator) * torch.logspace(0, 1, 24)
    mixed = causes @ torch.randn(24, NUM_IN, generator=generator)
    return mixed + torch.randn(1000, NUM_IN, generator=generator)


def quantized(
    weight: torch.Tensor, hessian: torch.Tensor, settings: GPTQSettings, rounder: Rounder = INT4
) -> WritableWeight:
    return rounder.stored(*gptq(weight, hessian, rounder, settings), NO_INPUTS)


def error(weight: torch.Tensor, found: torch.Tensor, inputs: torch.Tensor) -> float:
    return ((inputs @ (found - weight).T).norm() / (inputs @ weight.T).norm()).item()


@pytest.mark.parametrize("settings", [GPTQSettings(), IN_ORDER], ids=["act-order", "in order"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_outputs_change_much_less_than_by_rounding_to_nearest(
    settings: GPTQSettings, scheme: Scheme, weight: torch.Tensor, inputs: torch.Tensor
) -> None:
    train, unseen = inputs[:800], inputs[800:]
    rounder = Rounder(scheme, 64)
    found = quantized(weight, train.T @ train, settings, rounder)
    nearest = rounder.nearest(weight, NO_INPUTS)
    assert error(weight, found.dequantize(), unseen) < 0.5 * error(weight, nearest.dequantize(), unseen)
    assert error(weight, nearest.dequantize(), unseen) < 0.2


def test_uncorrelated_inputs_of_one_size_give_rounding_to_nearest(weight: torch.Tensor) -> None:
    for scheme in SCHEMES:
        rounder = Rounder(scheme, 64)
        nearest = rounder.nearest(weight, NO_INPUTS).dequantize()
        for settings in (GPTQSettings(), IN_ORDER):
            found = quantized(weight, torch.eye(NUM_IN) * 7, settings, rounder)
            assert torch.equal(found.dequantize(), nearest)


@pytest.mark.parametrize("act_order", [True, False])
def test_the_block_decides_nothing(act_order: bool, weight: torch.Tensor, inputs: torch.Tensor) -> None:
    """Sums are added in another order, so a code on the edge may fall to the other side, and those after it follow."""
    hessian = inputs.T @ inputs
    whole, blocks = (
        gptq(weight, hessian, INT4, GPTQSettings(act_order=act_order, block=block))[0] for block in (NUM_IN, 64)
    )
    assert (whole == blocks).double().mean() > 0.98


def test_each_correction_is_the_least_squares_one(weight: torch.Tensor, inputs: torch.Tensor) -> None:
    """After the first input is rounded, the others become those that, freely chosen, make the best of it."""
    hessian = inputs.T @ inputs
    factor = inverse_factor(hessian, 1e-6)
    change = torch.ones(NUM_OUT)
    expected = -torch.linalg.solve(hessian[1:, 1:].double(), hessian[1:, :1].double()) @ change[None].double()
    found = torch.outer(factor[0, 1:] / factor[0, 0], change)
    assert torch.allclose(found.double(), expected, rtol=1e-2, atol=1e-2)


def test_inputs_that_are_never_there_do_no_harm(weight: torch.Tensor, inputs: torch.Tensor) -> None:
    inputs[:, 5] = 0
    hessian = inputs.T @ inputs
    for settings in (GPTQSettings(), IN_ORDER):
        assert error(weight, quantized(weight, hessian, settings).dequantize(), inputs) < 0.1
    nothing = quantized(weight, torch.zeros(NUM_IN, NUM_IN), GPTQSettings())
    assert torch.equal(nothing.dequantize(), INT4.nearest(weight, NO_INPUTS).dequantize())


def test_layers_that_share_inputs_may_lie_above_each_other(weight: torch.Tensor, inputs: torch.Tensor) -> None:
    hessian = inputs.T @ inputs
    together, _ = gptq(weight, hessian, INT4, GPTQSettings())
    for part in (slice(0, 16), slice(16, NUM_OUT)):
        alone, _ = gptq(weight[part], hessian, INT4, GPTQSettings())
        assert (alone == together[part]).double().mean() > 0.98


def test_activations_that_are_not_finite_are_refused(weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="Hessian"):
        gptq(weight, torch.full((NUM_IN, NUM_IN), torch.nan), INT4, GPTQSettings())
