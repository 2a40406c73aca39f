"""All layers as one op give, bit for bit, what the same ops give one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from apt_core.kv_cache import LayerKVCache, allocate_kv_cache
from apt_core.metadata import AttentionMetadata
from apt_core.model_config import ModelConfig
from apt_core.models.decoder import DecoderForCausalLM, fuse_projections, pack_linears
from apt_core.models.linked import link_layers
from apt_core.registry import build_model
from apt_kernels.cpu import native

pytestmark = pytest.mark.skipif(not native.is_enabled(), reason="the C++ ops are off")

CPU = torch.device("cpu")
BLOCK_SIZE, NUM_BLOCKS = 8, 16
LLAMA = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
)
CONFIGS = {
    "llama": LLAMA,
    "biases": replace(LLAMA, qkv_bias=True, attention_out_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "query and key norms": replace(LLAMA, qk_norm=True, head_dim=32),
    "windows": replace(LLAMA, sliding_windows=(None, 5, None)),
}


def random_model(config: ModelConfig) -> DecoderForCausalLM:
    torch.manual_seed(0)
    model = build_model(config, "cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.3)
    return model.to(torch.bfloat16).eval().requires_grad_(False)


Sequences = list[tuple[int, int]]
"""Of each, so many queries at the end of so long a context; sequence b is in row ROWS[b] of a batch of 4."""
ROWS = (2, 0)
STEPS: list[Sequences] = [[(20, 20), (9, 9)], [(1, 21), (14, 23)]]
"""Two prompts, then a decode with a chunk."""


def batch_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [4, 64], and block tables in which each row has blocks of its own."""
    torch.manual_seed(1)
    token_ids = torch.randint(0, LLAMA.vocab_size, (4, 64))
    return token_ids, torch.arange(NUM_BLOCKS, dtype=torch.int32).flip(0).view(4, -1)


def run_single(model: DecoderForCausalLM, cache: list[LayerKVCache]) -> list[torch.Tensor]:
    """Hidden states and last tokens' logits of each step, by the model's own ops over packed tensors."""
    token_ids, block_tables = batch_rows()
    outputs = []
    for lengths in STEPS:
        tables = block_tables[list(ROWS)]
        places = [(b, p) for b, (queries, context) in enumerate(lengths) for p in range(context - queries, context)]
        slots = [tables[b, p // BLOCK_SIZE].item() * BLOCK_SIZE + p % BLOCK_SIZE for b, p in places]
        ends = torch.tensor([0, *(q for q, _ in lengths)]).cumsum(0)
        step = AttentionMetadata(
            cu_seqlens_q=ends.to(torch.int32),
            context_lens=torch.tensor([c for _, c in lengths], dtype=torch.int32),
            max_seqlen_q=max(q for q, _ in lengths),
            max_context_len=max(c for _, c in lengths),
            num_decodes=sum(q == 1 for q, _ in lengths),
            block_tables=tables,
            slot_mapping=torch.tensor(slots),
        )
        ids = torch.stack([token_ids[ROWS[b], p] for b, p in places])
        hidden = model(model.embed(ids), torch.tensor([p for _, p in places]), step, cache)
        outputs += [hidden, model.logits(hidden[ends[1:] - 1])]
    return outputs


def run_linked(model: DecoderForCausalLM, cache: list[LayerKVCache]) -> list[torch.Tensor]:
    linked = link_layers(model, cache, max_positions=64)
    assert linked is not None
    outputs = []
    for lengths in STEPS:
        hidden, logits = linked.step(*batch_rows(), **arguments(lengths), sampled=[0, 1])
        outputs += [hidden, model.logits(hidden[last_rows(lengths)]) if logits is None else logits]
    return outputs


def arguments(lengths: Sequences) -> dict[str, list[int]]:
    return {"slots": list(ROWS), "starts": [c - q for q, c in lengths], "lengths": [q for q, _ in lengths]}


def last_rows(lengths: Sequences) -> torch.Tensor:
    return torch.tensor([q for q, _ in lengths]).cumsum(0) - 1


def empty_cache(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> list[LayerKVCache]:
    return allocate_kv_cache(config, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, dtype=dtype, device=CPU)


def packed_model(config: ModelConfig, precision: str | None = None, **settings: str) -> DecoderForCausalLM:
    model = random_model(config)
    fuse_projections(model)
    pack_linears(model, precision, **settings)
    return model


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("precision", [None, "int8", "int4"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_linked_layers_equal_the_single_ops(config: ModelConfig, precision: str | None, kv_dtype: torch.dtype) -> None:
    model = packed_model(config, precision)
    single_cache, linked_cache = empty_cache(config, kv_dtype), empty_cache(config, kv_dtype)
    for ours, expected in zip(run_linked(model, linked_cache), run_single(model, single_cache), strict=True):
        assert expected.isfinite().all() and torch.equal(ours, expected)
    for ours, expected in zip(linked_cache, single_cache, strict=True):
        assert torch.equal(ours.keys, expected.keys) and torch.equal(ours.values, expected.values)
        if kv_dtype == torch.int8:
            assert ours.key_scales is not None and ours.value_scales is not None
            assert torch.equal(ours.key_scales, expected.key_scales) and ours.key_scales.any()
            assert torch.equal(ours.value_scales, expected.value_scales) and ours.value_scales.any()


def test_a_head_without_a_cpp_product_stays_single() -> None:
    model = packed_model(LLAMA, "int8", head_precision="float32")
    linked = link_layers(model, empty_cache(LLAMA), max_positions=64)
    assert linked is not None
    assert linked.step(*batch_rows(), **arguments(STEPS[0]), sampled=[1])[1] is None
    for ours, expected in zip(
        run_linked(model, empty_cache(LLAMA)), run_single(model, empty_cache(LLAMA)), strict=True
    ):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("sampled", [[], [0], [1], [0, 1]], ids=str)
def test_logits_are_those_of_the_sequences_that_sample(sampled: list[int]) -> None:
    model, cache = packed_model(LLAMA), empty_cache(LLAMA)
    expected = run_single(model, empty_cache(LLAMA))[1]
    linked = link_layers(model, cache, max_positions=64)
    assert linked is not None
    logits = linked.step(*batch_rows(), **arguments(STEPS[0]), sampled=sampled)[1]
    assert logits is not None and torch.equal(logits, expected[sampled])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_without_cpp_products_stay_single(dtype: torch.dtype) -> None:
    model = random_model(LLAMA).to(dtype)
    fuse_projections(model)
    pack_linears(model)
    assert link_layers(model, empty_cache(LLAMA), max_positions=64) is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"slots": [2, 4]}, "slots"),
        ({"slots": [-1, 0]}, "slots"),
        ({"starts": [-1, 0]}, "lengths"),
        ({"lengths": [20, 0]}, "lengths"),
        ({"lengths": [20, 33]}, "lengths"),  # four blocks of eight
        ({"lengths": [20]}, "lengths"),
        ({"sampled": [2]}, "sampled"),
    ],
    ids=str,
)
def test_rows_that_do_not_exist_are_refused(change: dict[str, list[int]], named: str) -> None:
    linked = link_layers(packed_model(LLAMA), empty_cache(LLAMA), max_positions=64)
    assert linked is not None
    with pytest.raises(RuntimeError, match=named):
        linked.step(*batch_rows(), **({"sampled": []} | arguments(STEPS[0]) | change))


def test_a_position_beyond_the_last_is_refused() -> None:
    linked = link_layers(packed_model(LLAMA), empty_cache(LLAMA), max_positions=19)
    assert linked is not None
    with pytest.raises(RuntimeError, match="lengths: sequence 0 ends at 20 of 19"):
        linked.step(*batch_rows(), **arguments(STEPS[0]), sampled=[])


@pytest.mark.parametrize("wrong", [-1, LLAMA.vocab_size])
def test_a_token_outside_of_the_vocabulary_is_refused(wrong: int) -> None:
    linked = link_layers(packed_model(LLAMA), empty_cache(LLAMA), max_positions=64)
    assert linked is not None
    token_ids, block_tables = batch_rows()
    token_ids[0, 8] = wrong
    with pytest.raises(RuntimeError, match="token_ids"):
        linked.step(token_ids, block_tables, **arguments(STEPS[0]), sampled=[])


@pytest.mark.parametrize("wrong", [-1, NUM_BLOCKS])
def test_a_table_that_names_no_block_is_refused(wrong: int) -> None:
    linked = link_layers(packed_model(LLAMA), empty_cache(LLAMA), max_positions=64)
    assert linked is not None
    token_ids, block_tables = batch_rows()
    block_tables[0, 1] = wrong
    with pytest.raises(RuntimeError, match="block_tables"):
        linked.step(token_ids, block_tables, **arguments(STEPS[0]), sampled=[])
