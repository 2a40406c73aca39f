"""The cache of packed weights: what is kept, when it is used or made anew, and that it is never half written."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from apt_core.checkpoint import PackedCache, cache_file, load_into, open_checkpoint, packed_cache
from apt_core.checkpoint import checkpoint as checkpoint_module
from apt_core.metadata import AttentionMetadata
from apt_core.models.decoder import DecoderForCausalLM, fuse_projections, pack_linears
from apt_core.quantization import QUANTIZATION_VERSION, pack_weight, quantize_int4, quantize_int8
from apt_core.registry import build_model
from apt_kernels import ops
from apt_kernels.cpu import native
from tests.apt_core.checkpoint.formats.test_awq import save as save_awq
from tests.apt_core.checkpoint.tiny import hf_model, save_folder, write_gguf
from tests.apt_kernels.isas import INSTRUCTION_SETS, using_isa

pytestmark = pytest.mark.skipif(not native.is_enabled(), reason="the C++ ops are off")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of packed weights, empty at first."""
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packed"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_folder(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the cache has said since the last call."""
    caplog.set_level(logging.INFO, logger=packed_cache.__name__)

    def taken() -> list[str]:
        messages = [record.getMessage() for record in caplog.records if record.name == packed_cache.__name__]
        caplog.clear()
        return messages

    return taken


@dataclass
class Started:
    """A model as a start would have it."""

    model: DecoderForCausalLM
    is_hit: bool

    def logits(self) -> torch.Tensor:
        ids = torch.arange(3, 40)
        hidden = self.model(
            self.model.embed(ids), torch.arange(len(ids)), AttentionMetadata.for_full_sequences([len(ids)])
        )
        return self.model.logits(hidden)


def start(source: Path, precision: Any = "int4", head: Any = None, dtype: torch.dtype = torch.bfloat16) -> Started:
    checkpoint = open_checkpoint(str(source))
    cache = PackedCache(checkpoint, dtype=dtype, precision=precision, head_precision=head)
    if (found := cache.read()) is not None:
        return Started(found, True)
    model = build_model(checkpoint.config)
    load_into(model, checkpoint, dtype=dtype, device=torch.device("cpu"), keeps_quantized=True)
    model.eval().requires_grad_(False)
    fuse_projections(model)
    pack_linears(model, precision, head)
    cache.write(model)
    return Started(model, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("family", "config"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("qwen2", {}), ("qwen3", {"head_dim": 32})],
    ids=["untied", "tied", "biases", "query and key norms"],
)
@pytest.mark.parametrize(
    ("precision", "head"), [("int8", None), ("int4", None), ("int4", "int4"), (None, "int8"), ("int4", "bfloat16")]
)
def test_a_hit_gives_the_logits_of_a_miss_bit_for_bit(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family, config, precision, head, dtype
) -> None:
    save_folder(tmp_path / "model", family, **config)
    miss = start(tmp_path / "model", precision, head, dtype)
    if precision is None and dtype == torch.float32:
        assert not cache.exists()  # the layers are in oneDNN's layout
        return
    monkeypatch.setattr(checkpoint_module, "read_tensors", lambda files: pytest.fail("the checkpoint was read"))
    hit = start(tmp_path / "model", precision, head, dtype)

    assert (miss.is_hit, hit.is_hit) == (False, True)
    assert miss.logits().isfinite().all()
    assert torch.equal(hit.logits(), miss.logits())
    assert str(hit.model) == str(miss.model)
    assert not any(parameter.requires_grad for parameter in hit.model.parameters())
    assert not hit.model.training


def test_a_gguf_has_an_entry_too(cache: Path, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "model.gguf", hf_model("llama"))
    miss, hit = start(source), start(source)

    assert (miss.is_hit, hit.is_hit) == (False, True)
    assert torch.equal(hit.logits(), miss.logits())


@pytest.mark.parametrize("precision", [None, "int8"])
def test_a_quantized_checkpoint_has_an_entry_too(cache: Path, tmp_path: Path, precision) -> None:
    source = save_awq(tmp_path / "model").folder
    miss, hit = start(source, precision), start(source, precision)

    assert (miss.is_hit, hit.is_hit) == (False, True)
    assert torch.equal(hit.logits(), miss.logits())
    assert str(hit.model) == str(miss.model)


@pytest.mark.parametrize(
    ("precision", "head"), [(None, None), ("bfloat16", None), ("float32", None), ("int4", "float32")]
)
def test_what_is_not_quantized_or_in_a_foreign_layout_is_not_kept(source: Path, cache: Path, precision, head) -> None:
    assert not start(source, precision, head).is_hit
    assert not cache.exists()


def test_every_setting_has_an_entry_of_its_own(source: Path, cache: Path) -> None:
    settings = [("int4", None), ("int8", None), ("int4", "int4"), ("int4", "bfloat16")]
    started = [start(source, precision, head) for precision, head in settings]
    started.append(start(source, dtype=torch.float32))

    assert not any(each.is_hit for each in started)
    assert len(list(cache.iterdir())) == 5
    assert all(start(source, precision, head).is_hit for precision, head in settings)


def test_checkpoints_of_one_name_have_an_entry_each(source: Path, cache: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / source.name
    save_folder(other, num_hidden_layers=1)

    assert len(start(source).model.model.layers) == 2
    assert len(start(other).model.model.layers) == 1
    assert len(list(cache.iterdir())) == 2


def change_weights(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] += 1
    save_file(tensors, source / "model.safetensors", {"format": "pt"})


def change_config(source: Path) -> None:
    path = source / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-01'))


def touch(source: Path) -> None:
    os.utime(source / "model.safetensors", ns=(1, 1))


@pytest.mark.parametrize("change", [change_weights, change_config, touch])
def test_a_changed_checkpoint_replaces_its_entry(
    source: Path, cache: Path, lines: Callable[[], list[str]], change: Callable[[Path], None]
) -> None:
    before = start(source).logits()
    change(source)
    after = start(source)

    assert not after.is_hit
    assert torch.equal(after.logits(), before) == (change is touch)
    assert len(lines()) == 1
    assert len(list(cache.iterdir())) == 1
    assert start(source).is_hit


@pytest.mark.parametrize(("owner", "version"), [(packed_cache, "QUANTIZATION_VERSION"), (ops, "PACKED_LAYOUT_VERSION")])
def test_another_way_of_quantizing_or_packing_replaces_the_entry(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, owner, version
) -> None:
    start(source)
    monkeypatch.setattr(owner, version, 1000)

    assert not start(source).is_hit
    assert start(source).is_hit
    assert len(list(cache.iterdir())) == 1


def test_a_checkpoint_that_changes_while_it_is_read_leaves_no_entry_that_serves(source: Path, cache: Path) -> None:
    checkpoint = open_checkpoint(str(source))
    early = PackedCache(checkpoint, dtype=torch.bfloat16, precision="int4", head_precision=None)
    model = start(source).model
    change_weights(source)
    early.write(model)

    assert not start(source).is_hit


def flip(position: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def foreign(data: bytes) -> bytes:
    """A safetensors file of another program."""
    return (64).to_bytes(8, "little") + b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(64) + b"\0"


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "length only": lambda data: data[:8],
    "cut in the header": lambda data: data[:1000],
    "cut in the weights": lambda data: data[:-4],
    "half": lambda data: data[: len(data) // 2],
    "too long": lambda data: data + b"\0",
    "header changed": flip(500),
    "first weight changed": lambda data: flip(8 + int.from_bytes(data[:8], "little"))(data),
    "last weight changed": flip(-2),
    "end never written": lambda data: data[:-4096] + bytes(4096),
    "foreign": foreign,
    "not an object": lambda data: (2).to_bytes(8, "little") + b"[]",
    "text": lambda data: b"hello" * 1000,
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_entry_is_made_anew_with_one_line(
    damage: Callable[[bytes], bytes], source: Path, cache: Path, lines: Callable[[], list[str]]
) -> None:
    expected = start(source).logits()
    (entry,) = cache.iterdir()
    intact = entry.read_bytes()
    entry.write_bytes(damage(intact))
    again = start(source)

    assert not again.is_hit
    (line,) = lines()
    assert str(entry) in line
    assert torch.equal(again.logits(), expected)
    assert entry.read_bytes() == intact


def test_an_entry_of_another_checkpoint_in_its_place_is_not_served(
    source: Path, cache: Path, tmp_path: Path, lines: Callable[[], list[str]]
) -> None:
    other = tmp_path / "other"
    save_folder(other)
    change_weights(other)
    start(other)
    (theirs,) = cache.iterdir()
    expected = start(source).logits()
    (ours,) = set(cache.iterdir()) - {theirs}
    ours.write_bytes(theirs.read_bytes())
    again = start(source)

    assert not again.is_hit and len(lines()) == 1
    assert torch.equal(again.logits(), expected)


def test_a_folder_in_its_place_costs_speed_only(source: Path, cache: Path) -> None:
    expected = start(source).logits()
    (entry,) = cache.iterdir()
    entry.unlink()
    entry.mkdir()

    assert torch.equal(start(source).logits(), expected)


def test_a_full_disk_costs_speed_only(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, lines: Callable[[], list[str]]
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_file.os, "fsync", fail)
    started = start(source)

    assert started.logits().isfinite().all()
    (line,) = lines()
    assert "No space left on device" in line and "APT_CACHE" in line
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("folder", ["/proc/apt", "a file"])
def test_a_cache_that_cannot_be_written_costs_speed_only(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: Callable[[], list[str]], folder: str
) -> None:
    (tmp_path / "a file").write_text("in the way")
    monkeypatch.setenv("APT_CACHE", str(tmp_path / folder))

    assert start(source).logits().isfinite().all()
    assert len(lines()) == 1
    assert not start(source).is_hit


IMPORTS = """
import os, sys
from apt_core.checkpoint import PackedCache, open_checkpoint
import torch
os.environ["APT_CACHE"] = sys.argv[2]
before = set(sys.modules)
cache = PackedCache(open_checkpoint(sys.argv[1]), dtype=torch.bfloat16, precision="int4", head_precision=None)
assert cache.read() is not None
print(sorted(name for name in set(sys.modules) - before if name.startswith(("sympy", "torch._refs"))))
"""


def test_a_hit_does_not_make_torch_import_its_compiler(source: Path, cache: Path) -> None:
    """As concatenating tensors on the meta device does, which takes longer than the cache saves."""
    start(source)
    command = [sys.executable, "-c", IMPORTS, str(source), str(cache.parent)]
    assert subprocess.run(command, env=environment(), check=True, stdout=PIPE, text=True).stdout == "[]\n"


ROOT = Path(__file__).parents[3]


def environment() -> dict[str, str]:
    """Of another process, which finds this checkout and the compiled ops."""
    inherited = {name: value for name, value in os.environ.items() if name != "APT_CACHE"}
    return inherited | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}


START = """
import hashlib, os, sys
from pathlib import Path
from tests.apt_core.checkpoint.test_packed_cache import start
os.environ["APT_CACHE"] = sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
for _ in range(5):
    print(hashlib.sha256(start(Path(sys.argv[1])).logits().numpy().tobytes()).hexdigest())
"""


def test_processes_that_start_at_once_all_get_whole_weights(source: Path, cache: Path) -> None:
    command = [sys.executable, "-c", START, str(source), str(cache.parent)]
    processes = [subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True, env=environment()) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    digests = [digest for process in processes for digest in process.communicate(timeout=120)[0].split()]

    expected = start(source)
    assert expected.is_hit
    assert digests == [hashlib.sha256(expected.logits().numpy().tobytes()).hexdigest()] * 10
    assert len(list(cache.iterdir())) == 1


VALUES = (torch.arange(96 * 64) * 37 % 61 % 17 - 8).view(96, 64) / 8
"""So short that every sum over them is exact, on any processor."""


def digest(*tensors: torch.Tensor) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def test_quantizing_gives_the_values_of_its_version() -> None:
    """If this fails on purpose, raise QUANTIZATION_VERSION: packed weights made before would still be served."""
    int8, int4 = quantize_int8(VALUES), quantize_int4(VALUES)
    assert int4 is not None
    found = (digest(int8.values, int8.scales), digest(int4.values, int4.scales, int4.minima))
    assert (QUANTIZATION_VERSION, found) == (1, ("a4cb774e255e3cc6", "6323f496902479c7"))


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_packing_gives_the_bytes_of_its_version_whatever_the_instruction_set(isa: str) -> None:
    """If this fails on purpose, raise PACKED_LAYOUT_VERSION: packed weights made before would still be served."""
    with using_isa(isa):
        found = tuple(digest(pack_weight(VALUES, precision).data) for precision in ("bfloat16", "int8", "int4"))
    expected = ("1c0cfd5f3875f8e5", "b5c64860565786d4", "fde2533a73ddf0b4")
    assert (ops.PACKED_LAYOUT_VERSION, found) == (1, expected)
