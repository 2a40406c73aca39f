"""SwiGLU's gate: output and gradient equal the twin's."""

import pytest
import torch

from apt_kernels import reference
from apt_kernels.triton import activation
from apt_kernels.triton.activation import silu_and_mul
from apt_kernels.triton.tuning import Config
from tests.apt_kernels.triton.training_cases import (
    DEVICE,
    DTYPES_WITHOUT_PRODUCTS,
    NEEDS_GPU,
    assert_equals_twin,
    assert_same_bits,
    differentiate,
    normal,
)

TOLERANCE = {torch.float32: 5e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(activation, "tuned", lambda *_: Config({"BLOCK": 32}))


@pytest.mark.parametrize("dtype", DTYPES_WITHOUT_PRODUCTS, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (7, 130), (2, 3, 64), (0, 16)], ids=str)
def test_equals_its_twin(shape, dtype):
    gate_up, out_grad = normal(*shape, dtype=dtype), normal(*shape[:-1], shape[-1] // 2, seed=1)
    assert_equals_twin(silu_and_mul, reference.silu_and_mul, [3 * gate_up], [out_grad], TOLERANCE[dtype])


def test_rows_may_lie_in_wider_ones():
    """And the gradient may come in any layout."""
    gate_up, out_grad = normal(7, 150)[:, 9:139], normal(65, 7, seed=1).T
    assert_equals_twin(silu_and_mul, reference.silu_and_mul, [gate_up], [out_grad], TOLERANCE[torch.float32])


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_gates_far_from_zero_are_open_or_closed():
    gates = torch.tensor([[-1e4], [-50.0], [50.0], [1e4]], device=DEVICE)
    gate_up, out_grad = torch.cat((gates, torch.full_like(gates, 3.0)), 1), torch.ones_like(gates)
    assert_equals_twin(silu_and_mul, reference.silu_and_mul, [gate_up], [out_grad], TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    "gate_up",
    [
        torch.zeros(3, 4, dtype=torch.float64, device=DEVICE),
        torch.zeros(3, 5, device=DEVICE),
        torch.zeros(3, 0, device=DEVICE),
        torch.zeros(4, 3, device=DEVICE).T,
    ],
    ids=str,
)
def test_what_the_kernels_cannot_run_is_refused_by_name(gate_up):
    with pytest.raises(ValueError, match=r"^gate_up "):
        silu_and_mul(gate_up)


def test_the_ops_are_well_behaved():
    """Schema, fake tensors, autograd and compilation with shapes that vary."""
    ops, gate_up = torch.ops.apt_triton, normal(5, 12)
    torch.library.opcheck(ops.silu_and_mul_backward.default, (normal(5, 6), gate_up))
    torch.library.opcheck(ops.silu_and_mul.default, (gate_up.requires_grad_(),))


@pytest.mark.parametrize("_", [pytest.param(None, marks=NEEDS_GPU)])
def test_offsets_beyond_32_bits(_):
    num_rows, width = 2**31 // 8192 + 50, 8192
    gate_up = torch.zeros(num_rows, width, dtype=torch.bfloat16, device=DEVICE)
    gate_up[-50:] = normal(50, width, dtype=torch.bfloat16)
    results = differentiate(silu_and_mul, [gate_up], [torch.ones_like(gate_up[:, ::2])])
    tail = gate_up[-50:].clone()
    expected = differentiate(silu_and_mul, [tail], [torch.ones_like(tail[:, ::2])])
    assert_same_bits([x[-50:] for x in results], expected)
