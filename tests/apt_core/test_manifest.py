"""A manifest names what has changed, and its version what it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apt_core.errors import CheckpointError
from apt_core.manifest import (
    MANIFEST,
    UNPUBLISHED,
    Manifest,
    Probe,
    make_manifest,
    read_manifest,
    version_of,
    write_manifest,
)

PROBE = Probe((1, 2, 3), (-0.5, -1.25))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 8192)  # more than a chunk
    write_manifest(tmp_path, make_manifest(tmp_path, 12, PROBE))
    return tmp_path


def test_what_is_written_is_read_and_holds(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert (manifest.step, manifest.probe, set(manifest.files)) == (12, PROBE, {"config.json", "model.safetensors"})
    assert manifest.version.startswith("12-") and version_of(folder) == manifest.version
    manifest.check(folder)


def test_a_folder_without_one_is_unpublished(tmp_path: Path) -> None:
    assert version_of(tmp_path) == UNPUBLISHED


def test_the_version_follows_the_contents_and_the_step(folder: Path) -> None:
    versions = {make_manifest(folder, step).version for step in (1, 1, 2)}
    assert len(versions) == 2
    (folder / "config.json").write_text("{ }")
    assert make_manifest(folder, 1).version not in versions


def test_hidden_files_and_subfolders_are_no_part_of_it(folder: Path) -> None:
    (folder / ".lock").touch()
    (folder / "original").mkdir()
    read_manifest(folder).check(folder)


def flip_a_byte(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def cut_off(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def add_a_file(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


def remove_a_file(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_byte, r"model\.safetensors: is not what the manifest says: its SHA-256 differs"),
        (cut_off, r"model\.safetensors: has 0 bytes; the manifest says 2097152"),
        (add_a_file, r"model\.safetensors\.index\.json: is in the folder, but not in the manifest"),
        (remove_a_file, r"config\.json: is in the manifest, but not in the folder"),
    ],
)
def test_a_changed_folder_is_refused_by_file(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        read_manifest(folder).check(folder)


def entry(document: dict[str, Any]) -> dict[str, Any]:
    files: dict[str, Any] = document["files"]
    return files["config.json"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=2), "format: expected 1"),
        (lambda d: d.update(step=-1), "step: expected at least 0"),
        (lambda d: d.update(step=13), "version: does not fit the checksums"),
        (lambda d: d.update(files={}), "files: is missing"),
        (lambda d: entry(d).update(sha256="0"), "version: does not fit the checksums"),
        (lambda d: d["files"].update({"../config.json": entry(d)}), r"files\.\.\./config\.json: expected the name"),
        (lambda d: d["files"].update({"/etc/passwd": entry(d)}), "files./etc/passwd: expected the name"),
        (lambda d: d["probe"].update(token_ids=[1]), r"probe\.token_ids: expected at least two"),
        (lambda d: d["probe"].update(token_ids=[1, -2, 3]), r"probe\.token_ids: expected at least two"),
        (lambda d: d["probe"].update(logprobs=[0.5]), r"probe\.logprobs: expected 2 numbers"),
        (lambda d: d["probe"].update(logprobs=["a", None]), r"probe\.logprobs: expected 2 numbers"),
    ],
)
def test_a_damaged_manifest_is_refused_by_field(
    folder: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    document = json.loads((folder / MANIFEST).read_text())
    change(document)
    (folder / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=message):
        read_manifest(folder)


def test_a_manifest_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_manifest(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        make_manifest(tmp_path / "absent", 1)


def test_one_is_replaced_at_once_and_leaves_nothing_behind(folder: Path) -> None:
    write_manifest(folder, Manifest(13, read_manifest(folder).files))
    assert read_manifest(folder).step == 13
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", MANIFEST}
