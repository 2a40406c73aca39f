"""APT's attention as a plug-in of vLLM's: the same greedy tokens of the real model as vLLM's own, on a processor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

from apt_core.tokenizer import build_tokenizer, read_tokenizer_files
from apt_kernels import vllm as plugin
from apt_serve.engine.config import EngineConfig
from apt_serve.engine.vllm.settings import model_folder
from tests.serving.conftest import ROOT
from tests.vllm.conftest import SETTINGS

MAX_TOKENS = 24
NEAR_TIE = 0.25
"""Of two log-probabilities: two steps of bfloat16 logits between 16 and 32."""
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a land far away,",
    "1, 2, 3, 4,",
    "Der Rhein ist",
    "Water boils at",
    "The three laws of motion are",
    "import numpy as np\n",
    "Roses are red,",
    "Dear Sir or Madam,",
    "The opposite of hot is",
    "SELECT name FROM",
    "In 1969 the first",
    "A recipe for bread:\n",
    "La lune est",
    "The quick brown fox",
    "Two plus two equals",
    "An apple a day",
    "The mitochondria are the",
    # Longer than a step's 512 tokens: its queries attend to keys of an earlier step, other prompts decode meanwhile.
    "The cat sat on the mat, and the dog lay by the door. " * 60,
)


@dataclass(frozen=True)
class Answer:
    tokens: list[list[int]]
    margins: list[list[float]]
    """By how much each token was likelier than the second likeliest, in log-probability."""
    classes: list[str]
    num_calls: int


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the entry points of pyproject.toml: an environment may have been installed before they were."""
    folder = tmp_path_factory.mktemp("metadata")
    info = folder / "apt_llm_plugin-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: apt-llm-plugin\nVersion: 0\n")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in declared.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return folder


def generate(folder: Path, metadata: Path, attention: str, dtype: str) -> Answer:
    tokenizer = build_tokenizer(read_tokenizer_files(model_folder(EngineConfig(engine="vllm", dtype="float32"))))
    settings = {name: value for name, value in SETTINGS.items() if name != "engine"}
    settings |= {"vllm_attention": attention, "dtype": dtype, "enable_prefix_caching": False}
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    task = {"settings": settings, "prompts": prompts, "max_tokens": MAX_TOKENS}
    variables = {
        "PYTHONPATH": f"{metadata}:{ROOT}:{ROOT / 'kernels'}",
        "TORCHDYNAMO_DISABLE": "1",
        "TRITON_INTERPRET": "0",
    }
    command = [sys.executable, "-m", "tests.vllm.attention_run", json.dumps(task), str(folder / attention)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return Answer(**json.loads((folder / attention).read_text()))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_greedy_tokens_are_those_of_vllms_own_attention(metadata: Path, tmp_path: Path, dtype: str) -> None:
    ours, theirs = (generate(tmp_path, metadata, attention, dtype) for attention in ("apt", "vllm"))
    assert ours.classes == ["apt_kernels.vllm.cpu.CpuAttentionImpl"]
    assert ours.num_calls >= 30 * MAX_TOKENS  # each of 30 layers, once a step
    assert theirs.classes == ["vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl"]
    assert theirs.num_calls == 0
    assert len(ours.tokens) == len(theirs.tokens) == len(PROMPTS) == 20
    if dtype == "float32":
        assert ours.tokens == theirs.tokens
        return
    for mine, wanted, margins in zip(ours.tokens, theirs.tokens, theirs.margins, strict=True):
        differing = [i for i, (a, b) in enumerate(zip(mine, wanted, strict=False)) if a != b]
        assert not differing or margins[differing[0]] <= NEAR_TIE


@pytest.fixture
def backends() -> Any:
    """vLLM's registry, left as it was."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    members = (AttentionBackendEnum.CUSTOM, AttentionBackendEnum.CPU_ATTN)
    for member in members:
        member.clear_override()
    yield AttentionBackendEnum
    for member in members:
        member.clear_override()


def test_the_entry_point_is_the_plug_in() -> None:
    [(name, value)] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][
        plugin.GROUP
    ].items()
    assert name == plugin.NAME
    assert EntryPoint(name, value, plugin.GROUP).load() is plugin.register


def test_vllms_attention_on_a_processor_is_replaced_only_on_demand(
    backends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(plugin.SWITCH, raising=False)
    plugin.register()
    assert not backends.CPU_ATTN.is_overridden()
    monkeypatch.setenv(plugin.SWITCH, "1")
    for _ in range(2):  # vLLM may call it again
        plugin.register()
    assert backends.CPU_ATTN.get_class().get_impl_cls().__module__ == "apt_kernels.vllm.cpu"
    assert backends.CUSTOM.get_class().get_impl_cls().__module__ == "apt_kernels.vllm.cuda"
    for member in (backends.CPU_ATTN, backends.CUSTOM):
        assert backends[member.get_class().get_name()] is member


REFUSED: dict[str, dict[str, Any]] = {
    "head_size": {"head_size": 12},
    "dtype": {"dtype": torch.float64},
    "kv_cache_dtype": {"kv_cache_dtype": "fp8"},
    "bfloat16": {"kv_cache_dtype": "bfloat16"},
    "MLA": {"use_mla": True},
    "sinks": {"has_sink": True},
    "sparse": {"use_sparse": True},
    "encoder": {"attn_type": "encoder_only"},
    "non-causal": {"use_non_causal": True},
    "multimodal": {"use_mm_prefix": True},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_gpus_backend_refuses_what_it_lacks(reason: str) -> None:
    from vllm.platforms.interface import DeviceCapability

    from apt_kernels.vllm.cuda import CudaAttentionBackend

    fits = {
        "head_size": 64,
        "dtype": torch.float16,
        "kv_cache_dtype": "auto",
        "block_size": 16,
        "use_mla": False,
        "has_sink": False,
        "use_sparse": False,
        "use_mm_prefix": False,
        "use_per_head_quant_scales": False,
        "device_capability": DeviceCapability(9, 0),
        "attn_type": "decoder",
        "has_sliding_window": True,
    }
    assert CudaAttentionBackend.validate_configuration(**fits) == []
    assert reason in " ".join(CudaAttentionBackend.validate_configuration(**(fits | REFUSED[reason])))
