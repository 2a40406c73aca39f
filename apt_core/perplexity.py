"""How well a model predicts a text, and how often it chooses the token that another one chooses."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from apt_core.kv_cache import allocate_kv_cache
from apt_core.metadata import AttentionMetadata
from apt_core.models.decoder import DecoderForCausalLM


@dataclass(frozen=True)
class Measured:
    """What one model made of a text."""

    loss: float
    """Mean negative log-likelihood of the next token."""
    choices: torch.Tensor
    """[positions] the most likely next tokens."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)

    def over(self, exact: Measured) -> float:
        """By which part the perplexity lies above another model's."""
        return math.exp(self.loss - exact.loss) - 1

    def agreement(self, exact: Measured) -> float:
        """Share of the positions at which both choose the same token."""
        return (self.choices == exact.choices).double().mean().item()


@torch.inference_mode()
def measure(model: DecoderForCausalLM, windows: list[torch.Tensor], kv_dtype: torch.dtype | None = None) -> Measured:
    """Loss and choices over windows of token ids [T], each a sequence of its own.

    Args:
        model: on a processor.
        windows: of any lengths from 2 on; every token of a window but the first is predicted.
        kv_dtype: of a KV cache that keys and values pass through; None attends to them as they are.
    """
    losses, choices = [], []
    for ids in windows:
        metadata, cache = AttentionMetadata.for_full_sequences([len(ids)]), None
        if kv_dtype is not None:
            slots = torch.arange(len(ids))
            metadata = replace(metadata, block_tables=torch.zeros(1, 1, dtype=torch.int32), slot_mapping=slots)
            cache = allocate_kv_cache(
                model.config, num_blocks=1, block_size=len(ids), dtype=kv_dtype, device=torch.device("cpu")
            )
        hidden = model(model.embed(ids), torch.arange(len(ids)), metadata, cache)
        logits = model.logits(hidden[:-1]).float()
        losses.append(F.cross_entropy(logits, ids[1:]).item())
        choices.append(logits.argmax(-1))
    return Measured(sum(losses) / len(losses), torch.cat(choices))
