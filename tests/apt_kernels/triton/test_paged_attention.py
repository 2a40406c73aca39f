"""Triton's paged attention equals the reference: mixed steps, head layouts, caches, windows, soft caps, splits."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from apt_kernels import reference
from apt_kernels.triton import paged_attention as module
from apt_kernels.triton.launch import compilations
from apt_kernels.triton.paged_attention_cut import Cut, Layer, Load, candidates, cut_launch, default_config, shape_class
from tests.apt_kernels.triton.paged import FP8, SCALE, Paged

TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
BFLOAT16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu, id="bfloat16")  # the interpreter cannot multiply it
DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.float16, id="float16"), BFLOAT16]

MIXES = {
    "one decode": [(1, 1)],
    "decodes of very different lengths": [(1, 3), (1, 64), (1, 65), (1, 150), (1, 17)],
    "whole prompts": [(7, 7), (33, 33)],
    "later chunks of prompts": [(5, 40), (9, 70)],
    "decodes, chunks and prompts": [(1, 12), (1, 129), (4, 31), (1, 50), (19, 19), (6, 60)],
}
MIXED = MIXES["decodes, chunks and prompts"]


def assert_close(paged: Paged, out: torch.Tensor, **options: object) -> None:
    tolerance = TOLERANCE[paged.query.dtype]
    torch.testing.assert_close(out, paged.expected(**options), rtol=0, atol=tolerance)


@pytest.mark.parametrize("num_segments", [1, 4])
@pytest.mark.parametrize("window", [None, 23])
@pytest.mark.parametrize("lengths", MIXES.values(), ids=MIXES.keys())
def test_every_mix_equals_the_reference_whole_and_in_segments(device, lengths, window, num_segments):
    paged = Paged(lengths, device=device)
    assert_close(paged, paged.run(window, num_segments=num_segments), window=window)


def test_the_result_is_written_where_it_is_told(device):
    paged = Paged([(1, 70), (3, 40)], device=device)
    out = torch.full_like(paged.query, float("nan"))
    assert paged.run(out=out) is out
    assert_close(paged, out)
    with pytest.raises(ValueError, match="out"):
        paged.run(out=out[:, ::2])


@pytest.mark.parametrize("window", [1, 16, 1000])
def test_every_window_equals_the_reference(device, window):
    """One key, exactly one tile, and more than any context has."""
    paged = Paged([(1, 70), (1, 16), (18, 40)], device=device)
    assert_close(paged, paged.run(window), window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(2, 2), (9, 3), (8, 2), (8, 1)], ids=str)
def test_every_number_of_heads_that_share_a_kv_head_equals_the_reference(device, dtype, heads):
    paged = Paged(MIXED, device=device, num_heads=heads[0], num_kv_heads=heads[1], dtype=dtype)
    assert_close(paged, paged.run())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 80, 96, 256])
def test_every_head_size_equals_the_reference(device, dtype, head_dim):
    paged = Paged([(1, 70), (5, 33)], device=device, head_dim=head_dim, dtype=dtype)
    assert_close(paged, paged.run())
    assert_close(paged, paged.run(num_segments=2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 64, 256])
def test_every_block_size_equals_the_reference(device, dtype, block_size):
    """Tiles of several blocks, of one, and of a part of one."""
    paged = Paged([(1, 300), (1, 256), (20, 65)], device=device, block_size=block_size, dtype=dtype)
    assert_close(paged, paged.run())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", [torch.int8, FP8], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 20}, {"num_segments": 2}], ids=str)
def test_a_cache_of_8_bits_is_read_in_every_dtype(device, dtype, cache_dtype, options):
    lengths = [(1, 12), (1, 129), (7, 40)]
    paged = Paged(lengths, device=device, dtype=dtype, cache_dtype=cache_dtype, head_dim=32)
    assert_close(paged, paged.run(**options), window=options.get("window"))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # which is how tanh comes to 1
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("soft_cap", [0.5, 30.0])
def test_scores_are_capped_as_by_the_reference(device, dtype, soft_cap):
    paged = Paged([(1, 70), (9, 40)], device=device, dtype=dtype)
    paged.query *= 8
    assert_close(paged, paged.run(soft_cap=soft_cap), soft_cap=soft_cap)
    assert_close(paged, paged.run(23, soft_cap, num_segments=2), soft_cap=soft_cap, window=23)
    assert not torch.allclose(paged.expected(), paged.expected(soft_cap=soft_cap), atol=0.1)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
@pytest.mark.parametrize("soft_cap", [None, 50.0])
def test_huge_scores_do_not_overflow(device, soft_cap):
    paged = Paged([(1, 40), (4, 31)], device=device)
    paged.query *= 1e6
    torch.testing.assert_close(paged.run(soft_cap=soft_cap), paged.expected(soft_cap=soft_cap), rtol=0, atol=1e-2)


@pytest.mark.parametrize("num_segments", [1, 4])
def test_sequences_and_tokens_that_pad_a_step_change_nothing(device, num_segments):
    """As a captured graph has them: without queries, without context, and tokens of no sequence."""
    paged = Paged(MIXED, device=device)
    out = paged.run(num_segments=num_segments)
    padding = torch.full((3, *paged.query.shape[1:]), float("nan"), device=device)
    ends = paged.cu_seqlens_q[-1:].expand(2)
    padded = paged.run(
        query=torch.cat([paged.query, padding]),
        cu_seqlens_q=torch.cat([paged.cu_seqlens_q, ends]),
        context_lens=torch.cat([paged.context_lens, paged.context_lens.new_tensor([0, 17])]),
        block_tables=torch.cat([paged.block_tables, torch.full_like(paged.block_tables[:2], -(2**30))]),
        num_segments=num_segments,
    )
    assert torch.equal(padded[: len(out)], out)


@pytest.mark.parametrize("num_segments", [1, 4])
def test_a_query_without_context_gets_zeros(device, num_segments):
    paged = Paged([(1, 70), (1, 5)], device=device)
    paged.context_lens[1] = 0
    out = paged.run(num_segments=num_segments)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert torch.equal(out[:1], paged.alone(0, num_segments=num_segments))


def test_a_padded_batch_of_decodes_may_hold_sequences_without_queries(device):
    paged = Paged([(1, 70), (1, 5), (1, 33)], device=device)
    out = paged.run()
    ends = paged.cu_seqlens_q.clamp(max=2)
    assert torch.equal(paged.run(query=paged.query[:2], cu_seqlens_q=ends), out[:2])


def test_bounds_may_be_too_large(device):
    paged = Paged(MIXED, device=device)
    out = paged.run(num_segments=1)
    assert_close(paged, paged.run(max_seqlen_q=500, max_context_len=100_000))
    assert torch.equal(paged.run(num_segments=1, max_context_len=100_000), out)
    assert_close(paged, paged.run(num_decodes=0))


def test_a_step_without_tokens_or_sequences_is_empty(device):
    paged = Paged(MIXED, device=device)
    nothing = {"query": paged.query[:0], "num_decodes": 0}
    assert paged.run(**nothing, cu_seqlens_q=paged.cu_seqlens_q * 0).shape == (0, 4, 16)
    none = {"cu_seqlens_q": paged.cu_seqlens_q[:1], "context_lens": paged.context_lens[:0]}
    assert paged.run(**nothing, **none, block_tables=paged.block_tables[:0]).shape == (0, 4, 16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{"num_segments": 1}, {"num_segments": 4}, {"window": 40, "num_segments": 2}])
def test_a_decode_does_not_depend_on_its_company(device, dtype, options):
    paged = Paged(MIXED, device=device, dtype=dtype, head_dim=32)
    together = paged.run(**options)
    for b in range(paged.num_decodes):
        assert torch.equal(paged.alone(b, **options)[0], together[b])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 23])
def test_a_prompt_does_not_depend_on_its_chunks_or_its_company(device, dtype, window):
    paged = Paged([(1, 9), (70, 70), (30, 99)], device=device, dtype=dtype)
    options = {"window": window, "num_segments": 1}
    together = paged.run(**options)[1:71]
    chunks = [paged.alone(1, first, end, **options) for first, end in ((0, 41), (41, 63), (63, 70))]
    assert torch.equal(torch.cat(chunks), together)


def test_any_strides_will_do(device):
    paged = Paged(MIXED, device=device, cache_dtype=torch.int8)
    out = paged.run()
    dense = {"key_cache": paged.keys.contiguous(), "value_cache": paged.values.contiguous()}
    scales = {"key_scales": paged.scales[0].contiguous(), "value_scales": paged.scales[1].contiguous()}
    wide = torch.zeros(len(paged.query), 7, 24, device=device)
    wide[:, 1:5, 8:] = paged.query
    tables = torch.cat([paged.block_tables, paged.block_tables], 1)[:, : paged.block_tables.shape[1]]
    assert torch.equal(paged.run(**dense, **scales, query=wide[:, 1:5, 8:], block_tables=tables), out)


@pytest.mark.parametrize("dtype", [torch.float16, BFLOAT16])
def test_every_candidate_for_tuning_gives_the_same(device, dtype, monkeypatch):
    """Warps and stages mean nothing to the interpreter, so the different tiles are all there is to try."""
    paged = Paged([(1, 40), (9, 70)], device=device, dtype=dtype, num_kv_heads=4)
    layer = Layer(4, 4, 16, dtype, dtype, None)
    tried = [config for q in (1, 9, 500) for config in candidates(layer, q)]
    distinct = {tuple(config.blocks.items()): config for config in tried}
    for config in distinct.values():
        monkeypatch.setattr("apt_kernels.triton.paged_attention_cut.tuned", lambda *_, chosen=config: chosen)
        assert_close(paged, paged.run())


def test_keys_are_reached_beyond_2_to_the_31_elements(device):
    shape = (2**31 // (16 * 2 * 64) + 2, 2, 16, 64)
    keys, values = (untouched_zeros(shape, device).transpose(1, 2) for _ in range(2))
    block = shape[0] - 1
    assert block * keys.stride(0) > 2**31
    near = [torch.randn(1, 16, 2, 64).to(keys) for _ in range(2)]
    keys[block], values[block] = near[0][0], near[1][0]
    query = torch.randn(16, 4, 64).to(keys)
    layout = [torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 16], [16], [[block]])]
    out = module.paged_attention(
        query,
        keys,
        values,
        **dict(zip(("cu_seqlens_q", "context_lens", "block_tables"), layout, strict=True)),
        num_decodes=0,
        max_seqlen_q=16,
        max_context_len=16,
        scale=SCALE,
    )
    expected = reference.paged_attention(query, *near, *layout[:2], torch.zeros_like(layout[2]), SCALE, None)
    torch.testing.assert_close(out, expected, rtol=0, atol=TOLERANCE[torch.float16])


def untouched_zeros(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """On a processor, pages of the system's that exist once they are written."""
    if device.type == "cuda":
        return torch.zeros(shape, dtype=torch.float16, device=device)
    return torch.from_numpy(np.zeros(shape, np.float16))


REFUSALS = {
    "query is a matrix": ("query", lambda p: {"query": p.query[0]}),
    "query has strided heads": ("query", lambda p: {"query": p.query.transpose(1, 2).contiguous().transpose(1, 2)}),
    "query is float64": ("query", lambda p: {"query": p.query.double()}),
    "query has a head size of 12": ("query", lambda p: {"query": p.query[:, :, :12]}),
    "query has another head size": ("key_cache", lambda p: {"query": p.query[:, :, :8]}),
    "heads cannot be shared": ("key_cache", lambda p: {"query": p.query[:, :3]}),
    "blocks of 8": ("key_cache", lambda p: {"key_cache": p.keys[:, :8], "value_cache": p.values[:, :8]}),
    "another dtype": ("key_cache", lambda p: {"key_cache": p.keys.half(), "value_cache": p.values.half()}),
    "keys with strided heads": ("key_cache", lambda p: {"key_cache": p.keys.transpose(2, 3)}),
    "fewer values": ("value_cache", lambda p: {"value_cache": p.values[1:]}),
    "other strides": ("value_cache", lambda p: {"value_cache": p.values.contiguous()}),
    "scales without int8": ("key_scales", lambda p: {"key_scales": torch.ones(p.keys.shape[:3])}),
    "wide offsets": ("cu_seqlens_q", lambda p: {"cu_seqlens_q": p.cu_seqlens_q.long()}),
    "too few offsets": ("cu_seqlens_q", lambda p: {"cu_seqlens_q": p.cu_seqlens_q[1:]}),
    "strided contexts": ("context_lens", lambda p: {"context_lens": p.context_lens.repeat_interleave(2)[::2]}),
    "too few tables": ("block_tables", lambda p: {"block_tables": p.block_tables[1:]}),
    "no scale": ("scale", lambda p: {"scale": 0.0}),
    "no window": ("window", lambda p: {"window": 0}),
    "negative cap": ("soft_cap", lambda p: {"soft_cap": -1.0}),
    "three segments": ("num_segments", lambda p: {"num_segments": 3}),
    "more decodes than sequences": ("num_decodes", lambda p: {"num_decodes": 9}),
    "no queries": ("max_seqlen_q", lambda p: {"max_seqlen_q": 0}),
    "a negative context": ("max_context_len", lambda p: {"max_context_len": -1}),
}


@pytest.mark.parametrize(("name", "change"), REFUSALS.values(), ids=REFUSALS.keys())
def test_what_the_kernel_does_not_take_is_refused_by_name_before_a_launch(device, monkeypatch, name, change):
    monkeypatch.setattr(module, "attend", None)
    paged = Paged(MIXED, device=device)
    with pytest.raises(ValueError, match=rf"^{name} "):
        paged.run(**change(paged))


INT8_REFUSALS = {
    "no scales of keys": ("key_scales", lambda p: {"key_scales": None}),
    "scales of too few blocks": ("value_scales", lambda p: {"value_scales": p.scales[1][1:]}),
    "scales in float16": ("value_scales", lambda p: {"value_scales": p.scales[1].half()}),
    "scales in other strides": ("value_scales", lambda p: {"value_scales": p.scales[1].contiguous()}),
}


@pytest.mark.parametrize(("name", "change"), INT8_REFUSALS.values(), ids=INT8_REFUSALS.keys())
def test_scales_that_do_not_fit_are_refused_by_name(device, monkeypatch, name, change):
    monkeypatch.setattr(module, "attend", None)
    paged = Paged(MIXED, device=device, cache_dtype=torch.int8)
    with pytest.raises(ValueError, match=rf"^{name} "):
        paged.run(**change(paged))


def test_tensors_elsewhere_are_refused_by_name(device):
    paged = Paged(MIXED, device=device)
    with pytest.raises(ValueError, match=r"^block_tables "):
        paged.run(block_tables=paged.block_tables.to("meta"))


LLAMA = Layer(32, 8, 128, torch.bfloat16, torch.bfloat16, None)


def cut(layer: Layer, load: Load, monkeypatch: pytest.MonkeyPatch, num_processors: int = 132) -> Cut:
    monkeypatch.setattr("apt_kernels.triton.paged_attention_cut.num_processors", lambda _: num_processors)
    return cut_launch(layer, load, torch.device("cpu"))


def test_contexts_are_cut_into_segments_where_there_are_few_programs_and_many_keys(monkeypatch):
    def segments(num_seqs: int, context: int, layer: Layer = LLAMA) -> int:
        return cut(layer, Load(num_seqs, num_seqs, 1, context), monkeypatch).num_segments

    assert [segments(batch, 32_768) for batch in (1, 2, 8, 16, 64, 512)] == [64, 32, 32, 16, 4, 1]
    assert [segments(64, context) for context in (1024, 2048, 4096)] == [1, 2, 4]
    assert [segments(1, context) for context in (0, 128, 255, 256, 1024, 4096)] == [1, 1, 1, 2, 8, 32]
    assert segments(1, 32_768, dataclasses.replace(LLAMA, window=512)) == 4


def test_prompts_are_cut_into_segments_only_where_processors_would_idle(monkeypatch):
    def segments(num_tokens: int, context: int) -> int:
        return cut(LLAMA, Load(num_tokens, 1, num_tokens, context), monkeypatch).num_segments

    assert segments(2048, 2048) == 1
    assert segments(64, 32_768) == 4


def test_the_bound_on_tiles_holds_for_every_step(monkeypatch):
    rng = np.random.default_rng(0)
    for _ in range(200):
        query_lens = rng.integers(0, rng.integers(1, 300), rng.integers(1, 20))
        load = Load(int(query_lens.sum()), len(query_lens), int(max(query_lens.max(), 1)), 300)
        launch = cut(LLAMA, load, monkeypatch)
        tokens = launch.config.blocks["ROWS"] // LLAMA.group
        assert np.ceil(query_lens / tokens).sum() <= launch.num_tiles
        assert launch.has_search or query_lens.max() <= tokens


@pytest.mark.parametrize("group", [1, 3, 7, 71])
@pytest.mark.parametrize("max_seqlen_q", [1, 5, 1000])
def test_a_tile_holds_at_least_one_query_in_every_configuration(group, max_seqlen_q):
    for query_dtype, cache_dtype in ((torch.bfloat16, torch.int8), (torch.float32, torch.float32)):
        layer = Layer(2 * group, 2, 64, query_dtype, cache_dtype, None)
        for config in (default_config(layer, max_seqlen_q), *candidates(layer, max_seqlen_q)):
            assert config.blocks["ROWS"] >= group


def test_a_class_names_what_tiles_depend_on():
    assert shape_class(LLAMA, 1) == "rows16-d128-q16-kv16"
    assert shape_class(dataclasses.replace(LLAMA, cache_dtype=FP8, window=9), 700) == "rows128-d128-q16-kv8-window"


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8, FP8], ids=str)
def test_nothing_compiles_once_every_kind_of_step_was_seen(device, cache_dtype):
    def run(lengths: list[tuple[int, int]], num_segments: int | None) -> None:
        paged = Paged(lengths, device=device, dtype=torch.bfloat16, cache_dtype=cache_dtype, head_dim=64)
        paged.run(num_segments=num_segments)

    kinds = ([(1, 40)], [(300, 300)], [(1, 40), (300, 300)])
    for num_segments in (1, 4):
        for lengths in kinds:
            run(lengths, num_segments)
    others = ([(1, 1)] * 17, [(1, 1000), (1, 16)], [(1, 16)] * 3 + [(257, 999), (64, 64)], [(1, 5)] + [(200, 201)] * 8)
    with compilations() as compiled:
        for lengths in others:
            for num_segments in (1, 2, 16, 64, None):
                run(lengths, num_segments)
    assert not compiled


@pytest.mark.gpu
@pytest.mark.parametrize("num_segments", [1, 8])
def test_a_captured_graph_stays_right_as_contexts_grow(device, num_segments):
    paged = Paged([(1, 1000), (1, 700), (1, 0), (1, 0)], device=device, dtype=torch.bfloat16, head_dim=64)
    full = paged.context_lens.clone()
    options = {"num_segments": num_segments, "max_context_len": 4096}
    paged.run(**options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged.run(**options)
    for contexts in ([1, 1, 0, 0], [1000, 64, 0, 0], [65, 700, 0, 0]):
        paged.context_lens.copy_(torch.tensor(contexts).minimum(full.cpu()))
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, paged.run(**options))
        torch.testing.assert_close(out[:2], paged.expected()[:2], rtol=0, atol=TOLERANCE[torch.bfloat16])
