"""All that a run must remember to go on as if it had never stopped: what a checkpoint holds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
"""One entry for each parameter by its name, whichever optimizer has it and however it is divided."""


@dataclass
class RunState:
    """Everything that changes while a run goes on. `parts` are saved and restored each by itself.

    Settings are not in it, and neither is the learning rate, which the step determines.
    """

    weights: Stateful
    optimizers: Stateful
    scaler: Stateful
    """Of the loss, for float16."""
    loader: Stateful
    stopping: Stateful
    monitor: Stateful
    step: int = 0
    """Steps done."""

    def parts(self) -> dict[str, Stateful]:
        """By the names they are stored under. All but model and optimizers are small and the same on all ranks."""
        return {
            "model": self.weights,
            "optimizers": self.optimizers,
            "scaler": self.scaler,
            "loader": self.loader,
            "stopping": self.stopping,
            "monitor": self.monitor,
            "random": RandomState(),
            "progress": self,
        }

    def state_dict(self) -> dict[str, Any]:
        """Of the part ``progress``."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As ``state_dict`` gave it."""
        self.step = int(state["step"])


@dataclass(frozen=True)
class ModelState:
    """The weights by their names in a single process's model; a divided one's are DTensors."""

    model: nn.Module

    def state_dict(self) -> dict[str, Any]:
        """References, not copies."""
        return get_model_state_dict(self.model)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Into the model as it is divided now."""
        set_model_state_dict(self.model, state)


@dataclass(frozen=True)
class OptimizerState:
    """Moments and counts by the names of their parameters."""

    model: nn.Module
    optimizers: Sequence[Optimizer]

    def state_dict(self) -> dict[str, Any]:
        """References, not copies; before the first step zeros."""
        return get_optimizer_state_dict(self.model, tuple(self.optimizers), options=_FLAT)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Into the optimizers as their parameters are divided now."""
        set_optimizer_state_dict(self.model, tuple(self.optimizers), state, options=_FLAT)


class RandomState:
    """Generators of torch, Python and numpy. Nothing in a step draws from them today; what does must stay in step."""

    def state_dict(self) -> dict[str, Any]:
        """Of this process: all of a run are seeded alike."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.empty(0, dtype=torch.uint8)
        return {
            "torch": torch.get_rng_state(),
            "cuda": cuda,
            "python": random.getstate(),
            "numpy": _numpy_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As ``state_dict`` gave it; a GPU's is left out where there is none."""
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available() and state["cuda"].numel():
            torch.cuda.set_rng_state(state["cuda"])
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        name, words, *rest = state["numpy"]
        np.random.set_state((name, words.numpy().astype(np.uint32), *rest))


def _numpy_state() -> tuple[Any, ...]:
    """As numpy has it, its words as a tensor: torch reads these back without running code of the file's."""
    name, words, *rest = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    return name, torch.from_numpy(words.astype(np.int64)), *rest
