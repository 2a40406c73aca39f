"""Damaged checkpoints: each fault is a CheckpointError that names the file and, where there is one, the key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from apt_core.checkpoint import open_checkpoint
from apt_core.errors import CheckpointError
from tests.apt_core.checkpoint.tiny import hf_model, save_folder, write_gguf


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / name
        values = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(values | changes))

    return edit


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def overwrite(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return overwrite


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncate(name: str, size: int) -> Callable[[Path], None]:
    """Cut to ``size`` bytes, or by that many if negative."""

    def cut(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:size])

    return cut


FOLDER_FAULTS: list[tuple[Callable[[Path], None], str, str | None]] = [
    (remove("config.json"), "config.json", None),
    (write("config.json", b"{"), "config.json", None),
    (write("config.json", b"[]"), "config.json", None),
    (write("config.json", b"\xff\xfe"), "config.json", None),
    (edit_json("config.json", architectures=["BertModel"]), "config.json", "architectures"),
    (write("generation_config.json", b"nonsense"), "generation_config.json", None),
    (edit_json("generation_config.json", eos_token_id="</s>"), "generation_config.json", "eos_token_id"),
    (remove("model.safetensors"), "", None),
    (truncate("model.safetensors", 0), "model.safetensors", None),
    (truncate("model.safetensors", 4), "model.safetensors", None),
    (truncate("model.safetensors", 8), "model.safetensors", None),
    (truncate("model.safetensors", 100), "model.safetensors", None),
    (truncate("model.safetensors", 20000), "model.safetensors", None),
    (truncate("model.safetensors", -1), "model.safetensors", None),
    (write("model.safetensors", b"\xff" * 64), "model.safetensors", None),
    (remove("tokenizer.json"), "tokenizer.json", None),
    (write("tokenizer.json", b"{}"), "tokenizer.json", None),
    (truncate("tokenizer.json", 500), "tokenizer.json", None),
    (edit_json("tokenizer.json", decoder=None), "tokenizer.json", "decoder"),
    (edit_json("config.json", vocab_size=300), "tokenizer.json", "vocab"),
    (write("tokenizer_config.json", b"{"), "tokenizer_config.json", None),
    (
        edit_json("tokenizer_config.json", added_tokens_decoder={"2": {"content": "the"}}),
        "tokenizer_config.json",
        "added_tokens_decoder.2",
    ),
    (
        edit_json("tokenizer_config.json", added_tokens_decoder={"2": {}}),
        "tokenizer_config.json",
        "added_tokens_decoder.2.content",
    ),
    (
        edit_json("tokenizer_config.json", added_tokens_decoder={"two": {}}),
        "tokenizer_config.json",
        "added_tokens_decoder",
    ),
    (write("chat_template.jinja", b"{% if %}"), "chat_template.jinja", "chat_template"),
    (write("chat_template.jinja", b"\xff"), "chat_template.jinja", None),
]


@pytest.mark.parametrize(("damage", "file", "field"), FOLDER_FAULTS)
def test_a_damaged_folder_is_refused_by_file_and_field(
    damage: Callable[[Path], None], file: str, field: str | None, tmp_path: Path
) -> None:
    save_folder(tmp_path)
    damage(tmp_path)

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(tmp_path))

    assert caught.value.file == str(tmp_path / file)
    assert caught.value.field == field


def test_a_template_in_tokenizer_config_must_be_text(tmp_path: Path) -> None:
    save_folder(tmp_path)
    remove("chat_template.jinja")(tmp_path)
    edit_json("tokenizer_config.json", chat_template=1)(tmp_path)

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(tmp_path))

    assert (caught.value.file, caught.value.field) == (str(tmp_path / "tokenizer_config.json"), "chat_template")


INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00004.safetensors"


@pytest.mark.parametrize(
    ("damage", "file", "field"),
    [
        (remove(SHARD), INDEX, "weight_map."),
        (truncate(SHARD, -1), SHARD, None),
        (write(INDEX, b"{}"), INDEX, "weight_map"),
        (edit_json(INDEX, weight_map={}), INDEX, "weight_map"),
        (edit_json(INDEX, weight_map={"x": 1}), INDEX, "weight_map.x"),
        (edit_json(INDEX, weight_map={"x": "../x.safetensors"}), INDEX, "weight_map.x"),
        (edit_json(INDEX, weight_map={"x": SHARD}), SHARD, "x"),
    ],
)
def test_damaged_shards_are_refused_by_file_and_field(
    damage: Callable[[Path], None], file: str, field: str | None, tmp_path: Path
) -> None:
    model = save_folder(tmp_path)
    remove("model.safetensors")(tmp_path)
    model.save_pretrained(tmp_path, max_shard_size="160KB")
    assert (tmp_path / SHARD).is_file()
    damage(tmp_path)

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(tmp_path))

    assert caught.value.file == str(tmp_path / file)
    assert (caught.value.field or "").startswith(field or "")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", hf_model("llama")).read_bytes()


@pytest.mark.parametrize("part", [0.0, 1e-5, 1e-4, 0.001, 0.01, 0.02, 0.05, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_gguf_is_refused_wherever_it_ends(part: float, gguf: bytes, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf[: int(len(gguf) * part)])

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(path))

    assert caught.value.file == str(path)
    assert not cache.exists()


@pytest.mark.parametrize("position", [0, 4, 11, 19, 27])
def test_a_gguf_whose_counts_are_damaged_is_refused(position: int, gguf: bytes, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf[:position] + b"\x7f" + gguf[position + 1 :])

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(path))

    assert caught.value.file == str(path)


def test_a_gguf_of_the_other_byte_order_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "big") + bytes(16))
    assert GGUFReader(path).byte_order == "S"

    with pytest.raises(CheckpointError, match="byte order"):
        open_checkpoint(str(path))


@pytest.mark.parametrize("tokenizer", [None, "viking"])
def test_a_gguf_without_a_readable_tokenizer_asks_for_one_and_works_with_it(
    tokenizer: str | None, tmp_path: Path, cache: Path
) -> None:
    path = write_gguf(tmp_path / "m.gguf", hf_model("llama"), tokenizer=tokenizer)
    save_folder(tmp_path / "hf")

    for _ in range(2):  # converted, then from the cache
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(str(path))
        assert caught.value.field in ("tokenizer.ggml.model", "tokenizer.ggml.pre")
        assert str(caught.value).count(str(path)) == 1

    assert open_checkpoint(str(path), tokenizer=str(tmp_path / "hf")).tokenizer.vocab_size == 400
