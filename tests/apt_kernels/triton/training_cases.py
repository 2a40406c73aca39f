"""What the tests of the ops with gradients share."""

import pytest
import torch

from apt_kernels.triton.launch import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="needs compiled kernels on a GPU")]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=NEEDS_GPU)]
"""The interpreter's product of bfloat16 is garbage."""
DTYPES_WITHOUT_PRODUCTS = [torch.float32, torch.float16, torch.bfloat16]


def normal(*shape, dtype=torch.float32, seed=0):
    """Random numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def differentiate(function, inputs, weights):
    """Outputs of a function, and then its inputs' gradients, if the outputs' have these weights as theirs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    torch.autograd.backward(outputs, [weight.to(out.dtype) for weight, out in zip(weights, outputs, strict=True)])
    return [out.detach() for out in outputs] + [x.grad for x in inputs]


def assert_equals_twin(op, twin, inputs, weights, tolerance):
    """Outputs and gradients are those of the twin in float64, to this part of each tensor's largest value."""
    results = differentiate(op, inputs, weights)
    for got, expected in zip(results, differentiate(twin, [x.double() for x in inputs], weights), strict=True):
        assert got.shape == expected.shape and got.dtype == inputs[0].dtype
        largest = expected.abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance * max(largest, 1.0))


def assert_same_bits(ones, others):
    """Two lists of tensors are equal, bit for bit."""
    for one, other in zip(ones, others, strict=True):
        assert torch.equal(one, other)
