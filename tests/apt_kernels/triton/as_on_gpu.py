"""The public ops as on a GPU, where there is none: the interpreted kernels take a processor's tensors."""

import pytest

from apt_kernels import ops
from apt_kernels.ops import backends
from apt_kernels.triton import (
    activation,
    cross_entropy,
    norm,
    packed,
    paged_attention,
    rope_store,
    sampling,
    store_kv,
    varlen_attention,
)

MODULES = (
    (ops.norm, "triton_norm", norm),
    (ops.activation, "triton_activation", activation),
    (ops.kv_cache, "triton_rope_store", rope_store),
    (ops.kv_cache, "triton_store_kv", store_kv),
    (ops.attention, "triton_attention", paged_attention),
    (ops.attention, "triton_varlen_attention", varlen_attention),
    (ops.packed, "triton_packed", packed),
    (ops.cross_entropy, "triton_cross_entropy", cross_entropy),
    (ops.sampling, "triton_sampling", sampling),
)


def give_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules of kernels, which a torch without CUDA does not import."""
    for module, name, kernels in MODULES:
        monkeypatch.setattr(module, name, kernels, raising=False)


def take_for_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor is one of a GPU's to the public ops."""
    give_triton(monkeypatch)
    monkeypatch.setattr(backends, "is_on_gpu", lambda x: True)
    monkeypatch.setattr(backends, "is_native", lambda x, *others: False)
