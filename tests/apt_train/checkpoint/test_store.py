"""Checkpoints: whole or not there, checked when read, the same run afterwards."""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from apt_core.errors import CheckpointError, ConfigError
from apt_train.checkpoint import store as store_module
from apt_train.checkpoint.manifest import MANIFEST, Manifest
from apt_train.checkpoint.settings import CheckpointSettings
from apt_train.checkpoint.store import CheckpointStore
from apt_train.errors.recovery import RecoverySettings, with_backoff
from apt_train.loop import Trainer
from apt_train.state import RunState
from tests.apt_train.corpus import text_batch
from tests.apt_train.test_loop import new_model, new_trainer
from tests.apt_train.test_state import run_state

RUN_SETTINGS: dict[str, Any] = {"model": {"hidden_size": 32}, "lora": {"rank": 0, "targets": ("q_proj",)}}


class Run:
    """A small run whose checkpoints lie in a folder."""

    def __init__(self, folder: Path, settings: CheckpointSettings | None = None, **options: Any) -> None:
        self.trainer: Trainer = new_trainer(new_model(), name="muon")
        self.state: RunState = run_state(self.trainer)
        self.store = CheckpointStore(
            settings or CheckpointSettings(every=1), folder, options.pop("run_settings", RUN_SETTINGS), **options
        )

    def to(self, step: int) -> Run:
        """Train, and save where a checkpoint is due."""
        while self.state.step < step:
            self.trainer.step(self.state.step, [text_batch(self.state.step)])
            self.state.step += 1
            if self.store.is_due(self.state.step):
                self.store.save(self.state)
        self.store.wait()
        return self

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.trainer.model.named_parameters()}


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_restored_run_ends_with_the_same_bits(tmp_path, asynchronous):
    settings = CheckpointSettings(every=3, asynchronous=asynchronous)
    uninterrupted = Run(tmp_path, settings).to(6)
    shutil.rmtree(tmp_path / "checkpoints/step-00000006")
    resumed = Run(tmp_path, settings)
    restored = resumed.store.restore(resumed.state)
    assert restored is not None and restored.step == resumed.state.step == 3
    assert same(resumed.to(6).weights(), uninterrupted.weights())


def test_steps_made_while_a_checkpoint_is_written_are_not_in_it(tmp_path, monkeypatch):
    saves: list[Callable[[], None]] = []
    write = CheckpointStore._write
    monkeypatch.setattr(CheckpointStore, "_write", lambda *arguments: saves.append(lambda: write(*arguments)))
    run = Run(tmp_path, CheckpointSettings()).to(1)
    run.store.save(run.state)
    run.store.wait()
    then = run.weights()
    run.to(3)
    saves[0]()
    other = Run(tmp_path)
    other.store.restore(other.state)
    assert other.state.step == 1
    assert same(other.weights(), then)
    assert not same(run.weights(), then)


def test_kept_ones_rotate_and_temporary_ones_make_way(tmp_path):
    run = Run(tmp_path, CheckpointSettings(every=4, temporary_every=1, keep=2))
    assert [steps_in(tmp_path) for step in range(1, 8) if run.to(step)] == [[1], [2], [3], [4], [4, 5], [4, 6], [4, 7]]
    run.to(12)
    assert steps_in(tmp_path) == [8, 12]


def test_what_was_not_finished_is_no_checkpoint(tmp_path):
    run = Run(tmp_path).to(2)
    (tmp_path / "checkpoints/step-00000002").rename(tmp_path / "checkpoints/.step-00000002")
    (tmp_path / "checkpoints/.step-00000002" / MANIFEST).unlink()
    resumed = Run(tmp_path)
    restored = resumed.store.restore(resumed.state)
    assert restored is not None and restored.step == 1
    assert not (tmp_path / "checkpoints/.step-00000002").exists()
    assert same(resumed.to(2).weights(), run.weights())


def files_of(folder: Path) -> list[str]:
    return sorted(Manifest.read(folder).files)


@pytest.mark.parametrize("kind", ["flipped", "cut", "missing"])
@pytest.mark.parametrize("place", range(4))
def test_damage_to_any_file_is_named_and_an_older_one_serves_only_if_allowed(tmp_path, place, kind):
    Run(tmp_path).to(2)
    folder = tmp_path / "checkpoints/step-00000002"
    path = folder / files_of(folder)[place]
    content = bytearray(path.read_bytes())
    match kind:
        case "flipped":
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        case "cut":
            path.write_bytes(content[:-1])
        case "missing":
            path.unlink()
    run = Run(tmp_path)
    with pytest.raises(CheckpointError, match=f"{path.name}.*allow_older"):
        run.store.restore(run.state)
    assert run.state.step == 0
    allowed = Run(tmp_path, CheckpointSettings(every=1, allow_older=True))
    assert allowed.store.restore(allowed.state) is not None
    assert allowed.state.step == 1
    assert steps_in(tmp_path) == [1]  # the damaged one is set aside
    assert len(list((tmp_path / "checkpoints").glob("aside-step-00000002-*"))) == 1


def test_a_checkpoint_has_every_kind_of_file(tmp_path):
    Run(tmp_path).to(1)
    assert files_of(tmp_path / "checkpoints/step-00000001") == [".metadata", "__0_0.distcp", "run.pt", "settings.json"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path):
    Run(tmp_path).to(2)
    for path in tmp_path.glob("checkpoints/*/run.pt"):
        path.unlink()
    run = Run(tmp_path, CheckpointSettings(every=1, allow_older=True))
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        run.store.restore(run.state)
    assert steps_in(tmp_path) == [1, 2]


def test_a_damaged_manifest_is_named(tmp_path):
    Run(tmp_path).to(1)
    (tmp_path / "checkpoints/step-00000001" / MANIFEST).write_text("{}")
    run = Run(tmp_path)
    with pytest.raises(CheckpointError, match=MANIFEST):
        run.store.restore(run.state)


def test_the_last_good_one_outlives_damaged_newer_ones(tmp_path):
    Run(tmp_path, CheckpointSettings(every=1, keep=2)).to(2)
    for path in (tmp_path / "checkpoints/step-00000002").iterdir():
        path.write_bytes(b"")
    run = Run(tmp_path, CheckpointSettings(every=1, keep=2, allow_older=True))
    run.store.restore(run.state)
    assert run.state.step == 1
    run.to(3)
    assert steps_in(tmp_path) == [2, 3]


def test_going_on_from_an_older_one_sets_newer_ones_aside(tmp_path):
    Run(tmp_path).to(3)
    older = CheckpointSettings(every=1, resume=str(tmp_path / "checkpoints/step-00000001"))
    run = Run(tmp_path, older)
    run.store.restore(run.state)
    assert run.state.step == 1
    assert steps_in(tmp_path) == [1]
    assert len(list((tmp_path / "checkpoints").glob("aside-*"))) == 2


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (CheckpointSettings(resume="nowhere/step-00000001"), "checkpoint.resume"),
        (CheckpointSettings(resume="never"), "checkpoint.resume"),
    ],
)
def test_a_run_does_not_begin_where_its_settings_cannot_be_meant(tmp_path, settings, field):
    Run(tmp_path).to(1)
    run = Run(tmp_path, settings)
    with pytest.raises(ConfigError) as caught:
        run.store.restore(run.state)
    assert caught.value.field == field


def test_another_model_is_refused_by_name(tmp_path):
    Run(tmp_path).to(1)
    run = Run(tmp_path, run_settings=RUN_SETTINGS | {"model": {"hidden_size": 64}})
    with pytest.raises(ConfigError, match=r"model.hidden_size: is 64, and was 32"):
        run.store.restore(run.state)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    run = Run(tmp_path).to(1)
    with torch.no_grad():
        next(run.trainer.model.parameters())[0, 0] = math.nan
    run.state.step = 2
    with pytest.raises(CheckpointError, match="not finite"):
        run.store.save(run.state)
    assert steps_in(tmp_path) == [1]


@pytest.mark.parametrize(("number", "passes"), [(errno.EIO, True), (errno.ENOSPC, False)])
def test_a_fault_of_the_disk_is_waited_out_if_it_may_pass(tmp_path, monkeypatch, number, passes):
    faults = [OSError(number, "injected")]
    original = store_module.sync_file

    def failing(path: Path) -> None:
        if faults:
            raise faults.pop()
        original(path)

    monkeypatch.setattr(store_module, "sync_file", failing)
    quick = RecoverySettings(io_first_wait_s=0.01, io_longest_wait_s=0.02)
    run = Run(tmp_path, retry=lambda call: with_backoff(call, quick, "saving"))
    if passes:
        assert steps_in(tmp_path) == [] and run.to(1) and steps_in(tmp_path) == [1]
    else:
        with pytest.raises(CheckpointError, match=r"step-00000001.*injected"):
            run.to(1)
        assert steps_in(tmp_path) == []
