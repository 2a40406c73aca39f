"""Post-load transform: the ranks' parts of a decoder, joined so that each rank's model answers for the whole."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from apt_core.layers.linear import Embedding, Linear
from apt_core.layers.parallel import GatheredLinear, SummedLinear, VocabularyEmbedding
from apt_core.model_config import ModelConfig
from apt_core.models.decoder import DecoderForCausalLM
from apt_core.models.sharding import Shard, Split
from apt_core.parallel import Communicator


def join_ranks(model: DecoderForCausalLM, whole: ModelConfig, shard: Shard, communicator: Communicator) -> None:
    """Put the sums and gathers that the plan asks for around a rank's layers; fuse and pack the layers before.

    From then on all ranks must run the model on the same tokens, and all get the same hidden states and logits.

    Args:
        model: built from ``shard.config(whole)``; its config gets the whole vocabulary again.
    """
    for name, module in list(model.named_modules()):
        sharded = shard.plan.find(name)
        if sharded is not None and sharded.split is Split.INPUTS:
            model.set_submodule(name, SummedLinear(module, communicator))
    embedding = model.model.embed_tokens
    assert isinstance(embedding, Embedding)
    head = model.lm_head if model.lm_head is not None else _tied_head(embedding)
    model.lm_head = GatheredLinear(head, whole.vocab_size, communicator)
    first, _ = shard.span(whole.vocab_size)
    model.model.set_submodule("embed_tokens", VocabularyEmbedding(embedding, first, communicator))
    model.config = replace(model.config, vocab_size=whole.vocab_size)


def _tied_head(embedding: nn.Embedding) -> Linear:
    rows, size = embedding.weight.shape
    head = Linear(size, rows, bias=False, device="meta")
    head.weight = embedding.weight
    return head
