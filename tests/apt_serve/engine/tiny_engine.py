"""Tiny random models behind a real engine, and the naive ways to continue a prompt with them.

One is exact in float64, made of torch's ops. The others are what a processor serves: the C++ ops, weights packed.
"""

import time
from dataclasses import replace
from functools import lru_cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from apt_core.kv_cache import allocate_kv_cache
from apt_core.metadata import AttentionMetadata
from apt_core.model_config import ModelConfig
from apt_core.models.decoder import fuse_projections, pack_linears
from apt_core.registry import build_model
from apt_core.tokenizer import HFTokenizer
from apt_kernels import ops
from apt_serve.engine.client import ModelInfo
from apt_serve.engine.config import EngineConfig
from apt_serve.engine.engine import Engine
from apt_serve.engine.load import LoadedModel
from apt_serve.engine.model_runner import ModelRunner

VOCAB_SIZE = 256
EOS = 129
MAX_MODEL_LEN = 96
CPU = torch.device("cpu")
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=MAX_MODEL_LEN,
    rms_norm_eps=1e-6,
)
NATIVE_CONFIG = replace(CONFIG, hidden_size=64, intermediate_size=96, head_dim=16)
"""Of a shape that the C++ ops serve."""
VERSION = "1-a"
"""Of the tiny model's weights."""


@lru_cache
def tiny_model(dtype=torch.float64, config=CONFIG, seed=0):
    """Weights wide enough that greedy output varies with the prompt."""
    generator = torch.Generator().manual_seed(seed)
    model = build_model(config, "cpu").to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    model.eval().requires_grad_(False)
    fuse_projections(model)
    return model


@lru_cache
def tiny_native_model(dtype, precision=None):
    """As a processor serves it: packed weights, and in bfloat16 all layers as one C++ op."""
    model = tiny_model.__wrapped__(dtype, NATIVE_CONFIG)
    pack_linears(model, precision)
    return model


@lru_cache
def tiny_tokenizer():
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return HFTokenizer(tokenizer, chat_template=None, file="tiny")


def tiny_engine(
    metrics=None, executor=None, num_kv_blocks=64, model=None, pads_decodes=False, max_steps_in_flight=1, **settings
):
    """A real engine over a tiny model, the exact one if none is given."""
    model = model or tiny_model()
    settings = {"block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 32} | settings
    config = EngineConfig(num_kv_blocks=num_kv_blocks, **settings)
    kv_cache = empty_cache(model, num_kv_blocks, config.block_size, config.kv_cache_dtype)
    info = ModelInfo(
        name="tiny",
        created=int(time.time()),
        max_model_len=min(MAX_MODEL_LEN, num_kv_blocks * config.block_size),
        max_num_choices=config.max_num_seqs + config.max_waiting_requests,
        vocab_size=VOCAB_SIZE,
        tokenizer=tiny_tokenizer(),
        eos_token_ids=frozenset({EOS}),
        default_sampling={},
        weight_version=VERSION,
    )
    runner = ModelRunner(
        model,
        kv_cache,
        max_num_seqs=config.max_num_seqs,
        max_model_len=info.max_model_len,
        eos_token_ids=info.eos_token_ids,
        weight_version=VERSION,
        pads_decodes=pads_decodes,
        max_steps_in_flight=max_steps_in_flight,
    )
    return Engine(config, metrics, model=LoadedModel(info, executor(runner) if executor else runner, num_kv_blocks))


def empty_cache(model, num_blocks, block_size, kv_cache_dtype="auto"):
    """A KV cache, for auto of the model's own dtype."""
    is_auto = kv_cache_dtype == "auto"
    dtype = model.model.embed_tokens.weight.dtype if is_auto else getattr(torch, kv_cache_dtype)
    return allocate_kv_cache(model.config, num_blocks=num_blocks, block_size=block_size, dtype=dtype, device=CPU)


def naive_logits(token_ids, model=None):
    """Logits [T, V] of a full recompute without any cache."""
    with torch.inference_mode():
        model = model or tiny_model()
        metadata = AttentionMetadata.for_full_sequences([len(token_ids)])
        hidden = model(model.embed(torch.tensor(token_ids)), torch.arange(len(token_ids)), metadata)
        return model.logits(hidden)


def naive_greedy(prompt, max_tokens, *, stops_at_eos=True, model=None):
    """Greedy continuation, recomputing everything for each token."""
    token_ids = list(prompt)
    while len(token_ids) - len(prompt) < max_tokens:
        token_ids.append(int(naive_logits(token_ids, model)[-1].argmax()))
        if stops_at_eos and token_ids[-1] == EOS:
            break
    return token_ids[len(prompt) :]


def naive_paged_logits(model, token_ids, kv_cache_dtype="auto"):
    """Logits [1, V] after the last token of a full recompute in one go, by the ops that a step is made of."""
    num_tokens = len(token_ids)
    positions = torch.arange(num_tokens)
    metadata = replace(
        AttentionMetadata.for_full_sequences([num_tokens]),
        block_tables=torch.zeros(1, 1, dtype=torch.int32),
        slot_mapping=positions,
    )
    with torch.inference_mode():
        embedded = model.embed(torch.tensor(token_ids))
        hidden = model(embedded, positions, metadata, empty_cache(model, 1, MAX_MODEL_LEN, kv_cache_dtype))
        return model.logits(hidden[-1:]).float()


def naive_paged_greedy(model, prompt, max_tokens, kv_cache_dtype="auto"):
    """Greedy continuation, recomputing everything for each token: (token id, its log-probability) each."""
    token_ids, found = list(prompt), []
    while len(found) < max_tokens:
        logits = naive_paged_logits(model, token_ids, kv_cache_dtype)
        chosen = ops.argmax(logits)
        found.append((int(chosen), float(ops.top_logprobs(logits, chosen, 0)[0])))
        token_ids.append(int(chosen))
        if token_ids[-1] == EOS:
            break
    return found
