"""RMSNorm, alone and after the addition to the residual stream: outputs and gradients equal the twins'."""

import pytest
import torch

from apt_kernels import reference
from apt_kernels.triton import norm
from tests.apt_kernels.triton.training_cases import (
    DEVICE,
    DTYPES_WITHOUT_PRODUCTS,
    NEEDS_GPU,
    assert_equals_twin,
    assert_same_bits,
    differentiate,
    normal,
)

EPS = 1e-3
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
SHAPES = [(1, 1), (13, 33), (300, 40), (5, 3, 80), (2, 3, 5, 17), (2, 4097), (0, 64)]
"""One row, part of a tile, more tiles than programs of the backward pass, heads, more dimensions, wide rows, none."""


def rms_norm(x, weight):
    return norm.rms_norm(x, weight, EPS)


def rms_norm_twin(x, weight):
    return reference.rms_norm(x, weight, EPS)


def add_norm(x, residual, weight):
    return norm.fused_add_rms_norm(x, residual, weight, EPS)


def add_norm_twin(x, residual, weight):
    return reference.fused_add_rms_norm(x, residual, weight, EPS)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The shapes of these tests need several turns of each program of the backward pass."""
    monkeypatch.setattr(norm, "PROGRAMS_PER_PROCESSOR", 1)
    monkeypatch.setattr(norm, "num_processors", lambda device: 3)
    monkeypatch.setattr(norm, "TILE_ELEMENTS", 1024)


@pytest.mark.parametrize("dtype", DTYPES_WITHOUT_PRODUCTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_equals_its_twin(shape, dtype):
    x, weight, out_grad = normal(*shape, dtype=dtype), normal(shape[-1], dtype=dtype, seed=1), normal(*shape, seed=2)
    assert_equals_twin(rms_norm, rms_norm_twin, [x, weight], [out_grad], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES_WITHOUT_PRODUCTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused_add_rms_norm_equals_its_twin(shape, dtype):
    x, residual = (normal(*shape, dtype=dtype, seed=i) for i in range(2))
    weight, out_grads = normal(shape[-1], dtype=dtype, seed=2), [normal(*shape, seed=i) for i in (3, 4)]
    assert_equals_twin(add_norm, add_norm_twin, [x, residual, weight], out_grads, TOLERANCE[dtype])


def test_the_sum_is_rounded_before_it_is_normalised():
    """Like the reference, whose residual stream is of the model's dtype: both outputs belong together."""
    x, residual = (normal(9, 64, dtype=torch.float16, seed=i) for i in range(2))
    weight = normal(64, dtype=torch.float16, seed=2)
    with torch.no_grad():
        normed, total = add_norm(x, residual, weight)
        assert torch.equal(total, x + residual)
        assert torch.equal(normed, rms_norm(total, weight))


def test_heads_may_lie_in_wider_rows():
    """As the queries of a fused projection do; and gradients may come in any layout."""
    wide = normal(7, 5, 24)
    x, residual, weight = wide[:, 1:3, :16], wide[:, 2:4, 8:], normal(16, seed=1)
    out_grads = [normal(16, 2, 7, seed=i).permute(2, 1, 0) for i in (2, 3)]
    assert_equals_twin(rms_norm, rms_norm_twin, [x, weight], out_grads[:1], TOLERANCE[torch.float32])
    assert_equals_twin(add_norm, add_norm_twin, [x, residual, weight], out_grads, TOLERANCE[torch.float32])


def test_a_row_does_not_depend_on_the_other_rows():
    x, weight = normal(50, 40), normal(40, seed=1)
    with torch.no_grad():
        together = rms_norm(x, weight)
        for row in (0, 17, 49):
            assert torch.equal(rms_norm(x[row : row + 1], weight), together[row : row + 1])


def test_gradients_are_the_same_bits_in_every_run():
    x, residual = (normal(300, 33, dtype=torch.float16, seed=i) for i in range(2))
    weight, out_grads = normal(33, dtype=torch.float16, seed=2), [normal(300, 33, seed=i) for i in (3, 4)]
    assert_same_bits(*(differentiate(add_norm, [x, residual, weight], out_grads) for _ in range(2)))


X, WEIGHT = torch.zeros(4, 8, device=DEVICE), torch.zeros(8, device=DEVICE)


@pytest.mark.parametrize(
    ("name", "x", "weight"),
    [
        ("x", X.double(), WEIGHT.double()),
        ("x", X[0], WEIGHT),
        ("x", torch.zeros(4, 0, device=DEVICE), WEIGHT[:0]),
        ("x", torch.zeros(1, norm.MAX_WIDTH + 1, device=DEVICE), torch.zeros(norm.MAX_WIDTH + 1, device=DEVICE)),
        ("x", torch.zeros(8, 4, device=DEVICE).T, WEIGHT),
        ("weight", X, WEIGHT[:7]),
        ("weight", X, WEIGHT.half()),
        ("weight", X, torch.zeros(16, device=DEVICE)[::2]),
        ("weight", X, torch.empty(8, device="meta")),
    ],
)
def test_what_the_kernels_cannot_run_is_refused_by_name(name, x, weight):
    with pytest.raises(ValueError, match=f"^{name} "):
        rms_norm(x, weight)
    with pytest.raises(ValueError, match=f"^{name} "):
        add_norm(x, x, weight)


@pytest.mark.parametrize("residual", [X[:3], X.half(), torch.zeros(8, 4, device=DEVICE).T], ids=str)
def test_a_residual_that_does_not_fit_is_refused(residual):
    with pytest.raises(ValueError, match=r"^residual |^weight "):
        add_norm(X, residual, WEIGHT)


def test_the_ops_are_well_behaved():
    """Schema, fake tensors, autograd and compilation with shapes that vary."""
    x, residual, weight = (normal(*shape, seed=i) for i, shape in enumerate(((5, 2, 8), (5, 2, 8), (8,))))
    ops = torch.ops.apt_triton
    with torch.no_grad():
        torch.library.opcheck(ops.rms_norm_backward.default, (residual, None, x, weight, EPS))
        torch.library.opcheck(ops.rms_norm_backward.default, (residual, residual, x, weight, EPS))
    inputs = [tensor.requires_grad_() for tensor in (x, residual, weight)]
    torch.library.opcheck(ops.rms_norm.default, (x, weight, EPS))
    torch.library.opcheck(ops.fused_add_rms_norm.default, (*inputs, EPS))


@pytest.mark.parametrize("_", [pytest.param(None, marks=NEEDS_GPU)])
def test_offsets_beyond_32_bits(_):
    num_rows, width = 2**31 // 4096 + 50, 4096
    x = torch.ones(num_rows, width, dtype=torch.bfloat16, device=DEVICE)
    weight = normal(width, dtype=torch.bfloat16)
    x[-50:] = normal(50, width, dtype=torch.bfloat16, seed=1)
    out, x_grad, _ = differentiate(rms_norm, [x, weight], [torch.ones_like(x)])
    tail = x[-50:].clone()
    expected, tail_grad, _ = differentiate(rms_norm, [tail, weight], [torch.ones_like(tail)])
    assert_same_bits([out[-50:], x_grad[-50:]], [expected, tail_grad])
