"""GPTQ on inputs that are correlated: outputs, not weights, are what it keeps."""

from __future__ import annotations

import pytest
import torch

from apt_core.quantization import quantize_grouped
from apt_train.quantize.gptq import inverse_factor, quantize_gptq
from apt_train.quantize.settings import GPTQSettings

NUM_OUT, NUM_IN, GROUP = 40, 192, 64
IN_ORDER = GPTQSettings(act_order=False)


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


def error(weight: torch.Tensor, found: torch.Tensor, inputs: torch.Tensor) -> float:
    return ((inputs @ (found - weight).T).norm() / (inputs @ weight.T).norm()).item()


@pytest.mark.parametrize("settings", [GPTQSettings(), IN_ORDER], ids=["act-order", "in order"])
def test_outputs_change_much_less_than_by_rounding_to_nearest(
    settings: GPTQSettings, weight: torch.Tensor, inputs: torch.Tensor
) -> None:
    train, unseen = inputs[:800], inputs[800:]
    found = quantize_gptq(weight, train.T @ train, GROUP, settings)
    nearest = quantize_grouped(weight, GROUP)
    assert error(weight, found.dequantize(), unseen) < 0.4 * error(weight, nearest.dequantize(), unseen)
    assert error(weight, nearest.dequantize(), unseen) < 0.2


def test_uncorrelated_inputs_of_one_size_give_rounding_to_nearest(weight: torch.Tensor) -> None:
    nearest = quantize_grouped(weight, GROUP)
    for settings in (GPTQSettings(), IN_ORDER):
        found = quantize_gptq(weight, torch.eye(NUM_IN) * 7, GROUP, settings)
        assert torch.equal(found.codes, nearest.codes) and torch.equal(found.scales, nearest.scales)


@pytest.mark.parametrize("act_order", [True, False])
def test_the_block_decides_nothing(act_order: bool, weight: torch.Tensor, inputs: torch.Tensor) -> None:
    """Sums are added in another order, so a code on the edge may fall to the other side, and those after it follow."""
    hessian = inputs.T @ inputs
    whole, blocks = (
        quantize_gptq(weight, hessian, GROUP, GPTQSettings(act_order=act_order, block=block)) for block in (NUM_IN, 64)
    )
    assert (whole.codes == blocks.codes).double().mean() > 0.98


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
        assert error(weight, quantize_gptq(weight, hessian, GROUP, settings).dequantize(), inputs) < 0.1
    nothing = quantize_gptq(weight, torch.zeros(NUM_IN, NUM_IN), GROUP, GPTQSettings())
    assert torch.equal(nothing.codes, quantize_grouped(weight, GROUP).codes)


def test_layers_that_share_inputs_may_lie_above_each_other(weight: torch.Tensor, inputs: torch.Tensor) -> None:
    hessian = inputs.T @ inputs
    together = quantize_gptq(weight, hessian, GROUP, GPTQSettings())
    for part in (slice(0, 16), slice(16, NUM_OUT)):
        alone = quantize_gptq(weight[part], hessian, GROUP, GPTQSettings())
        assert (alone.codes == together.codes[part]).double().mean() > 0.98


def test_activations_that_are_not_finite_are_refused(weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="Hessian"):
        quantize_gptq(weight, torch.full((NUM_IN, NUM_IN), torch.nan), GROUP, GPTQSettings())
