"""Who trains: APT's trainer, and a plain loop over transformers' Llama. Both take the same weights and batches."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from apt_core.model_config import ModelConfig
from apt_core.models.decoder import DecoderForCausalLM
from apt_train.config import OptimizerSettings, ParallelSettings
from apt_train.data.batch import UNSCORED, MicroBatch
from apt_train.loop import AUTOCAST, Trainer
from apt_train.loss import ModelWithLoss
from apt_train.optimizer import build_optimizers
from apt_train.parallel.parallelize import recompute_and_compile

CPU = torch.device("cpu")
OPTIMIZER = OptimizerSettings()


class Side(Protocol):
    """One that trains."""

    def step(self, batches: list[MicroBatch]) -> float:
        """One step of the optimizer; the mean loss."""


class Apt:
    """apt_train as it is."""

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, torch.Tensor], precision: str, *, compiles: bool = False
    ) -> None:
        model = DecoderForCausalLM(config)
        model.load_state_dict(weights)
        with_loss = ModelWithLoss(model)
        if compiles:
            recompute_and_compile(with_loss, ParallelSettings(), compiles=True)
        self._trainer = Trainer(
            with_loss,
            build_optimizers(with_loss, OPTIMIZER),
            lambda step: OPTIMIZER.learning_rate,
            device=CPU,
            precision=precision,
            max_grad_norm=OPTIMIZER.max_grad_norm,
        )

    def step(self, batches: list[MicroBatch]) -> float:
        """See `Side`."""
        return self._trainer.step(0, batches).loss


class TransformersLoop:
    """The loop that one writes by hand: autocast, SDPA, fused AdamW, the same groups and the same clipping.

    Args:
        is_packed: one row with a mask between documents; else a row a document, padded at the end to the longest, which
            causal attention needs no mask for.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, torch.Tensor],
        precision: str,
        *,
        is_packed: bool,
        compiles: bool = False,
    ) -> None:
        self._model: Any = LlamaForCausalLM(_llama_config(config))
        self._model.load_state_dict(weights, strict=False)  # a tied head is the embedding
        self._model.train()
        if compiles:
            for layer in self._model.model.layers:
                layer.compile()
        parameters = list(self._model.parameters())
        self._parameters = parameters
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": OPTIMIZER.weight_decay},
                {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
            ],
            lr=OPTIMIZER.learning_rate,
            betas=OPTIMIZER.betas,
            eps=OPTIMIZER.eps,
            fused=True,
        )
        self._is_packed = is_packed
        self._autocast = AUTOCAST.get(precision)

    def step(self, batches: list[MicroBatch]) -> float:
        """See `Side`."""
        num_scored = sum(batch.num_scored for batch in batches)
        total = 0.0
        self._optimizer.zero_grad()
        for batch in batches:
            loss = self._loss(batch) / num_scored
            loss.backward()
            total += loss.item()
        assert OPTIMIZER.max_grad_norm is not None
        torch.nn.utils.clip_grad_norm_(self._parameters, OPTIMIZER.max_grad_norm)
        self._optimizer.step()
        return total

    def _loss(self, batch: MicroBatch) -> torch.Tensor:
        rows = _packed(batch) if self._is_packed else _padded(batch)
        with torch.autocast("cpu", self._autocast, enabled=self._autocast is not None):
            logits = self._model(**rows, use_cache=False).logits
        labels = batch.labels
        if not self._is_packed:
            labels, logits = _rows(batch, labels, UNSCORED), logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=UNSCORED, reduction="sum")


def _packed(batch: MicroBatch) -> dict[str, torch.Tensor]:
    return {"input_ids": batch.input_ids[None], "position_ids": batch.positions[None]}


def _padded(batch: MicroBatch) -> dict[str, torch.Tensor]:
    return {"input_ids": _rows(batch, batch.input_ids, 0)}


def _rows(batch: MicroBatch, values: torch.Tensor, fill: int) -> torch.Tensor:
    """[T] -> [documents, longest]."""
    spans = [values[start:end] for start, end in pairwise(batch.cu_seqlens.tolist()) if end > start]
    return pad_sequence(spans, batch_first=True, padding_value=fill)


def _llama_config(config: ModelConfig) -> Any:
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
        tie_word_embeddings=config.tie_word_embeddings,
        attn_implementation="sdpa",  # type: ignore[call-arg]
    )
