"""The plug-in's layers, called as vLLM calls them: caches in vLLM's layout, mixed steps, against the reference.

The layer for GPUs runs on the Triton kernels, interpreted; that for processors on the C++ ops.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from apt_kernels import reference
from apt_kernels.triton.paged_attention import paged_attention
from apt_kernels.triton.store_kv import store_kv
from apt_kernels.vllm import backend
from apt_kernels.vllm.backend import PagedAttentionImpl, PagedMetadata
from apt_kernels.vllm.cpu import CpuAttentionImpl, CpuMetadataBuilder
from apt_kernels.vllm.cuda import CudaAttentionImpl, CudaMetadataBuilder

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, NUM_PADDING = 6, 2, 16, 16, 3
LENGTHS = [(1, 1), (1, 37), (5, 5), (7, 40), (1, 18)]
"""(queries, context): decodes, then prompts, one of them partly cached, and a decode that did not come first."""
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what vLLM imports late
LAYERS = {"cuda": (CudaAttentionImpl, CudaMetadataBuilder), "cpu": (CpuAttentionImpl, CpuMetadataBuilder)}


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of an engine without KV connectors."""
    monkeypatch.setattr(backend, "get_current_vllm_config", lambda: SimpleNamespace(kv_transfer_config=None))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops that a GPU would take."""
    monkeypatch.setattr(backend, "ops", SimpleNamespace(store_kv=store_kv, paged_attention=paged_attention))


class Step:
    """A step in vLLM's words. Blocks of nobody and slots past a context are NaN."""

    def __init__(self, dtype: torch.dtype, layout: str, lengths: list[tuple[int, int]] = LENGTHS) -> None:
        torch.manual_seed(0)
        self.lengths = lengths
        query_lens, contexts = [q for q, _ in lengths], [c for _, c in lengths]
        blocks = [-(-c // BLOCK_SIZE) for c in contexts]
        num_blocks, num_tokens = sum(blocks) + 2, sum(query_lens)
        free = torch.randperm(num_blocks).to(torch.int32)
        self.tables = torch.zeros(len(lengths), max(blocks) + 1, dtype=torch.int32)
        shape = (num_blocks, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_DIM)
        self.cache = torch.full(shape, float("nan"), dtype=dtype)
        if layout == "LBNHC":
            self.cache = self.cache.transpose(1, 2).contiguous().transpose(1, 2)
        rows = torch.randn(num_tokens + NUM_PADDING, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM).to(dtype)
        parts = rows.split([NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM], 1)
        self.query, self.key, self.value = (x.unflatten(1, (-1, HEAD_DIM)) for x in parts)
        slots = []
        for b, (count, context) in enumerate(lengths):
            table, free = free[: blocks[b]], free[blocks[b] :]
            self.tables[b, : blocks[b]] = table
            places = (table.long().unsqueeze(1) * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()[:context]
            past = torch.randn(2, context - count, NUM_KV_HEADS, HEAD_DIM).to(dtype)
            reference.store_kv(past[0], past[1], *self.halves(), places[: context - count])
            slots.append(places[context - count :])
        self.slots = torch.cat(slots)
        self.cu_seqlens_q = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
        self.context_lens = torch.tensor(contexts, dtype=torch.int32)
        self.num_tokens = num_tokens

    def halves(self) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.cache.transpose(1, 2).split(HEAD_DIM, -1)
        return keys, values

    def described(self) -> CommonAttentionMetadata:
        return CommonAttentionMetadata(
            query_start_loc=self.cu_seqlens_q,
            query_start_loc_cpu=self.cu_seqlens_q,
            seq_lens=self.context_lens,
            num_reqs=len(self.lengths),
            num_actual_tokens=self.num_tokens,
            max_query_len=max(q for q, _ in self.lengths),
            max_seq_len=max(c for _, c in self.lengths),
            block_table_tensor=self.tables,
            slot_mapping=self.slots,
        )

    def expected(self, window: int | None, soft_cap: float | None) -> torch.Tensor:
        """Of the reference, after it has stored the step in a copy of the cache."""
        keys, values = (x.clone() for x in self.halves())
        reference.store_kv(self.key[: self.num_tokens], self.value[: self.num_tokens], keys, values, self.slots)
        layout = (self.cu_seqlens_q, self.context_lens, self.tables)
        query = self.query[: self.num_tokens]
        return reference.paged_attention(query, keys, values, *layout, 0.3, window, None, None, soft_cap)


def built(builder: type, step: CommonAttentionMetadata) -> PagedMetadata:
    """By a builder that has seen no engine."""
    made: PagedMetadata = builder.__new__(builder).build(0, step)
    return made


def layer(name: str, **changed: Any) -> PagedAttentionImpl:
    arguments: dict[str, Any] = {
        "num_heads": NUM_HEADS,
        "head_size": HEAD_DIM,
        "scale": 0.3,
        "num_kv_heads": NUM_KV_HEADS,
    }
    return LAYERS[name][0](**(arguments | changed))


def check(name: str, dtype: torch.dtype, layout: str, window: int | None, soft_cap: float | None) -> None:
    step = Step(dtype, layout)
    expected = step.expected(window, soft_cap)
    impl = layer(name, sliding_window=window, logits_soft_cap=soft_cap)
    metadata = built(LAYERS[name][1], step.described())
    assert metadata.num_decodes == 2
    impl.do_kv_cache_update(torch.nn.Module(), step.key, step.value, step.cache, step.slots)
    output = torch.full_like(step.query, float("nan"), memory_format=torch.contiguous_format)
    returned = impl.forward(torch.nn.Module(), step.query, step.key, step.value, step.cache, metadata, output)
    assert returned is output
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(output[: step.num_tokens], expected, rtol=tolerance, atol=tolerance)
    assert bool(output[step.num_tokens :].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC"])
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (9, None), (None, 2.0), (9, 2.0)])
def test_a_gpus_layer(
    dtype: torch.dtype, layout: str, window: int | None, soft_cap: float | None, kernels: None
) -> None:
    check("cuda", dtype, layout, window, soft_cap)


def test_a_step_of_decodes_that_a_cuda_graph_has_padded(kernels: None) -> None:
    step = Step(torch.float32, "LBHNC", [(1, 37), (1, 5), (0, 0), (0, 0)])
    expected = step.expected(None, None)
    described = step.described()
    described.num_actual_tokens, described.max_query_len = 4, 1
    metadata = built(CudaMetadataBuilder, described)
    assert metadata.num_decodes == 4
    impl = layer("cuda")
    slots = torch.cat([step.slots, step.slots.new_full((2,), -1)])
    impl.do_kv_cache_update(torch.nn.Module(), step.key, step.value, step.cache, slots)
    output = torch.full_like(step.query, float("nan"), memory_format=torch.contiguous_format)
    impl.forward(torch.nn.Module(), step.query, step.key, step.value, step.cache, metadata, output)
    torch.testing.assert_close(output[:2], expected, rtol=1e-5, atol=1e-5)
    assert bool(output[2:].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC"])
@pytest.mark.parametrize("window", [None, 9])
def test_a_processors_layer(dtype: torch.dtype, layout: str, window: int | None) -> None:
    check("cpu", dtype, layout, window, None)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    ("lacking", "changed"),
    [
        ("heads of 12", {"head_size": 12}),
        ("a KV cache in fp8", {"kv_cache_dtype": "fp8"}),
        ("encoder_only", {"attn_type": "encoder_only"}),
        ("ALiBi", {"alibi_slopes": [0.5] * NUM_HEADS}),
        ("sinks", {"sinks": torch.zeros(NUM_HEADS)}),
    ],
)
def test_a_layer_refuses_what_it_lacks(name: str, lacking: str, changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=lacking):
        layer(name, **changed)


def test_a_step_that_is_not_causal_is_refused() -> None:
    with pytest.raises(NotImplementedError):
        built(CudaMetadataBuilder, Step(torch.float32, "LBHNC").described().replace(causal=False))
