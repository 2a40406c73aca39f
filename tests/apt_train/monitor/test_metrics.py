from __future__ import annotations

import io
import math
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from apt_train.monitor.metrics import MetricsSettings, StepMetrics, TrainingVisualizer, open_metrics, peak_memory_bytes
from apt_train.monitor.progress import ProgressBar, ProgressLines, open_progress

METRICS = StepMetrics(
    loss=2.5,
    learning_rate=1e-3,
    gradient_norm=0.5,
    tokens_per_second=12_345.0,
    peak_share=0.4,
    waiting_share=0.01,
    memory_bytes=2**30,
    accuracy=0.25,
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


def test_a_loop_of_ones_own_can_be_watched(tmp_path: Path) -> None:
    visualizer = TrainingVisualizer(tmp_path)
    visualizer.scalars(1, {"train/loss": 2.5})
    visualizer.text("model", "Linear <8>")
    visualizer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("train/loss")[0].value == 2.5
    assert b"Linear &lt;8&gt;" in events.Tensors("model/text_summary")[0].tensor_proto.string_val[0]


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
    deadline = time.monotonic() + 30
    while missing := [name for name in METRICS.scalars() if name.encode() not in file.read_bytes()]:
        assert time.monotonic() < deadline, missing
        time.sleep(0.1)


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


def test_where_there_is_no_terminal_every_so_many_steps_have_a_line() -> None:
    out = io.StringIO()
    lines = ProgressLines(9, first_step=2, every=4, file=out)
    for _ in range(7):
        lines.advance(METRICS)
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["3/9", "4/9", "8/9", "9/9"]
    assert all("loss 2.5000" in line and "12,345 tokens/s" in line for line in out.getvalue().splitlines())
    assert out.getvalue().endswith("0:00:00 left\n")


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = open_progress(10, first_step=0, every=1, rank=1)
    progress.advance(METRICS)
    progress.close()
    assert capsys.readouterr() == ("", "")


def test_memory_is_that_of_the_process() -> None:
    assert peak_memory_bytes(torch.device("cpu")) > 50_000_000
