from __future__ import annotations

import errno
import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from apt_core.errors import ConfigError
from apt_train.errors.recovery import OutOfMemoryRecovery, RecoverySettings, RestartNeededError, with_backoff

SETTINGS = RecoverySettings(max_parts=8, io_attempts=3, io_first_wait_s=0.001, io_longest_wait_s=0.01)


class Step:
    """A step of five tokens' gradients that runs out of memory with more than ``fits`` tokens at once."""

    def __init__(self, fits: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 1)
        self.tokens = torch.randn(5, 3)
        self.fits = fits
        self.tried: list[int] = []
        self.activations: list[weakref.ref[torch.Tensor]] = []

    def __call__(self, num_parts: int) -> torch.Tensor:
        self.tried.append(num_parts)
        self.model.zero_grad()
        for part in self.tokens.tensor_split(num_parts):
            activation = self.model(part)
            self.activations.append(weakref.ref(activation))
            if len(part) > self.fits:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            (activation.square().sum() / len(self.tokens)).backward()
        assert self.model.weight.grad is not None
        return self.model.weight.grad.clone()


def test_smaller_micro_batches_give_the_same_gradient_and_stay_for_later_steps(tmp_path: Path) -> None:
    expected = Step(fits=5)(1)
    step, recovery = Step(fits=2), OutOfMemoryRecovery(SETTINGS, tmp_path / "parts.json", has_collectives=False)
    torch.testing.assert_close(recovery.run(step), expected)
    recovery.run(step)
    assert step.tried == [1, 2, 4, 4]


def test_a_failed_attempt_leaves_no_memory_behind(tmp_path: Path) -> None:
    step = Step(fits=2)

    def attempt(num_parts: int) -> torch.Tensor:
        alive = [ref for ref in step.activations if ref() is not None]
        assert not alive
        return step(num_parts)

    OutOfMemoryRecovery(SETTINGS, tmp_path / "parts.json", has_collectives=False).run(attempt)
    gc.collect()
    assert len(step.activations) > 4


def test_where_ranks_wait_the_job_restarts_and_begins_with_what_fits(tmp_path: Path) -> None:
    file, step = tmp_path / "parts.json", Step(fits=3)
    with pytest.raises(RestartNeededError, match="2 parts"):
        OutOfMemoryRecovery(SETTINGS, file, has_collectives=True).run(step)
    restarted = OutOfMemoryRecovery(SETTINGS, file, has_collectives=True)
    restarted.run(step)
    assert step.tried == [1, 2]


def test_what_never_fits_is_given_up(tmp_path: Path) -> None:
    step = Step(fits=0)
    with pytest.raises(torch.OutOfMemoryError):
        OutOfMemoryRecovery(SETTINGS, tmp_path / "parts.json", has_collectives=False).run(step)
    assert step.tried == [1, 2, 4, 8]


def test_other_errors_pass_through(tmp_path: Path) -> None:
    def attempt(num_parts: int) -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        OutOfMemoryRecovery(SETTINGS, tmp_path / "parts.json", has_collectives=False).run(attempt)


def test_the_processors_allocator_counts_too(tmp_path: Path) -> None:
    tried = []

    def attempt(num_parts: int) -> None:
        tried.append(num_parts)
        if num_parts == 1:
            torch.empty(2**60, dtype=torch.uint8)

    OutOfMemoryRecovery(SETTINGS, tmp_path / "parts.json", has_collectives=False).run(attempt)
    assert tried == [1, 2]


def test_a_damaged_file_of_parts_is_named(tmp_path: Path) -> None:
    (tmp_path / "parts.json").write_text("{")
    with pytest.raises(ConfigError, match=r"parts\.json"):
        OutOfMemoryRecovery(SETTINGS, tmp_path / "parts.json", has_collectives=False)


@pytest.mark.parametrize("fault", [OSError(errno.EIO, "bad cable"), TimeoutError(), ConnectionResetError()], ids=repr)
def test_a_passing_fault_is_tried_again(fault: OSError) -> None:
    outcomes = [fault, fault, None]
    noted: list[BaseException] = []
    waits: list[float] = []

    def call() -> str:
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome
        return "done"

    assert with_backoff(call, SETTINGS, "the save", note=noted.append, sleep=waits.append) == "done"
    assert noted == [fault, fault]
    assert len(waits) == 2


def test_a_fault_that_does_not_pass_is_raised_after_the_last_attempt() -> None:
    calls = []

    def call() -> None:
        calls.append(1)
        raise OSError(errno.ESTALE, "stale")

    with pytest.raises(OSError, match="stale"):
        with_backoff(call, SETTINGS, "the save")
    assert len(calls) == SETTINGS.io_attempts


@pytest.mark.parametrize("fault", [FileNotFoundError(errno.ENOENT, "x"), OSError(errno.ENOSPC, "full"), ValueError()])
def test_a_lasting_fault_is_raised_at_once(fault: Exception) -> None:
    calls = []

    def call() -> None:
        calls.append(1)
        raise fault

    with pytest.raises(type(fault)):
        with_backoff(call, SETTINGS, "the save")
    assert len(calls) == 1
