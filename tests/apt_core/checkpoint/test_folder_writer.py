"""Checkpoint folders: whole or not there, in one file of weights or in several."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from apt_core.checkpoint.folder_writer import new_folder
from apt_core.checkpoint.safetensors_reader import find_weight_files, read_tensors
from apt_core.errors import ConfigError

TENSORS = {f"layer.{i}": torch.full((4, 5), float(i)) for i in range(5)}


@pytest.mark.parametrize(("shard_bytes", "num_files"), [(1000, 1), (160, 3), (1, 5)])
def test_what_is_written_is_read(shard_bytes: int, num_files: int, tmp_path: Path) -> None:
    with new_folder(tmp_path / "out", field="output", shard_bytes=shard_bytes) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
        writer.document("config.json", "{}")
    files = find_weight_files(tmp_path / "out")
    assert len(files) == num_files and writer.num_bytes == 400
    found = dict(read_tensors(files))
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in found)
    assert len(list((tmp_path / "out").iterdir())) == num_files + (num_files > 1) + 1


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out", field="output") as writer:
        writer.add("x", torch.ones(3))
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file", tmp_path / "file" / "beneath"):
        with pytest.raises(ConfigError, match=r"^output: "), new_folder(path, field="output"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out", field="output") as writer:
        writer.add("x", torch.ones(3))
    assert (tmp_path / "out" / "model.safetensors").is_file()
