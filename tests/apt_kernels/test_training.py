"""The C++ ops of training: values and gradients of the twins, on every instruction set."""

import pytest
import torch

from apt_kernels import ops, reference
from apt_kernels.cpu import training
from apt_kernels.cross_entropy import torch_step
from tests.apt_kernels.isas import INSTRUCTION_SETS, using_isa

SHAPES = [(1, 1), (3, 7), (65, 16), (130, 33), (2, 3, 40)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True, params=INSTRUCTION_SETS)
def on_instruction_set(request):
    with using_isa(request.param):
        yield


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype).requires_grad_()


def assert_gradients(inputs, out, expected_out):
    """Of a random function of what came out; the expected ones by autograd through the twin in float64."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = expected_out(*wide)
    weights = [torch.randn(x.shape) for x in out]
    sum((x.double() * w).sum() for x, w in zip(out, weights, strict=True)).backward()
    sum((x * w).sum() for x, w in zip(expected, weights, strict=True)).backward()
    tolerance = TOLERANCE[min((x.dtype for x in (*inputs, *out)), key=lambda dtype: dtype.itemsize)]
    for x, other in zip((*out, *(x.grad for x in inputs)), (*expected, *(x.grad for x in wide)), strict=True):
        largest = max(other.abs().max().item(), 0.1)  # one element alone has a gradient of rounding errors
        torch.testing.assert_close(x.double(), other, rtol=0, atol=tolerance * largest)
    for x in inputs:
        assert x.grad.dtype == x.dtype


@pytest.mark.parametrize("is_autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms(shape, dtype, has_residual, is_autocast):
    torch.manual_seed(0)
    x, weight = random(*shape, dtype=dtype), random(shape[-1])
    inputs = (x, random(*shape), weight) if has_residual else (x, weight)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        out = ops.fused_add_rms_norm(*inputs, 1e-5) if has_residual else (ops.rms_norm(x, weight, 1e-5),)
    assert out[0].dtype == (torch.bfloat16 if is_autocast else torch.float32)
    if has_residual:
        assert out[1].dtype == torch.float32
        assert_gradients(
            inputs, out, lambda x, residual, weight: reference.fused_add_rms_norm(x, residual, weight, 1e-5)
        )
    else:
        assert_gradients(inputs, out, lambda *wide: (reference.rms_norm(*wide, 1e-5),))


@pytest.mark.parametrize("used", [0, 1], ids=["the norm alone is used", "the sum alone is used"])
def test_a_norm_of_which_half_is_used(used):
    torch.manual_seed(0)
    x, residual, weight = random(5, 24), random(5, 24), random(24)
    ops.fused_add_rms_norm(x, residual, weight, 1e-5)[used].square().sum().backward()
    wide = [each.detach().double().requires_grad_() for each in (x, residual, weight)]
    reference.fused_add_rms_norm(*wide, 1e-5)[used].square().sum().backward()
    for each, other in zip((x, residual), wide, strict=False):
        torch.testing.assert_close(each.grad.double(), other.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gates(shape, dtype):
    torch.manual_seed(0)
    gate, up = random(*shape, dtype=dtype), random(*shape, dtype=dtype)
    out = ops.gated_silu(gate, up)
    assert out.dtype == dtype
    assert_gradients((gate, up), (out,), lambda *wide: (reference.gated_silu(*wide),))


def test_gates_far_from_zero_have_finite_gradients():
    gate = torch.tensor([-1e4, -90.0, 90.0, 1e4]).requires_grad_()
    ops.gated_silu(gate, torch.ones(4)).sum().backward()
    torch.testing.assert_close(gate.grad, torch.tensor([0.0, 0.0, 1.0, 1.0]))


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 17), (9, 1000)], ids=str)
def test_a_step_of_the_loss_is_torchs(shape, dtype, z_loss, with_gradient):
    torch.manual_seed(0)
    rows, vocab_size = shape
    logits = (torch.randn(shape) * 8).to(dtype)
    targets = torch.randint(0, vocab_size, (rows,))
    targets[1::3] = -100
    expected, losses, expected_losses = logits.clone(), torch.full((rows,), torch.nan), torch.full((rows,), torch.nan)
    training._cross_entropy_step(logits, targets, losses, -100, z_loss, with_gradient)
    torch_step(expected, targets, expected_losses, -100, z_loss, with_gradient)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] / 10)


def test_a_logit_that_is_not_a_number_shows_in_the_loss():
    for place in (0, 20, 33):
        logits, losses = torch.zeros(1, 34), torch.zeros(1)
        logits[0, place] = torch.nan
        training._cross_entropy_step(logits, torch.tensor([1]), losses, -100, 0.0, True)
        assert losses.isnan().all()


def test_gradients_do_not_depend_on_threads():
    torch.manual_seed(0)
    x, residual, weight = torch.randn(300, 64), torch.randn(300, 64), torch.randn(64)
    grads = []
    for count in (1, 2):
        ops.set_num_threads(count)
        inputs = [each.clone().requires_grad_() for each in (x, residual, weight)]
        normed, total = ops.fused_add_rms_norm(*inputs, 1e-5)
        (normed.square().sum() + total.sum()).backward()
        grads.append([each.grad for each in inputs])
    assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))


def test_the_ops_are_what_they_are_declared_to_be():
    x, residual, weight = torch.randn(3, 8).requires_grad_(), torch.randn(3, 8), torch.randn(8)
    torch.library.opcheck(training._training_norm, (x, residual, weight, 1e-5, torch.bfloat16))
    torch.library.opcheck(training._gated_silu, (x, residual))
