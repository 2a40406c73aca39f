"""All layers as one op give, bit for bit, what the same ops give one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from apt_core.kv_cache import LayerKVCache, allocate_kv_cache
from apt_core.metadata import AttentionMetadata
from apt_core.model_config import ModelConfig
from apt_core.models.decoder import DecoderForCausalLM, fuse_projections, link_layers, pack_linears
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


def metadata(lengths: list[tuple[int, int]]) -> AttentionMetadata:
    """Of sequences with so many queries at the end of so long a context, each in blocks of its own."""
    tables = torch.arange(NUM_BLOCKS, dtype=torch.int32).flip(0).view(len(lengths), -1)
    slots = [
        tables[b, position // BLOCK_SIZE].item() * BLOCK_SIZE + position % BLOCK_SIZE
        for b, (queries, context) in enumerate(lengths)
        for position in range(context - queries, context)
    ]
    return AttentionMetadata(
        cu_seqlens_q=torch.tensor([0, *(q for q, _ in lengths)]).cumsum(0).to(torch.int32),
        context_lens=torch.tensor([c for _, c in lengths], dtype=torch.int32),
        max_seqlen_q=max(q for q, _ in lengths),
        max_context_len=max(c for _, c in lengths),
        num_decodes=sum(q == 1 for q, _ in lengths),
        block_tables=tables,
        slot_mapping=torch.tensor(slots),
    )


def run(
    model: DecoderForCausalLM, kv_dtype: torch.dtype = torch.bfloat16
) -> tuple[list[torch.Tensor], list[LayerKVCache]]:
    """Two prompts, then a step that mixes a decode with a chunk."""
    torch.manual_seed(1)
    cache = allocate_kv_cache(model.config, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, dtype=kv_dtype, device=CPU)
    outputs = []
    for lengths in ([(20, 20), (9, 9)], [(1, 21), (14, 23)]):
        step = metadata(lengths)
        positions = torch.cat([torch.arange(c - q, c) for q, c in lengths])
        ids = torch.randint(0, model.config.vocab_size, (len(positions),))
        outputs.append(model.logits(model(model.embed(ids), positions, step, cache)))
    return outputs, cache


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("precision", [None, "int8", "int4"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_linked_layers_equal_the_single_ops(config: ModelConfig, precision: str | None, kv_dtype: torch.dtype) -> None:
    models = [random_model(config) for _ in range(2)]
    for model in models:
        fuse_projections(model)
        pack_linears(model, precision)
    link_layers(models[1])
    assert models[1].model.linked is not None and models[0].model.linked is None
    (single, single_cache), (linked, linked_cache) = (run(model, kv_dtype) for model in models)
    for ours, expected in zip(linked, single, strict=True):
        assert expected.isfinite().all() and torch.equal(ours, expected)
    for ours, expected in zip(linked_cache, single_cache, strict=True):
        assert torch.equal(ours.keys, expected.keys) and torch.equal(ours.values, expected.values)
        if kv_dtype == torch.int8:
            assert ours.key_scales is not None and ours.value_scales is not None
            assert torch.equal(ours.key_scales, expected.key_scales) and ours.key_scales.any()
            assert torch.equal(ours.value_scales, expected.value_scales) and ours.value_scales.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_without_cpp_products_stay_single(dtype: torch.dtype) -> None:
    model = random_model(LLAMA).to(dtype)
    fuse_projections(model)
    pack_linears(model)
    link_layers(model)
    assert model.model.linked is None


def test_a_table_that_names_no_block_is_refused() -> None:
    model = random_model(LLAMA)
    fuse_projections(model)
    pack_linears(model)
    link_layers(model)
    step = metadata([(3, 3), (2, 2)])
    assert step.block_tables is not None
    step.block_tables[1, 0] = NUM_BLOCKS
    cache = allocate_kv_cache(LLAMA, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, dtype=torch.bfloat16, device=CPU)
    with pytest.raises(RuntimeError, match="block_tables"):
        model(model.embed(torch.arange(5)), torch.arange(5), step, cache)
