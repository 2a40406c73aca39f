"""Whole runs by the command's own way, on one process."""

from __future__ import annotations

import errno
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from apt_core.error_log.log import ErrorLogger
from apt_core.error_log.report import ErrorPatterns
from apt_train.cli import USAGE_ERROR, main
from apt_train.config import read_config
from apt_train.data import DataLoader
from apt_train.errors.guard import PLACES
from apt_train.journal import Summary
from apt_train.loop import StepResult, Sums, Trainer
from apt_train.monitor.gradients import TrainingDivergedError
from apt_train.parallel.parallelize import plain
from apt_train.train import train
from tests.apt_train.runs import SICK, write_config

Disturb = Callable[[torch.Tensor], None]


def disturbed(faults: dict[int, Disturb]) -> Callable[[Trainer, int, Sums], StepResult]:
    """A `Trainer.update` before which the gradient of one parameter is changed in some steps, counted from 1."""
    update = Trainer.update

    def disturb_and_update(self: Trainer, index: int, sums: Sums) -> StepResult:
        if index + 1 in faults:
            gradient = dict(plain(self.model).model.named_parameters())[SICK].grad
            assert gradient is not None
            faults[index + 1](gradient)
        return update(self, index, sums)

    return disturb_and_update


def one_nan(gradient: torch.Tensor) -> None:
    gradient[1, 2] = math.nan


def run(folder: Path, steps: int, **settings: str) -> Summary:
    overrides = {name.replace("__", "."): value for name, value in settings.items()}
    return train(read_config(write_config(folder, steps), overrides))


def test_nan_explosion_and_dead_layer_are_each_named_in_their_step_and_nothing_else_is(tmp_path, monkeypatch):
    faults: dict[int, Disturb] = {4: one_nan, 14: lambda g: g.mul_(1e4), 18: lambda g: g.zero_()}
    monkeypatch.setattr(Trainer, "update", disturbed(faults))
    summary = run(tmp_path, 24)
    assert summary.num_skipped == 3
    records = [json.loads(line) for line in (tmp_path / "run/errors/errors-rank0.jsonl").read_text().splitlines()]
    assert [record["context"]["step"] for record in records] == [4, 14, 18]
    for record, fault in zip(records, ("non-finite", "exploding", "vanishing"), strict=True):
        assert f"{SICK}: {fault}" in record["message"]
    assert "UnhealthyGradientsError" in (tmp_path / "run/errors/errors.md").read_text()


def patterns_of(folder: Path) -> ErrorPatterns:
    return ErrorLogger(folder / "errors", "reader", PLACES).analyze_error_patterns()


def test_sick_steps_in_a_row_end_the_run_with_a_report(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "update", disturbed(dict.fromkeys(range(3, 20), one_nan)))
    with pytest.raises(TrainingDivergedError, match=f"3 skipped steps in a row; step 5(.|\n)*{SICK}: non-finite"):
        run(tmp_path, 10, monitor__max_skipped_steps="3")
    patterns = patterns_of(tmp_path / "run")
    assert [cause.seen_at("step") for cause in patterns.causes if "TrainingDiverged" in cause.name] == ["5"]


def losses(folder: Path) -> list[float]:
    events = EventAccumulator(str(folder / "run/tensorboard"))
    events.Reload()
    return [event.value for event in events.Scalars("train/loss")]


def test_a_run_that_is_short_of_memory_goes_on_with_smaller_micro_batches_and_the_same_losses(tmp_path, monkeypatch):
    (tmp_path / "enough").mkdir()
    (tmp_path / "short").mkdir()
    run(tmp_path / "enough", 6)
    forward, tried = Trainer._forward, []

    def small_memory(self, batch, with_accuracy):
        tried.append(len(batch.input_ids))
        if len(batch.input_ids) > 50:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(self, batch, with_accuracy)

    monkeypatch.setattr(Trainer, "_forward", small_memory)
    summary = run(tmp_path / "short", 6)
    assert summary.steps == 6
    assert tried[0] == 64 and all(tokens <= 50 for tokens in tried[-12:])
    assert losses(tmp_path / "short") == pytest.approx(losses(tmp_path / "enough"), rel=0.02)
    (cause,) = patterns_of(tmp_path / "short/run").causes
    assert cause.name.startswith("OutOfMemoryError")


def test_a_fault_of_the_disk_that_passes_is_logged_and_the_run_goes_on(tmp_path, monkeypatch):
    following, calls = DataLoader.__next__, itertools.count(1)

    def failing(self):
        if next(calls) in (3, 4):
            raise OSError(errno.EIO, "bad cable")
        return following(self)

    monkeypatch.setattr(DataLoader, "__next__", failing)
    summary = run(tmp_path, 3, recovery__io_first_wait_s="0.01")
    assert summary.steps == 3
    (cause,) = patterns_of(tmp_path / "run").causes
    assert (cause.count, cause.seen_at("step")) == (2, "2")
    assert "bad cable" in cause.name


def test_validation_that_no_longer_improves_ends_the_run(tmp_path):
    summary = run(tmp_path, 20, run__evaluate_every="2", run__patience="2", run__min_improvement="100")
    assert summary.steps == 6  # the first evaluation is the best one
    assert "2 evaluations" in summary.ended_because
    assert summary.evaluation is not None
    assert summary.evaluation.perplexity == pytest.approx(math.exp(summary.evaluation.loss))


def test_the_end_of_the_data_ends_the_run(tmp_path):
    summary = run(tmp_path, 100_000, data__epochs="1", data__micro_batch_tokens="1024", run__micro_batches="1")
    assert 2 < summary.steps < 50
    assert summary.ended_because == "there is no more data"


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({"run__precision": "bfloat16"}, 1.0),
        ({"optimizer__name": "muon", "optimizer__learning_rate": "0.03"}, 1.0),
        # Adapters on layers whose embedding and head stay random can learn little.
        ({"lora__rank": "4", "optimizer__learning_rate": "0.1"}, 0.01),
    ],
    ids=["bfloat16", "muon", "lora"],
)
def test_losses_fall(tmp_path, settings, least):
    usual = {"optimizer__learning_rate": "0.01", "schedule__kind": "wsd", "monitor__warmup_steps": "100"}
    run(tmp_path, 30, **usual | settings)
    found = losses(tmp_path)
    assert len(found) == 30
    assert sum(found[-5:]) / 5 < sum(found[:5]) / 5 - least


def test_the_command_shows_its_steps_and_says_where_everything_is(tmp_path, capsys):
    # Flags on both sides of the file.
    assert main(["run", "--run.steps", "4", write_config(tmp_path, 9), "--run.evaluate_every=2"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("step ")] == ["1/4", "2/4", "3/4", "4/4"]
    assert "validation" in out and "perplexity" in out and "accuracy" in out
    assert json.loads((tmp_path / "run/settings.json").read_text())["run"]["steps"] == 4
    for name in ("settings.json", "tensorboard"):
        assert str(tmp_path / "run" / name) in out
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    expected = {"loss", "learning_rate", "gradient_norm", "tokens_per_second", "memory_bytes", "peak_share"}
    assert {f"train/{name}" for name in expected} | {"validation/perplexity"} <= set(events.Tags()["scalars"])


def test_details_of_some_steps_are_written(tmp_path):
    run(tmp_path, 4, metrics__details_every="2", metrics__histograms_every="4")
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/accuracy")] == [2, 4]
    assert [event.step for event in events.Scalars(f"gradient_norm/{SICK}")] == [2, 4]
    assert f"weights/{SICK}" in events.Tags()["histograms"]


@pytest.mark.parametrize(
    ("flag", "field"),
    [
        ("--run.device=gpu", "run.device"),
        ("--run.device=cuda:99", "run.device"),
        ("--run.folder=/dev/null/run", "run.folder"),
        ("--data.paths=nowhere/*.txt", "data.paths"),
        ("--data.validation_paths=nowhere.txt", "data.validation"),
        ("--model.vocab_size=1000", "model.vocab_size"),
        ("--model.source=nowhere/model", "nowhere/model"),
        ("--parallel.replicated=3", "parallel.replicated"),
        ("--monitor.exploding_ratio=0", "monitor.exploding_ratio"),
        ("--watchdog.interval_s=100", "watchdog.interval_s"),
        ("--metrics.details_every=-1", "metrics.details_every"),
        ("--lora.targets=nothing", "lora.targets"),
    ],
)
def test_what_cannot_work_is_refused_by_name_before_any_training(tmp_path, capsys, flag, field):
    rank = ["--lora.rank=2"] if "lora" in flag else []
    code = main(["run", write_config(tmp_path, 5), "--run.evaluate_every=5", flag, *rank])
    captured = capsys.readouterr()
    assert code == (1 if "source" in flag else USAGE_ERROR)
    assert field in captured.err
    assert "step 1" not in captured.out
    assert "Traceback" not in captured.err


def test_an_unknown_key_of_a_section_is_refused(tmp_path, capsys):
    path = Path(write_config(tmp_path, 5))
    path.write_text(path.read_text().replace("warmup_steps", "warm_up_steps"))
    assert main(["run", str(path)]) == USAGE_ERROR
    assert "monitor.warm_up_steps: unknown setting; did you mean warmup_steps?" in capsys.readouterr().err


def test_the_weights_of_a_skipped_step_stay(tmp_path, monkeypatch):
    seen: list[torch.Tensor] = []
    update = disturbed({3: one_nan})

    def watching(self: Trainer, index: int, sums: Sums) -> StepResult:
        module = plain(self.model).model
        before = nn.utils.parameters_to_vector(module.parameters()).detach().clone()
        result = update(self, index, sums)
        seen.append((nn.utils.parameters_to_vector(module.parameters()).detach() - before).abs().max())
        return result

    monkeypatch.setattr(Trainer, "update", watching)
    run(tmp_path, 4)
    assert [float(change) == 0 for change in seen] == [False, False, True, False]
