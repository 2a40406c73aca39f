"""A run that goes on from its state does what it would have done."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch

from apt_train.loop import EarlyStopping, Trainer
from apt_train.monitor.gradients import GradientMonitor
from apt_train.state import ModelState, OptimizerState, RunState
from tests.apt_train.corpus import text_batch
from tests.apt_train.test_loop import new_model, new_trainer


class Loader:
    """Counts; the real one is tested by itself."""

    position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def run_state(trainer: Trainer) -> RunState:
    parts = (trainer.scaler, Loader(), EarlyStopping(2, 0.0), GradientMonitor())
    return RunState(ModelState(trainer.model), OptimizerState(trainer.model, trainer.optimizers), *parts)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_training_goes_on_bit_for_bit(name):
    before, after = new_trainer(new_model(), name=name), new_trainer(new_model(), name=name)
    for step in range(3):
        before.step(step, [text_batch(step)])
    saved = {part: copy.deepcopy(state.state_dict()) for part, state in run_state(before).parts().items()}
    for part, state in run_state(after).parts().items():
        state.load_state_dict(saved[part])
    for step in range(3, 6):
        assert before.step(step, [text_batch(step)]) == after.step(step, [text_batch(step)])


def test_steps_and_random_numbers_go_on():
    state = run_state(new_trainer(new_model()))
    state.step = 7
    saved = {name: copy.deepcopy(part.state_dict()) for name, part in state.parts().items()}

    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    expected = draw()
    state.step = 0
    for name, part in state.parts().items():
        part.load_state_dict(saved[name])
    assert state.step == 7
    assert draw() == expected
