from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from apt_train.monitor.metrics import MetricsSettings, StepMetrics, open_metrics, peak_memory_bytes
from apt_train.monitor.progress import ProgressBar

METRICS = StepMetrics(
    loss=2.5,
    accuracy=0.25,
    learning_rate=1e-3,
    gradient_norm=0.5,
    parameter_norm=7.0,
    tokens_per_second=12_345.0,
    memory_bytes=2**30,
)


def test_tensorboard_files_hold_every_metric_of_every_step(tmp_path: Path) -> None:
    writer = open_metrics(MetricsSettings(), tmp_path, rank=0)
    for step in (1, 2):
        writer.scalars(step, METRICS.scalars())
    writer.histograms(2, {"weights": torch.tensor([1.0, 2.0, math.nan]), "all_bad": torch.tensor([math.inf])})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(METRICS.scalars())
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 2.5), (2, 2.5)]
    assert events.Tags()["histograms"] == ["weights"]
    assert events.Histograms("weights")[0].histogram_value.num == 2


def test_a_loss_that_is_no_number_is_shown_as_such(tmp_path: Path) -> None:
    writer = open_metrics(MetricsSettings(), tmp_path, rank=0)
    writer.scalars(1, {"train/loss": math.nan})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert math.isnan(events.Scalars("train/loss")[0].value)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    writer = open_metrics(MetricsSettings(wandb="offline"), tmp_path, rank=1)
    writer.scalars(1, METRICS.scalars())
    writer.close()
    assert not list(tmp_path.iterdir())


def test_wandb_offline_keeps_every_metric_on_disk(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    writer = open_metrics(MetricsSettings(tensorboard=False, wandb="offline"), tmp_path, rank=0, config={"a": 1})
    writer.scalars(1, METRICS.scalars())
    writer.histograms(2, {"weights": torch.randn(10)})
    writer.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert all(name.encode() in content for name in METRICS.scalars())


def test_the_progress_bar_shows_loss_throughput_and_time_left() -> None:
    out = io.StringIO()
    bar = ProgressBar(10, first_step=4, file=out)
    for _ in range(3):
        bar.advance(METRICS)
    bar.close()
    text = out.getvalue()
    assert "7/10" in text
    assert "loss=2.5000" in text
    assert "tok/s=12,345" in text
    assert "<" in text  # elapsed<left


def test_other_ranks_show_no_bar() -> None:
    out = io.StringIO()
    bar = ProgressBar(10, rank=1, file=out)
    bar.advance(METRICS)
    bar.close()
    assert not out.getvalue()


def test_memory_is_that_of_the_process() -> None:
    assert peak_memory_bytes(torch.device("cpu")) > 50_000_000
