"""A tiny random model, exact in float64, behind a real engine; and the naive way to continue a prompt with it."""

import time
from functools import lru_cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from apt_core.kv_cache import allocate_kv_cache
from apt_core.metadata import AttentionMetadata
from apt_core.model_config import ModelConfig
from apt_core.models.decoder import fuse_projections
from apt_core.registry import build_model
from apt_core.tokenizer import HFTokenizer
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


@lru_cache
def tiny_model(dtype=torch.float64):
    """Weights wide enough that greedy output varies with the prompt."""
    generator = torch.Generator().manual_seed(0)
    model = build_model(CONFIG, "cpu").to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    model.eval().requires_grad_(False)
    fuse_projections(model)
    return model


@lru_cache
def tiny_tokenizer():
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return HFTokenizer(tokenizer, chat_template=None, file="tiny")


def tiny_engine(metrics=None, executor=None, num_kv_blocks=64, **settings):
    """A real engine over the tiny model."""
    settings = {"block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 32} | settings
    config = EngineConfig(num_kv_blocks=num_kv_blocks, **settings)
    kv_cache = allocate_kv_cache(
        CONFIG, num_blocks=num_kv_blocks, block_size=config.block_size, dtype=torch.float64, device=CPU
    )
    info = ModelInfo(
        name="tiny",
        created=int(time.time()),
        max_model_len=min(MAX_MODEL_LEN, num_kv_blocks * config.block_size),
        max_num_choices=config.max_num_seqs + config.max_waiting_requests,
        vocab_size=VOCAB_SIZE,
        tokenizer=tiny_tokenizer(),
        eos_token_ids=frozenset({EOS}),
        default_sampling={},
    )
    runner = ModelRunner(
        tiny_model(),
        kv_cache,
        max_num_seqs=config.max_num_seqs,
        max_model_len=info.max_model_len,
        eos_token_ids=info.eos_token_ids,
    )
    return Engine(config, metrics, model=LoadedModel(info, executor(runner) if executor else runner, num_kv_blocks))


def naive_logits(token_ids):
    """Logits [T, V] of a full recompute without any cache."""
    with torch.inference_mode():
        model = tiny_model()
        metadata = AttentionMetadata.for_full_sequences([len(token_ids)])
        hidden = model(model.embed(torch.tensor(token_ids)), torch.arange(len(token_ids)), metadata)
        return model.logits(hidden)


def naive_greedy(prompt, max_tokens, *, stops_at_eos=True):
    """Greedy continuation, recomputing everything for each token."""
    token_ids = list(prompt)
    while len(token_ids) - len(prompt) < max_tokens:
        token_ids.append(int(naive_logits(token_ids)[-1].argmax()))
        if stops_at_eos and token_ids[-1] == EOS:
            break
    return token_ids[len(prompt) :]
