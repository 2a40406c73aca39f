"""What `apt-train quantize` writes, in vLLM itself: each scheme loads and gives the tokens that its weights say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from apt_core.metadata import AttentionMetadata
from tests.apt_train.quantize.tiny import loaded, open_output, quantized, save_model
from tests.serving.conftest import ROOT

DTYPES = {"w8a8-dynamic": "float32", "w8a8-static": "float32", "w4a16": "bfloat16", "fp8": "float32"}
"""By scheme: vLLM's processors have products with 4-bit weights in bfloat16 only."""
SHAPE = {"hidden_size": 256, "intermediate_size": 512}
PROMPTS = [list(range(5, 30)), [7, 300, 20], [40, 41], [399, 2, 150, 88]]
MAX_TOKENS = 12
NEAR_TIE = {"float32": 1e-4, "bfloat16": 0.5}
"""Of two logits, over the logits' deviation: bfloat16 alone moves single logits of this model by up to 0.36 of it."""
NUM_SAME = {"float32": 0.95, "bfloat16": 0.8}
"""Least share of tokens that are the likeliest in the simulation as well."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each with a folder `out`, by scheme."""
    root = tmp_path_factory.mktemp("quantized")
    source = save_model(root / "model", **SHAPE)
    found = {scheme: root / scheme for scheme in DTYPES}
    for scheme, folder in found.items():
        folder.mkdir()
        quantized(folder, source, scheme=scheme)
    return found


@pytest.fixture(scope="module")
def answers(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[int]]]:
    """vLLM's tokens, by scheme."""
    out = tmp_path_factory.mktemp("answers") / "answers.json"
    paths = {str(folder / "out"): scheme for scheme, folder in folders.items()}
    task = {
        "folders": {path: DTYPES[scheme] for path, scheme in paths.items()},
        "prompts": PROMPTS,
        "max_tokens": MAX_TOKENS,
    }
    variables = {
        "PYTHONPATH": str(ROOT),
        "TORCHDYNAMO_DISABLE": "1",  # vLLM would compile parts of its sampler, whatever enforce_eager says
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_PLUGINS": "",  # vLLM alone, without APT's plug-in
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "tests.vllm.quantized_run", json.dumps(task), str(out)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return {paths[path]: tokens for path, tokens in json.loads(out.read_text()).items()}


@pytest.mark.parametrize("scheme", DTYPES)
def test_tokens_are_those_of_the_simulation(
    scheme: str, folders: dict[str, Path], answers: dict[str, list[list[int]]]
) -> None:
    if scheme == "w8a8-static" and torch.cpu._is_amx_tile_supported():
        pytest.skip("vLLM's product for AMX makes scales of its own, whatever the checkpoint says")
    # In float64: of an input between two codes the last bit decides, which float32 sums leave to the processor.
    model = loaded(open_output(folders[scheme])).double()
    num_same = 0
    for prompt, tokens in zip(PROMPTS, answers[scheme], strict=True):
        assert len(tokens) == MAX_TOKENS
        ids = torch.tensor(prompt + tokens)
        with torch.inference_mode():
            hidden = model(model.embed(ids), torch.arange(len(ids)), AttentionMetadata.for_full_sequences([len(ids)]))
            logits = model.logits(hidden)[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
        gaps = (logits.amax(1) - chosen) / logits.std()
        num_same += int((gaps == 0).sum())
        assert gaps.max() < NEAR_TIE[DTYPES[scheme]]
    assert num_same >= NUM_SAME[DTYPES[scheme]] * MAX_TOKENS * len(PROMPTS)
