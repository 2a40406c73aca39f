"""The cache of converted GGUF files: when it is used, when it is rebuilt, and that it is never half written."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE

import pytest
import torch
from safetensors import safe_open

from apt_core.checkpoint import gguf_cache, gguf_import, open_checkpoint
from apt_core.checkpoint.gguf_tensors import HFTensor
from apt_core.errors import CheckpointError
from tests.apt_core.checkpoint.tiny import hf_model, write_gguf


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "model.gguf", hf_model("llama"))


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every GGUF that is parsed rather than taken from the cache."""
    parsed: list[Path] = []
    original = gguf_import.open_gguf
    monkeypatch.setattr(gguf_import, "open_gguf", lambda path: (parsed.append(path), original(path))[1])
    return parsed


def weights(source: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in open_checkpoint(str(source)).tensors()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_second_open_reads_the_cache_and_finds_the_same(source: Path, cache: Path, conversions: list[Path]) -> None:
    first, first_weights = open_checkpoint(str(source)), weights(source)
    second = open_checkpoint(str(source))

    assert conversions == [source]
    assert (second.config, second.generation) == (first.config, first.generation)
    assert second.tokenizer.encode("The quick fox") == first.tokenizer.encode("The quick fox")
    assert second.tokenizer.has_chat_template
    assert same(weights(source), first_weights)


def test_an_entry_is_one_safetensors_file_in_float32(source: Path, cache: Path) -> None:
    open_checkpoint(str(source))
    (entry,) = cache.iterdir()

    with safe_open(entry, framework="pt") as file:
        dtypes = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 - not a dict

    assert dtypes == {torch.float32}


def test_a_changed_source_is_converted_again_and_replaces_its_entry(source: Path, cache: Path) -> None:
    old = weights(source)
    changed = hf_model("llama")
    with torch.no_grad():
        changed.model.norm.weight += 1
    write_gguf(source, changed)
    os.utime(source, ns=(1, 1))

    new = weights(source)

    assert not same(old, new)
    assert same(new, changed.state_dict())
    assert len(list(cache.iterdir())) == 1


def test_files_of_one_name_in_two_folders_have_an_entry_each(source: Path, cache: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / source.name
    other.parent.mkdir()
    write_gguf(other, hf_model("llama", num_hidden_layers=1))

    assert len(weights(source)) > len(weights(other))
    assert len(list(cache.iterdir())) == 2


def flip(position: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "length only": lambda data: data[:8],
    "cut in the header": lambda data: data[:1000],
    "cut in the weights": lambda data: data[:-4],
    "too long": lambda data: data + b"\0",
    "length changed": flip(0),
    "huge length": lambda data: b"\xff" * 8 + data[8:],
    "header changed": flip(2000),
    "digest changed": lambda data: data.replace(b'"digest": "', b'"digest": "f', 1),
    "no header": lambda data: (2).to_bytes(8, "little") + b"{}",
    "not an object": lambda data: (2).to_bytes(8, "little") + b"[]",
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_entry_is_rebuilt(
    damage: Callable[[bytes], bytes], source: Path, cache: Path, conversions: list[Path]
) -> None:
    expected = weights(source)
    (entry,) = cache.iterdir()
    intact = entry.read_bytes()
    entry.write_bytes(damage(intact))

    assert same(weights(source), expected)
    assert entry.read_bytes() == intact
    assert len(conversions) == 2


def test_a_failed_conversion_leaves_nothing_behind(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensor: HFTensor) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(HFTensor, "values", fail)

    with pytest.raises(CheckpointError, match=r"No space left.*APT_CACHE"):
        open_checkpoint(str(source))

    assert list(cache.iterdir()) == []


def test_a_failed_conversion_leaves_the_old_entry_alone(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(str(source))
    (entry,) = cache.iterdir()
    before = entry.read_bytes()
    os.utime(source, ns=(1, 1))
    monkeypatch.setattr(HFTensor, "values", lambda tensor: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        open_checkpoint(str(source))

    assert [path.read_bytes() for path in cache.iterdir()] == [before]
    assert len(dict(checkpoint.tensors())) > 0


def test_what_killed_conversions_left_is_removed_but_not_what_running_ones_write(source: Path, cache: Path) -> None:
    name = gguf_cache.entry_path(source).name
    cache.mkdir(parents=True)
    abandoned, running = (cache / f".{name}.{kind}.tmp" for kind in ("abandoned", "running"))
    for path in (abandoned, running):
        path.write_bytes(b"part")
    os.utime(abandoned, (time.time() - 7200,) * 2)

    open_checkpoint(str(source))

    assert not abandoned.exists()
    assert running.exists()


def test_a_cache_that_cannot_be_written_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "file"))

    with pytest.raises(CheckpointError, match="APT_CACHE"):
        open_checkpoint(str(source))


ROOT = Path(__file__).parents[3]
CONVERT = """
import sys
from apt_core.checkpoint import open_checkpoint
print("ready", flush=True)
sys.stdin.readline()
print(sum(tensor.double().sum().item() for _, tensor in open_checkpoint(sys.argv[1]).tensors()))
"""


def test_processes_that_convert_at_once_all_get_whole_weights(source: Path, cache: Path) -> None:
    command = [sys.executable, "-c", CONVERT, str(source)]
    processes = [subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True, cwd=ROOT) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"

    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    sums = [float(process.communicate(timeout=60)[0]) for process in processes]

    expected = sum(tensor.double().sum().item() for tensor in hf_model("llama").state_dict().values())
    assert sums == pytest.approx([expected] * 2)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"APT_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/apt"),
        ({"HOME": "/c"}, "/c/.cache/apt"),
    ],
)
def test_the_cache_folder_is_the_users(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("APT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    assert gguf_cache.cache_folder() == Path(expected)
