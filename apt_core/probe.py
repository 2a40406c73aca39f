"""What a model makes of a probe: computed by the trainer that publishes it, and again by the server that loads it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from apt_core.manifest import Probe
from apt_core.metadata import AttentionMetadata
from apt_core.models.decoder import DecoderForCausalLM

PROBE_TEXT = (
    "The capital of France is Paris. Water boils at 100 degrees Celsius. def add(a, b): return a + b\n"
    "Once upon a time there was a little girl who lived in a village near the forest."
)
MAX_PROBE_TOKENS = 64


@torch.inference_mode()
def probe_logprobs(model: DecoderForCausalLM, token_ids: Sequence[int]) -> list[float]:
    """Natural log-probability [T - 1] of each token after the first, given those before it."""
    device = model.model.embed_tokens.weight.device
    ids = torch.tensor(token_ids, dtype=torch.int64, device=device)
    metadata = AttentionMetadata.for_full_sequences([len(ids)], device)
    hidden = model(model.embed(ids), torch.arange(len(ids), device=device), metadata)
    logprobs = model.logits(hidden[:-1]).double().log_softmax(-1)
    found: list[float] = logprobs.gather(1, ids[1:, None]).squeeze(1).tolist()
    return found


def make_probe(model: DecoderForCausalLM, token_ids: Sequence[int]) -> Probe:
    """The probe that a model answers so."""
    return Probe(tuple(token_ids), tuple(probe_logprobs(model, token_ids)))


def mean_difference(probe: Probe, logprobs: Sequence[float]) -> float:
    """Mean absolute difference of log-probabilities in nats; NaN if one of them is."""
    differences = [abs(found - expected) for found, expected in zip(logprobs, probe.logprobs, strict=True)]
    return sum(differences) / len(differences)
