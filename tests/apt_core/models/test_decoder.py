"""Logits of every family equal transformers' on small random weights."""

import pytest
import torch
import transformers

from apt_core.checkpoint import load_into, open_checkpoint
from apt_core.kv_cache import allocate_kv_cache
from apt_core.metadata import AttentionMetadata
from apt_core.models.decoder import fuse_projections, pack_linears
from apt_core.registry import build_model

SHAPE = dict(
    vocab_size=320,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=0,
    eos_token_id=1,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64)
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "llama, tied": lambda: transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama, biases": lambda: transformers.LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "llama, llama3 rope": lambda: transformers.LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "llama, yarn rope": lambda: transformers.LlamaConfig(**SHAPE, rope_parameters=YARN),
    "llama, linear rope": lambda: transformers.LlamaConfig(
        **SHAPE, rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0)
    ),
    "mistral, sliding window": lambda: transformers.MistralConfig(**SHAPE, sliding_window=9),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE),
    "qwen2, window in later layers": lambda: transformers.Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=7, max_window_layers=1
    ),
    "qwen3, head_dim of its own": lambda: transformers.Qwen3Config(**SHAPE, head_dim=24),
    "qwen3, tied": lambda: transformers.Qwen3Config(**SHAPE, head_dim=8, tie_word_embeddings=True),
}
LENGTH = 90


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES.keys())
def saved(request, tmp_path_factory, tiny_tokenizer):
    """(checkpoint folder, token ids, logits of transformers)."""
    torch.manual_seed(0)
    reference = transformers.AutoModelForCausalLM.from_config(request.param(), attn_implementation="eager").eval()
    for name, parameter in reference.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    folder = tmp_path_factory.mktemp("model")
    reference.save_pretrained(folder)
    tiny_tokenizer.save(str(folder / "tokenizer.json"))
    ids = torch.randint(0, SHAPE["vocab_size"], (LENGTH,))
    with torch.no_grad():
        return folder, ids, reference(ids[None]).logits[0]


def load(folder, *transforms):
    checkpoint = open_checkpoint(str(folder))
    model = build_model(checkpoint.config)
    load_into(model, checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    model.eval().requires_grad_(False)
    for transform in transforms:
        transform(model)
    return model


@pytest.mark.parametrize("transforms", [(), (fuse_projections,), (fuse_projections, pack_linears)])
def test_logits_equal_transformers(saved, transforms):
    folder, ids, expected = saved
    model = load(folder, *transforms)
    metadata = AttentionMetadata.for_full_sequences([LENGTH])
    logits = model.logits(model(model.embed(ids), torch.arange(LENGTH), metadata))
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


def test_logits_over_a_paged_cache_in_chunks_equal_transformers(saved):
    folder, ids, expected = saved
    model = load(folder, fuse_projections, pack_linears)
    block_size, num_blocks = 8, 16
    cache = allocate_kv_cache(
        model.config, num_blocks=num_blocks, block_size=block_size, dtype=torch.float32, device=torch.device("cpu")
    )
    table = torch.randperm(num_blocks).to(torch.int32)[None]
    positions = torch.arange(LENGTH)
    slots = table[0, positions // block_size].long() * block_size + positions % block_size
    logits = []
    for start, end in ((0, 33), (33, 70), (70, 89), (89, 90)):
        metadata = AttentionMetadata(
            cu_seqlens_q=torch.tensor([0, end - start], dtype=torch.int32),
            context_lens=torch.tensor([end], dtype=torch.int32),
            max_seqlen_q=end - start,
            max_context_len=end,
            num_decodes=int(end - start == 1),
            block_tables=table,
            slot_mapping=slots[start:end],
        )
        hidden = model(model.embed(ids[start:end]), positions[start:end], metadata, cache)
        logits.append(model.logits(hidden))
    torch.testing.assert_close(torch.cat(logits), expected, rtol=0, atol=2e-5)


def test_packed_sequences_do_not_see_each_other(saved):
    folder, ids, _ = saved
    model = load(folder)
    both = AttentionMetadata.for_full_sequences([40, 50])
    positions = torch.cat((torch.arange(40), torch.arange(50)))
    together = model(model.embed(ids), positions, both)
    alone = model(model.embed(ids[40:]), torch.arange(50), AttentionMetadata.for_full_sequences([50]))
    torch.testing.assert_close(together[40:], alone, rtol=0, atol=2e-5)
