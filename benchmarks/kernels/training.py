"""The ops of training, forward and backward, beside torch's own and what its compiler makes of the twins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from apt_core.model_config import ModelConfig
from apt_kernels import ops, reference
from benchmarks.kernels.attention import BACKENDS, is_seen, with_backend
from benchmarks.kernels.case import Call, Case, Maker, Work, compiled
from benchmarks.kernels.layer import EPS, random
from benchmarks.kernels.sizes import Sizes


def cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Attention within packed documents, the loss, and the backward of norm and gate."""
    for name, model in sizes.models:
        for number, length in sizes.documents:
            documents = Documents(model, number, length, sizes.dtype, device)
            yield documents.case(name, backward=False)
            yield documents.case(name, backward=True)
        for tokens in sizes.loss_tokens:
            yield _loss(name, model, tokens, sizes.dtype, device)
            yield _norm_backward(name, tokens, model.hidden_size, sizes.dtype, device)
            yield _gate_backward(name, tokens, model.intermediate_size, sizes.dtype, device)


@dataclass(frozen=True)
class Documents:
    """Packed sequences of one length, which torch's attention takes as a batch."""

    model: ModelConfig
    number: int
    length: int
    dtype: torch.dtype
    device: torch.device

    def case(self, name: str, *, backward: bool) -> Case:
        """Forward, or backward alone."""
        tunes = ("varlen_attention_query_grad", "varlen_attention_key_grad") if backward else ("varlen_attention",)
        return Case(
            f"varlen attention {'bwd' if backward else 'fwd'}",
            f"{name} {self.number}x{self.length}",
            self.work(backward),
            partial(self._made, self._ours, backward),
            self._peers(backward),
            {op: (self.model.head_dim, self.dtype) for op in tunes},
        )

    def work(self, backward: bool) -> Work:
        """Two products for the keys that queries see; five to go back, over the inputs, the output and its gradient."""
        seen = self.length * (self.length + 1) // 2
        num_flop = 4 * self.number * seen * self.model.num_heads * self.model.head_dim
        rows = self.number * self.length * self.model.head_dim * self.dtype.itemsize
        num_bytes = 2 * rows * (self.model.num_heads + self.model.num_kv_heads)
        return Work(2 * num_bytes, 2.5 * num_flop, self.dtype) if backward else Work(num_bytes, num_flop, self.dtype)

    def _made(self, attend: Callable[[], tuple[Callable[..., object], list[torch.Tensor]]], backward: bool) -> Call:
        function, inputs = attend()
        if not backward:
            return partial(function, *inputs)
        return _gradients(function, [x.requires_grad_() for x in inputs])

    def _ours(self) -> tuple[Callable[..., object], list[torch.Tensor]]:
        cu_seqlens = torch.arange(self.number + 1, dtype=torch.int32, device=self.device) * self.length
        attend = partial(ops.varlen_attention, cu_seqlens=cu_seqlens, scale=self.model.head_dim**-0.5)
        return attend, self._inputs(lambda heads: (self.number * self.length, heads, self.model.head_dim))

    def _peers(self, backward: bool) -> dict[str, Maker]:
        names = [None] if self.device.type == "cpu" else ["flash", "cudnn"]
        peers: dict[str, Maker] = {
            name or "sdpa": partial(self._made, partial(self._sdpa, name), backward) for name in names
        }
        return peers | {"flex": partial(self._made, self._flex, backward)}

    def _sdpa(self, backend: str | None) -> tuple[Callable[..., object], list[torch.Tensor]]:
        attend = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
        return (attend if backend is None else partial(with_backend, BACKENDS[backend], attend)), self._batch()

    def _flex(self) -> tuple[Callable[..., object], list[torch.Tensor]]:
        mask = create_block_mask(is_seen, None, None, self.length, self.length, device=str(self.device))
        return partial(compiled(flex_attention), block_mask=mask, enable_gqa=True), self._batch()

    def _batch(self) -> list[torch.Tensor]:
        return self._inputs(lambda heads: (self.number, heads, self.length, self.model.head_dim))

    def _inputs(self, shape: Callable[[int], tuple[int, ...]]) -> list[torch.Tensor]:
        heads = (self.model.num_heads, self.model.num_kv_heads, self.model.num_kv_heads)
        return [random(*shape(count), dtype=self.dtype, device=self.device) for count in heads]


def _gradients(function: Callable[..., object], inputs: list[torch.Tensor]) -> Call:
    """The backward alone of a function, as often as it is called."""
    out = function(*inputs)
    assert isinstance(out, torch.Tensor)
    return partial(torch.autograd.grad, out, inputs, torch.randn_like(out), retain_graph=True)


def _loss(name: str, model: ModelConfig, tokens: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Loss and gradients: three products with the output head."""
    size, width = model.vocab_size, model.hidden_size

    def made(function: Callable[..., torch.Tensor]) -> Call:
        hidden = random(tokens, width, dtype=dtype, device=device).requires_grad_()
        weight = (random(size, width, dtype=dtype, device=device) * width**-0.5).requires_grad_()
        targets = torch.randint(size, (tokens,), device=device)
        return lambda: torch.autograd.grad(function(hidden, weight, targets), (hidden, weight))

    def ours(*inputs: torch.Tensor) -> torch.Tensor:
        return ops.linear_cross_entropy(*inputs)[0]

    def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")

    return Case(
        "linear_cross_entropy fwd+bwd",
        f"{name} {tokens}x{size}",
        Work(2 * (tokens + size) * width * dtype.itemsize, 6.0 * tokens * size * width, dtype),
        partial(made, ours),
        {"torch": partial(made, plain), "compile": lambda: made(_typed(compiled(plain)))},
        {"cross_entropy": (size,)},
    )


def _norm_backward(name: str, tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Case:
    def made(function: Callable[..., object]) -> Call:
        inputs = [random(*shape, dtype=dtype, device=device) for shape in ((tokens, width), (width,))]
        return _gradients(partial(function, eps=EPS), [x.requires_grad_() for x in inputs])

    return Case(
        "rms_norm bwd",
        f"{name} {tokens}x{width}",
        Work(3 * tokens * width * dtype.itemsize),
        partial(made, ops.rms_norm),
        {"compile": lambda: made(compiled(reference.rms_norm))},
        {"rms_norm_backward": (width,)},
    )


def _gate_backward(name: str, tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Case:
    def made(function: Callable[..., object]) -> Call:
        return _gradients(function, [random(tokens, 2 * width, dtype=dtype, device=device).requires_grad_()])

    return Case(
        "silu_and_mul bwd",
        f"{name} {tokens}x{width}",
        Work(5 * tokens * width * dtype.itemsize),
        partial(made, ops.silu_and_mul),
        {"compile": lambda: made(compiled(reference.silu_and_mul))},
        {"silu_and_mul": (width,)},
    )


def _typed(function: Callable[..., object]) -> Callable[..., torch.Tensor]:
    def typed(*inputs: torch.Tensor) -> torch.Tensor:
        out = function(*inputs)
        assert isinstance(out, torch.Tensor)
        return out

    return typed
