"""Quantized checkpoints behind the engine: which precision they are kept in, and that they answer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from apt_kernels.cpu import native
from apt_serve.engine.sampling_params import SamplingParams
from apt_serve.llm import LLM
from tests.apt_core.checkpoint.quantized import Layer, Saved, dequantized, pack_rows, save_quantized

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
ROOT = Path(__file__).parents[3]
GENERATE = """
import sys
from apt_serve.engine.sampling_params import SamplingParams
from apt_serve.llm import LLM
llm = LLM(sys.argv[1], dtype="float32", num_threads=1, weight_precision=sys.argv[2])
print(llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))[0].token_ids)
"""


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Saved:
    """GPTQ, symmetric: every value of int4's scales and minima is exact."""
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "cache"))

    def quantize(module: str, num_out: int, num_in: int, generator: torch.Generator) -> Layer | None:
        if module == "lm_head":
            return None
        codes = torch.randint(0, 16, (num_out, num_in), generator=generator)
        scales = ((torch.rand(num_out, num_in // 32, generator=generator) + 0.5) / 40).half()
        zeros = torch.full(scales.shape, 8)
        parts = {"qweight": pack_rows(codes, 4).T, "qzeros": pack_rows(zeros.T - 1, 4), "scales": scales.T}
        return Layer(parts, dequantized(codes, scales, zeros))

    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    return save_quantized(tmp_path, config, quantize)


def generate(folder: Path, **settings: str) -> list[int]:
    llm = LLM(str(folder), num_threads=1, **settings)
    return llm.generate([[5, 6, 7]], GREEDY)[0].token_ids


def formats(folder: Path, **settings: str) -> set[str]:
    model = LLM(str(folder), num_threads=1, **settings).engine._executor._forward.model
    return {type(layer.mlp.gate_up_proj.weight).__name__ for layer in model.model.layers}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_precision_is_the_dequantized_model(dtype: str, saved: Saved) -> None:
    if dtype == "float32":
        expected = generate(saved.plain, dtype=dtype)
        assert generate(saved.folder, dtype=dtype, weight_precision="float32") == expected
    assert len(generate(saved.folder, dtype=dtype)) == 8


@pytest.mark.skipif(not native.is_enabled(), reason="the C++ ops are off")
@pytest.mark.parametrize(
    ("precision", "form"), [("auto", "Int4Weight"), ("int4", "Int4Weight"), ("int8", "Int8Weight")]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_precision_that_weights_are_kept_in(dtype: str, precision: str, form: str, saved: Saved) -> None:
    for _ in ("packed", "from the cache of packed weights"):
        assert formats(saved.folder, dtype=dtype, weight_precision=precision) == {form}


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_dtypes_without_products_take_the_dequantized_weights(dtype: str, saved: Saved) -> None:
    assert generate(saved.folder, dtype=dtype) == generate(saved.plain, dtype=dtype)


def test_without_cpp_ops_the_same_checkpoint_serves_in_float(saved: Saved) -> None:
    """There the kernels stand for exact products of the dequantized weights."""
    environment = os.environ | {"APT_CPU_ISA": "off", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    found = [
        subprocess.run(
            [sys.executable, "-c", GENERATE, str(folder), precision],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
        for folder, precision in ((saved.folder, "auto"), (saved.plain, "float32"))
    ]
    assert found[0] == found[1] and found[0].startswith("[")
