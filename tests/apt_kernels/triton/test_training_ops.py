"""Which of the public ops the kernels with gradients serve, and that nothing else loads Triton."""

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from apt_kernels import ops, reference
from apt_kernels.ops import backends
from apt_kernels.triton.launch import INTERPRETED
from tests.apt_kernels.triton.as_on_gpu import give_triton
from tests.apt_kernels.triton.training_cases import DEVICE, differentiate, normal

CU_SEQLENS = torch.tensor([0, 3, 8], dtype=torch.int32, device=DEVICE)
TARGETS = torch.arange(8, device=DEVICE)
CASES = {
    "rms_norm": (lambda x, w: ops.rms_norm(x, w, 1e-5), [(8, 16), (16,)]),
    "fused_add_rms_norm": (lambda x, r, w: ops.fused_add_rms_norm(x, r, w, 1e-5)[0], [(8, 16), (8, 16), (16,)]),
    "silu_and_mul": (ops.silu_and_mul, [(8, 32)]),
    "varlen_attention": (
        lambda q, k, v: ops.varlen_attention(q, k, v, cu_seqlens=CU_SEQLENS, scale=0.5, window=4),
        [(8, 4, 16), (8, 2, 16), (8, 2, 16)],
    ),
    "linear_cross_entropy": (lambda h, w: ops.linear_cross_entropy(h, w, TARGETS)[0], [(8, 16), (20, 16)]),
}


@pytest.fixture
def on_triton(monkeypatch):
    """As on a GPU; interpreted, the kernels take a processor's tensors."""
    if INTERPRETED:
        give_triton(monkeypatch)
        monkeypatch.setattr(backends, "is_triton", lambda x, *others: x.dtype in ops.TRITON_DTYPES)


class Called(TorchDispatchMode):
    """The names of our ops that run inside the block."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("apt"):
            self.names.append(f"{func.namespace}.{func._opname}")
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_serve_with_and_without_gradients(name):
    function, shapes = CASES[name]
    inputs = [normal(*shape, dtype=torch.float16, seed=i) for i, shape in enumerate(shapes)]
    with Called() as called, torch.no_grad():
        out = function(*inputs)
    assert called.names == [f"apt_triton.{name}"]
    with Called() as called:
        differentiate(function, inputs, [torch.ones_like(out)])
    backward = {"fused_add_rms_norm": ["rms_norm_backward"], "linear_cross_entropy": []}
    names = [name, *backward.get(name, [f"{name}_backward"])]
    assert called.names == [f"apt_triton.{name}" for name in names]


@pytest.mark.usefixtures("on_triton")
def test_float64_and_mixed_dtypes_are_torchs():
    x, weight = normal(4, 8, dtype=torch.float16), normal(8)
    assert torch.equal(ops.silu_and_mul(x.double()), reference.silu_and_mul(x.double()))
    if not INTERPRETED:
        assert torch.equal(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_torch_without_cuda_does_not_load_triton():
    code = "import sys, apt_kernels.ops; sys.exit('apt_kernels.triton' in sys.modules or 'triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
