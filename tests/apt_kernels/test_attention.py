"""Attention on a processor equals the reference: odd sizes, grouped heads, windows, mixed steps, all dtypes."""

import pytest
import torch

from apt_kernels import ops, reference
from apt_kernels.cpu import varlen_attention

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class Paged:
    """Sequences of the given (query, context) lengths over a cache whose unused slots hold large numbers."""

    def __init__(self, lengths, *, num_heads=4, num_kv_heads=2, head_dim=16, block_size=8, dtype=torch.float32):
        torch.manual_seed(0)
        query_lens = [q for q, _ in lengths]
        blocks = [-(-context // block_size) for _, context in lengths]
        shape = (sum(blocks) + 3, block_size, num_kv_heads, head_dim)
        self.keys, self.values = torch.full(shape, 1e4, dtype=dtype), torch.full(shape, 1e4, dtype=dtype)
        self.query = torch.randn(sum(query_lens), num_heads, head_dim, dtype=torch.float64).to(dtype)
        self.cu_seqlens_q = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
        self.context_lens = torch.tensor([context for _, context in lengths], dtype=torch.int32)
        self.block_tables = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
        free = torch.randperm(shape[0]).to(torch.int32)
        for b, (_, context) in enumerate(lengths):
            table, free = free[: blocks[b]], free[blocks[b] :]
            self.block_tables[b, : blocks[b]] = table
            first_slots = table.long().repeat_interleave(block_size) * block_size
            slots = (first_slots + torch.arange(block_size).repeat(blocks[b]))[:context]
            kv = torch.randn(2, context, num_kv_heads, head_dim, dtype=torch.float64).to(dtype)
            ops.store_kv(kv[0], kv[1], self.keys, self.values, slots)
        self.num_decodes = next((i for i, q in enumerate(query_lens) if q != 1), len(query_lens))

    def run(self, window=None, **scales):
        return ops.paged_attention(
            self.query,
            self.keys,
            self.values,
            cu_seqlens_q=self.cu_seqlens_q,
            context_lens=self.context_lens,
            block_tables=self.block_tables,
            num_decodes=self.num_decodes,
            scale=0.25,
            window=window,
            **scales,
        )

    def expected(self, window=None):
        """In float64: what float32 itself rounds is not the op's."""
        wide = (x.double() for x in (self.query, self.keys, self.values))
        layout = (self.cu_seqlens_q, self.context_lens, self.block_tables)
        return reference.paged_attention(*wide, *layout, 0.25, window).to(self.query.dtype)


MIXES = {
    "one decode": [(1, 1)],
    "decodes of very different lengths": [(1, 3), (1, 64), (1, 65), (1, 300), (1, 17)],
    "whole prompts": [(7, 7), (33, 33)],
    "later chunks of prompts": [(5, 40), (9, 70)],
    "decodes, chunks and prompts": [(1, 12), (1, 129), (4, 31), (1, 50), (6, 6)],
}


@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("lengths", MIXES.values(), ids=MIXES.keys())
def test_paged_attention_equals_reference_for_every_mix(lengths, window):
    paged = Paged(lengths)
    torch.testing.assert_close(paged.run(window), paged.expected(window), rtol=0, atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_paged_attention_writes_where_it_is_told(dtype):
    paged = Paged(MIXES["decodes, chunks and prompts"], dtype=dtype)
    out = torch.full_like(paged.query, float("nan"))
    assert paged.run(out=out) is out
    torch.testing.assert_close(out, paged.run(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="out"):
        paged.run(out=out.double())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (9, 3), (8, 1)])
@pytest.mark.parametrize("head_dim", [8, 64, 96])
def test_paged_attention_equals_reference_for_every_head_layout_and_dtype(dtype, heads, head_dim):
    paged = Paged(
        MIXES["decodes, chunks and prompts"],
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        dtype=dtype,
    )
    torch.testing.assert_close(paged.run(), paged.expected(), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("block_size", [1, 5, 16, 128])
def test_paged_attention_equals_reference_for_every_block_size(block_size):
    paged = Paged(MIXES["decodes, chunks and prompts"], block_size=block_size)
    torch.testing.assert_close(paged.run(), paged.expected(), rtol=0, atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [None, 9])
def test_an_int8_cache_is_read_in_every_dtype(dtype, window):
    torch.manual_seed(0)
    paged = Paged(MIXES["decodes, chunks and prompts"], dtype=dtype)
    paged.keys, paged.values = (torch.randint(-127, 128, paged.keys.shape, dtype=torch.int8) for _ in range(2))
    scales = [torch.rand(paged.keys.shape[:3]) / 64 for _ in range(2)]
    layout = (paged.cu_seqlens_q, paged.context_lens, paged.block_tables)
    out = paged.run(window, key_scales=scales[0], value_scales=scales[1])
    wide = [
        paged.query.double(),
        *(x.double() * s.double().unsqueeze(-1) for x, s in zip((paged.keys, paged.values), scales, strict=True)),
    ]
    expected = reference.paged_attention(*wide, *layout, 0.25, window)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=max(TOLERANCE[dtype], 1e-4))


def test_scales_go_with_int8_caches_only():
    paged = Paged([(1, 5)])
    layout = {
        "cu_seqlens_q": paged.cu_seqlens_q,
        "context_lens": paged.context_lens,
        "block_tables": paged.block_tables,
        "num_decodes": 1,
        "scale": 0.25,
    }
    scales = torch.ones(paged.keys.shape[:3])
    keys, values = paged.keys.to(torch.int8), paged.values.to(torch.int8)
    with pytest.raises(ValueError, match="key_scales"):
        ops.paged_attention(paged.query, paged.keys, paged.values, key_scales=scales, value_scales=scales, **layout)
    with pytest.raises(ValueError, match="value_scales"):
        ops.paged_attention(paged.query, keys, values, key_scales=scales, **layout)
    with pytest.raises(ValueError, match="key_scales"):
        ops.paged_attention(paged.query, keys, values, key_scales=scales[:, :1], value_scales=scales, **layout)


def test_a_bfloat16_decode_does_not_depend_on_its_batch_mates():
    paged = Paged(MIXES["decodes of very different lengths"], head_dim=64, dtype=torch.bfloat16)
    together = paged.run()
    for b in range(len(together)):
        alone = ops.paged_attention(
            paged.query[b : b + 1],
            paged.keys,
            paged.values,
            cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32),
            context_lens=paged.context_lens[b : b + 1],
            block_tables=paged.block_tables[b : b + 1],
            num_decodes=1,
            scale=0.25,
        )
        assert torch.equal(alone[0], together[b])


@pytest.mark.parametrize("window", [None, 4])
def test_varlen_attention_equals_reference_and_paged_attention(window):
    torch.manual_seed(0)
    query, key, value = torch.randn(30, 4, 16), torch.randn(30, 2, 16), torch.randn(30, 2, 16)
    cu_seqlens = torch.tensor([0, 1, 12, 30], dtype=torch.int32)
    out = ops.varlen_attention(query, key, value, cu_seqlens=cu_seqlens, scale=0.25, window=window)
    expected = reference.varlen_attention(query, key, value, cu_seqlens, 0.25, window)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)


def test_varlen_attention_has_the_reference_gradients():
    torch.manual_seed(0)
    cu_seqlens = torch.tensor([0, 5, 11], dtype=torch.int32)
    shapes = ((11, 4, 8), (11, 2, 8), (11, 2, 8))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    grads = []
    for attend in (
        lambda q, k, v: ops.varlen_attention(q, k, v, cu_seqlens=cu_seqlens, scale=0.3),
        lambda q, k, v: reference.varlen_attention(q, k, v, cu_seqlens, 0.3, None),
    ):
        grads.append(torch.autograd.grad(attend(*inputs).square().sum(), inputs))
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def _gradients(attend, inputs):
    return torch.autograd.grad(attend(*inputs).square().sum(), inputs)


def test_what_is_computed_again_for_the_backward_pass_has_the_same_gradients(monkeypatch):
    torch.manual_seed(0)
    cu_seqlens = torch.tensor([0, 300, 310], dtype=torch.int32)
    inputs = [torch.randn(310, heads, 8, requires_grad=True) for heads in (2, 1, 1)]

    def attend(q, k, v):
        return ops.varlen_attention(q, k, v, cu_seqlens=cu_seqlens, scale=0.3)

    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        sizes = []
        kept = _gradients(attend, inputs)
        size_kept = sum(sizes)
        monkeypatch.setattr(varlen_attention, "KEPT_KEYS", 128)
        sizes.clear()
        again = _gradients(attend, inputs)
    assert sum(sizes) < size_kept
    assert all(map(torch.equal, kept, again))


def test_autocast_attends_in_its_own_type_and_gives_gradients_in_the_inputs():
    torch.manual_seed(0)
    cu_seqlens = torch.tensor([0, 20, 33], dtype=torch.int32)
    inputs = [torch.randn(33, heads, 16, requires_grad=True) for heads in (4, 2, 2)]

    def attend(q, k, v):
        return ops.varlen_attention(q, k, v, cu_seqlens=cu_seqlens, scale=0.25)

    expected = _gradients(attend, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(*inputs).dtype == torch.bfloat16
        found = _gradients(attend, inputs)
    for ours, exact in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() < 0.02 * exact.norm()


def test_arguments_that_do_not_fit_are_refused_by_name():
    paged = Paged([(1, 5), (3, 9)])
    with pytest.raises(ValueError, match="query"):
        kv = torch.zeros(3, 2, 8)
        ops.varlen_attention(torch.zeros(3, 4), kv, kv, cu_seqlens=paged.cu_seqlens_q, scale=1)
    paged.query = torch.zeros(4, 5, 16)
    with pytest.raises(ValueError, match="key_cache"):
        paged.run()
    paged = Paged([(1, 5), (3, 9)])
    paged.cu_seqlens_q = paged.cu_seqlens_q[:-1]
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        paged.run()
    paged = Paged([(1, 5), (3, 9)])
    paged.block_tables = paged.block_tables[:1]
    with pytest.raises(ValueError, match="block_tables"):
        paged.run()
    paged = Paged([(1, 5), (3, 9)])
    paged.values = paged.values[:-1]
    with pytest.raises(ValueError, match="value_cache"):
        paged.run()
