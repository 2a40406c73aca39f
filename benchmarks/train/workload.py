"""What is trained: the shape of a model, its first weights, and packed batches of random tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from apt_core.checkpoint.hf_config import parse_model_config
from apt_core.document import Document as ConfigDocument
from apt_core.model_config import ModelConfig
from apt_core.models.decoder import DecoderForCausalLM
from apt_train.data.batch import MicroBatch
from apt_train.data.packing import pack
from apt_train.data.stream import Document, Position
from apt_train.model import initialise
from benchmarks.models import SHAPES, SMOLLM2_135M

DEBUG = SMOLLM2_135M | {
    "head_dim": 32,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
}
"""That of configs/debug.toml: nearly all of it is embedding and output head."""
MODELS: dict[str, dict[str, Any]] = {"debug": DEBUG, **SHAPES}
LENGTH_SPREAD = 1.0
"""Standard deviation of the logarithm of documents' lengths: web text has about that."""


@dataclass(frozen=True)
class Workload:
    """Batches of one step of the optimizer."""

    num_tokens: int
    """Of a micro-batch (T); none of it is padding."""
    num_micro_batches: int = 1
    median_length: int = 250
    """Of the documents, in tokens; those that do not fit are cut."""

    @property
    def step_tokens(self) -> int:
        """Of all micro-batches."""
        return self.num_tokens * self.num_micro_batches

    def steps(self, vocab_size: int, seed: int = 0) -> Iterator[list[MicroBatch]]:
        """Micro-batches of one step after the other, without end."""
        packed = pack(self._documents(vocab_size, seed), self.num_tokens, self.num_tokens, cut=True)
        while True:
            yield [each.batch for each in itertools.islice(packed, self.num_micro_batches)]

    def _documents(self, vocab_size: int, seed: int) -> Iterator[Document]:
        generator = np.random.default_rng(seed)
        for index in itertools.count():
            length = max(int(generator.lognormal(np.log(self.median_length), LENGTH_SPREAD)), 2)
            ids = generator.integers(0, vocab_size, length)
            yield Document(ids, np.ones(length, dtype=np.bool_), Position(document=index))


def mean_context(batches: list[MicroBatch]) -> float:
    """Tokens that a query attends to on average."""
    lengths = torch.cat([batch.cu_seqlens.diff() for batch in batches]).double()
    return float((lengths * (lengths + 1) / 2).sum() / lengths.sum())


def model_config(name: str, num_layers: int | None = None) -> ModelConfig:
    """One of MODELS, perhaps with another number of layers."""
    config = parse_model_config(ConfigDocument(MODELS[name], name))
    return config if num_layers is None else replace(config, num_layers=num_layers)


def first_weights(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random float32 weights by name, as training from scratch begins with."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DecoderForCausalLM(config)
        initialise(model, 0.02)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
