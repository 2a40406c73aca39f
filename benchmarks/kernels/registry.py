"""All ops that are measured, on processors and GPUs alike: what differs is the sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.kernels import attention, layer, linear, sampling, training
from benchmarks.kernels.case import Case
from benchmarks.kernels.sizes import Sizes

GROUPS: dict[str, Callable[[Sizes, torch.device], Iterator[Case]]] = {
    "attention": attention.cases,
    "linear": linear.cases,
    "layer": layer.cases,
    "training": training.cases,
    "sampling": sampling.cases,
}


def cases(sizes: Sizes, device: torch.device, groups: Sequence[str] = tuple(GROUPS), only: str = "") -> Iterator[Case]:
    """The cases of some groups whose op or shape contains a text, in order."""
    for group in groups:
        yield from (case for case in GROUPS[group](sizes, device) if only in case.name)
