"""The same function with other weights: each input channel of a layer scaled at random, what feeds it scaled back.

Weights that were in 4 bits once, as the embedded model's, lie on a grid that quantizing finds again. Scaled by channel
they lie on none, with outliers where they were: this shows what 4 bits cost a model that never had them.
"""

from __future__ import annotations

import torch

from apt_core.models.channels import junctions
from apt_core.models.decoder import DecoderForCausalLM, DecoderLayer

LARGEST = 1.25
"""Factors lie between this and its inverse, evenly on a logarithmic scale: enough to move large weights by whole steps
of 4 bits, and too little to widen the range of a group much."""


def rescale(model: DecoderForCausalLM) -> None:
    """Scale the layers of a plain model, not yet fused, in place. The output head stays: 8 bits are its least."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        assert isinstance(layer, DecoderLayer)
        for junction in junctions(layer):
            junction.scale(LARGEST ** (2 * torch.rand(junction.num_channels, generator=generator) - 1))
