"""Attention within packed sequences: outputs and gradients equal the twin's, for all layouts, whatever the tiles."""

import pytest
import torch

from apt_kernels import reference
from apt_kernels.triton import varlen_attention as forward
from apt_kernels.triton import varlen_attention_backward as backward
from apt_kernels.triton.tuning import Config
from apt_kernels.triton.varlen_attention import varlen_attention
from tests.apt_kernels.triton.training_cases import (
    DEVICE,
    DTYPES,
    NEEDS_GPU,
    assert_equals_twin,
    assert_same_bits,
    differentiate,
    normal,
)

SCALE = 0.3
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
LENGTHS = {
    "one token": [1],
    "odd, and empty at every place": [0, 37, 1, 0, 0, 16, 0],
    "nothing but padding": [0, 0],
}


@pytest.fixture(params=[(16, 16, 16, 16), (32, 16, 16, 32), (16, 32, 32, 16)], ids=str)
def tiles(request, monkeypatch):
    """Tiles so small that some tens of tokens are many: forward rows and keys, backward rows and keys."""
    rows, keys, backward_rows, backward_keys = request.param

    def chosen(op, shape_class, device, default):
        if op == "varlen_attention":
            return Config({"BLOCK_M": rows, "BLOCK_N": keys})
        return Config({"BLOCK_M": backward_rows, "BLOCK_N": backward_keys})

    for module in (forward, backward):
        monkeypatch.setattr(module, "tuned", chosen)


def starts(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(DEVICE)


def make(lengths, *, num_heads=4, num_kv_heads=2, head_dim=64, dtype=torch.float32):
    """Query, key, value and the weights of the output."""
    heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    return [normal(sum(lengths), h, head_dim, dtype=dtype, seed=i) for i, h in enumerate(heads)]


def run(lengths, window=None):
    return lambda q, k, v: varlen_attention(q, k, v, cu_seqlens=starts(lengths), scale=SCALE, window=window)


def twin(lengths, window=None):
    return lambda q, k, v: reference.varlen_attention(q, k, v, starts(lengths), SCALE, window)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("window", [None, 1, 20, 100])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_equals_its_twin_for_all_lengths_windows_and_tiles(lengths, window):
    *inputs, weights = make(lengths, num_heads=2, num_kv_heads=1, head_dim=16)
    assert_equals_twin(run(lengths, window), twin(lengths, window), inputs, [weights], TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(3, 3, 64), (4, 2, 80), (5, 1, 96), (2, 1, 128), (2, 2, 256)], ids=str)
def test_equals_its_twin_for_all_heads_and_dtypes(dtype, heads):
    lengths, (num_heads, num_kv_heads, head_dim) = [17, 0, 70], heads
    *inputs, weights = make(lengths, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype)
    assert_equals_twin(run(lengths, 40), twin(lengths, 40), inputs, [weights], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_its_twin_with_the_tiles_of_training(dtype):
    lengths = [300, 0, 1, 129]
    *inputs, weights = make(lengths, num_heads=2, num_kv_heads=1, dtype=dtype)
    for window in (None, 100):
        assert_equals_twin(run(lengths, window), twin(lengths, window), inputs, [weights], TOLERANCE[dtype])


@pytest.mark.parametrize("tiles", [(16, 16, 16, 16)], indirect=True)
def test_heads_may_lie_in_wider_rows(tiles):
    """As views of the projections' output do; and the gradient may come in any layout."""
    lengths, (h, k, d) = [40, 12], (4, 2, 12)
    wide = torch.full((sum(lengths), h + 2 * k, d + 7), torch.nan, device=DEVICE)
    wide[..., :d] = normal(sum(lengths), h + 2 * k, d)
    inputs = list(wide[..., :d].split([h, k, k], dim=1))
    weights = normal(d, h, sum(lengths)).permute(2, 1, 0)
    assert_equals_twin(run(lengths), twin(lengths), inputs, [weights], TOLERANCE[torch.float32])


def test_a_sequence_gets_the_same_bits_in_all_company(monkeypatch):
    monkeypatch.setattr(forward, "tuned", lambda *_: Config({"BLOCK_M": 16, "BLOCK_N": 32}))
    monkeypatch.setattr(backward, "tuned", lambda *_: Config({"BLOCK_M": 32, "BLOCK_N": 16}))
    *inputs, weights = make([45])
    alone = differentiate(run([45]), inputs, [weights])
    others = [make([13]), make([0, 58])]
    packed = [torch.cat((others[0][i], x, others[1][i])) for i, x in enumerate((*inputs, weights))]
    together = differentiate(run([13, 45, 0, 58]), packed[:3], [packed[3]])
    assert_same_bits(alone, [x[13 : 13 + 45] for x in together])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_sequence_full_of_nan_leaves_the_others_alone():
    lengths = [20, 33, 18]
    *inputs, weights = make(lengths, head_dim=16)
    clean = differentiate(run(lengths), inputs, [weights])
    for x in inputs:
        x[20:53] = torch.nan
    spoiled = differentiate(run(lengths), inputs, [weights])
    for rows in (slice(0, 20), slice(53, None)):
        assert_same_bits([x[rows] for x in clean], [x[rows] for x in spoiled])


def test_gradients_are_the_same_bits_in_every_run():
    lengths = [70, 90]
    *inputs, weights = make(lengths, num_heads=4, num_kv_heads=1, dtype=torch.float16)
    assert_same_bits(*(differentiate(run(lengths), inputs, [weights]) for _ in range(2)))


def test_scores_whose_powers_no_float_holds():
    lengths = [40]
    query, key, value, weights = make(lengths, head_dim=16)
    assert_equals_twin(run(lengths), twin(lengths), [10 * query, 10 * key, value], [weights], 1e-4)


REFUSED = {
    "query": [
        lambda a: {"query": a["query"][0]},
        lambda a: {name: a[name].double() for name in ("query", "key", "value")},
        lambda a: {name: torch.zeros(6, 2, 264, device=DEVICE) for name in ("query", "key", "value")},
        lambda a: {"query": a["query"].transpose(1, 2).contiguous().transpose(1, 2)},
    ],
    "key": [
        lambda a: {"key": a["key"][:5]},
        lambda a: {"key": a["key"].half()},
        lambda a: {"key": a["key"][..., :8]},
        lambda a: {name: torch.zeros(6, 3, 16, device=DEVICE) for name in ("key", "value")},
        lambda a: {name: torch.zeros(6, 0, 16, device=DEVICE) for name in ("key", "value")},
        lambda a: {"key": torch.empty(6, 2, 16, device="meta")},
    ],
    "value": [
        lambda a: {"value": a["value"][:, :1]},
        lambda a: {"value": a["value"].transpose(1, 2).contiguous().transpose(1, 2)},
    ],
    "cu_seqlens": [
        lambda a: {"cu_seqlens": a["cu_seqlens"].long()},
        lambda a: {"cu_seqlens": a["cu_seqlens"][:1]},
        lambda a: {"cu_seqlens": torch.zeros(6, dtype=torch.int32, device=DEVICE)[::2]},
    ],
    "window": [lambda a: {"window": 0}],
}


@pytest.mark.parametrize(("name", "change"), [(name, c) for name, changes in REFUSED.items() for c in changes])
def test_what_the_kernels_cannot_run_is_refused_by_name(name, change):
    query, key, value, _ = make([4, 2], num_heads=4, num_kv_heads=2, head_dim=16)
    arguments = {"query": query, "key": key, "value": value, "cu_seqlens": starts([4, 2]), "scale": 1.0}
    with pytest.raises(ValueError, match=f"^{name} "):
        varlen_attention(**{**arguments, **change(arguments)})


def test_both_ops_are_well_behaved():
    """Schema, fake tensors, autograd and compilation with shapes that vary."""
    query, key, value, grad = make([5, 0, 12], head_dim=16)
    cu_seqlens = starts([5, 0, 12])
    differentiable = [x.requires_grad_() for x in (query, key, value)]
    ops = torch.ops.apt_triton
    torch.library.opcheck(ops.varlen_attention.default, (*differentiable, cu_seqlens, SCALE, 4))
    with torch.no_grad():
        inputs = [x.detach() for x in differentiable]
        outputs = ops.varlen_attention(*inputs, cu_seqlens, SCALE, 4)
        torch.library.opcheck(ops.varlen_attention_backward.default, (grad, *inputs, cu_seqlens, *outputs, SCALE, 4))


def test_it_compiles_into_one_graph():
    *inputs, weights = make([9, 8], head_dim=16)
    compiled = torch.compile(run([9, 8], 5), backend="aot_eager", fullgraph=True)
    assert_same_bits(*(differentiate(function, inputs, [weights]) for function in (compiled, run([9, 8], 5))))


@pytest.mark.parametrize("_", [pytest.param(None, marks=NEEDS_GPU)])
def test_offsets_beyond_32_bits(_):
    """The second of two sequences lies behind element 2**31 of query, output and gradients."""
    num_tokens, num_heads, head_dim = 2**31 // (64 * 256) + 300, 64, 256
    lengths = [num_tokens - 130, 130]
    query = torch.zeros(num_tokens, num_heads, head_dim, dtype=torch.bfloat16, device=DEVICE)
    key, value = (normal(num_tokens, 1, head_dim, dtype=torch.bfloat16, seed=i) for i in (1, 2))
    query[-130:] = normal(130, num_heads, head_dim, dtype=torch.bfloat16)
    q, k, v = query.requires_grad_(), key.requires_grad_(), value.requires_grad_()
    # A window keeps the first sequence cheap.
    out = varlen_attention(q, k, v, cu_seqlens=starts(lengths), scale=SCALE, window=32)
    out[-130:].float().sum().backward()
    tail = [x.detach()[-130:].contiguous() for x in (query, key, value)]
    weights = torch.ones_like(tail[0])
    expected, *grads = differentiate(run([130], 32), tail, [weights])
    assert torch.equal(out.detach()[-130:], expected)
    for x, grad in zip((q, k, v), grads, strict=True):
        assert torch.equal(x.grad[-130:], grad)
    assert not q.grad[:-130].any()
