"""`apt-train quantize`, as users call it."""

from __future__ import annotations

from pathlib import Path

import pytest

from apt_core.checkpoint import open_checkpoint
from apt_train.cli import main
from tests.apt_train.quantize.tiny import save_model, save_text


@pytest.fixture
def source(tmp_path: Path) -> str:
    return str(save_model(tmp_path / "model"))


def text_flags(folder: Path) -> list[str]:
    text = save_text(folder)
    return [
        f"--{section}.{name}={value}"
        for section in ("calibration", "evaluation")
        for name, value in (("text", text), ("windows", 2), ("length", 32))
    ]


def test_writes_a_checkpoint_and_says_what_it_cost(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "out")
    assert main(["quantize", source, output, "--scheme", "w4a16", "--gptq.block", "32", *text_flags(tmp_path)]) == 0
    assert open_checkpoint(output).is_quantized
    shown = capsys.readouterr()
    assert "of bfloat16" in shown.out and "greedy agreement" in shown.out
    assert "layer 2 of 2" in shown.err
    report = (tmp_path / "out" / "quantization_report.md").read_text()
    assert "w4a16, GPTQ" in report.splitlines()[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scheme", "w3a3"], "scheme: "),
        (["--gptq.damping", "7"], "gptq.damping: "),
        (["--calibration.text", "/nowhere.txt"], "calibration.text: /nowhere.txt cannot be read"),
        (["--evaluation.length", "4096"], "evaluation.length: the model has 128 positions"),
    ],
)
def test_a_flag_that_cannot_work_is_named(
    flags: list[str], message: str, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", source, str(tmp_path / "out"), *text_flags(tmp_path), *flags]) == 2
    assert f"apt-train: {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_not_there_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(tmp_path / "nothing"), str(tmp_path / "out")]) == 1
    assert "nothing" in capsys.readouterr().err
