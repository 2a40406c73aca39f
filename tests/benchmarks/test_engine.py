"""Benchmark of the engine: limits of a machine, and models that are a shape only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from apt_core.checkpoint.hf_config import parse_model_config
from apt_core.document import Document
from apt_serve.engine.config import EMBEDDED_MODEL, EngineConfig
from apt_serve.engine.engine import Engine
from benchmarks.engine import batching
from benchmarks.engine.__main__ import Shape
from benchmarks.engine.batching import Comparison, Plan
from benchmarks.engine.offline import Workload, run_offline
from benchmarks.limits import num_layer_weights
from benchmarks.machine import CPU, Limits, best_limits
from benchmarks.models import QWEN3_06B, SHAPES, WEIGHTS, resolve, write_random
from benchmarks.peers.weights import shared_weights
from benchmarks.random_checkpoint import random_checkpoint, random_tokenizer

TINY = QWEN3_06B | {
    "head_dim": 16,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "vocab_size": 50000,
}


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "tiny"
    embedded = shared_weights(EMBEDDED_MODEL, tmp_path_factory.mktemp("embedded")).hf_folder
    names = ("tokenizer.json", "tokenizer_config.json")
    write_random(folder, TINY, {name: (embedded / name).read_text(encoding="utf-8") for name in names})
    return folder


def test_the_shape_is_that_of_qwen3_06b() -> None:
    model = parse_model_config(Document(QWEN3_06B, "config.json"))
    assert model.qk_norm and model.tie_word_embeddings
    # The model card: 0.6 B parameters, 0.44 B of them outside the embedding.
    assert num_layer_weights(model) == pytest.approx(0.44e9, rel=0.01)
    assert num_layer_weights(model) + model.vocab_size * model.hidden_size == pytest.approx(0.596e9, rel=0.01)


def test_a_random_model_runs_although_its_tokenizer_knows_fewer_tokens(random_folder: Path) -> None:
    engine = Engine(EngineConfig(source=str(random_folder), dtype="float32", num_threads=1, max_model_len=64))
    timings = run_offline(engine, Workload(num_streams=2, prompt_len=8, output_len=5), seed=0)
    assert [len(times) for times in timings.streams] == [5, 5]


def test_random_weights_are_the_same_each_time(random_folder: Path, tmp_path: Path) -> None:
    write_random(tmp_path / "again", TINY, {})
    first, again = (load_file(folder / WEIGHTS) for folder in (random_folder, tmp_path / "again"))
    assert list(first) == list(again)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert first["model.embed_tokens.weight"].float().std() == pytest.approx(0.02, rel=0.05)
    assert not list(tmp_path.glob("tmp*"))


def test_an_unknown_shape_names_the_known_ones() -> None:
    with pytest.raises(SystemExit, match=r"random:nothing: no such shape; there are .*random:qwen3-0\.6b"):
        resolve("random:nothing")
    assert resolve("some/folder") == "some/folder"


@pytest.mark.parametrize(
    ("precision", "step_bytes"),
    [("bfloat16", 2 * 0.596e9), ("int8", 0.596e9), ("int4", 0.625 * 0.4404e9 + 0.1556e9)],
)
def test_one_stream_is_bound_by_reading_the_weights(precision: str, step_bytes: float) -> None:
    shape = Shape(parse_model_config(Document(QWEN3_06B, "config.json")), precision, kv_bytes=2)
    limits = Limits(read_gb_s=30.0, gemm_gflop_s=400.0)
    limit = shape.decode_limit(limits, Workload(num_streams=1, prompt_len=0, output_len=0))
    assert limit.bound_by == "reading"
    assert limit.tokens_per_s == pytest.approx(30e9 / step_bytes, rel=0.01)


def test_many_streams_are_bound_by_multiplying() -> None:
    shape = Shape(parse_model_config(Document(QWEN3_06B, "config.json")), "int8", kv_bytes=2)
    limit = shape.decode_limit(Limits(read_gb_s=30.0, gemm_gflop_s=800.0), Workload(32, 128, 64))
    assert limit.bound_by == "multiplying"
    assert limit.tokens_per_s == pytest.approx(800e9 / (2 * 0.596e9), rel=0.01)


def test_the_best_of_each_rate_is_the_limit() -> None:
    found = [Limits(read_gb_s=30.0, gemm_gflop_s=400.0), Limits(read_gb_s=20.0, gemm_gflop_s=800.0)]
    assert best_limits(found) == Limits(read_gb_s=30.0, gemm_gflop_s=800.0)


def test_the_engine_beside_transformers_on_the_same_weights() -> None:
    plan = Plan(streams=(1, 3), prompt_len=8, output_len=4, num_rounds=1, precisions=("bfloat16", "int8", "none"))
    limits = Limits(read_gb_s=10, gemm_gflop_s=100)
    lines = list(Comparison(batching.TINY, CPU, limits, plan).lines())
    rows = [line.split() for line in lines if "bfloat16 " in line or "int8 " in line]
    names = [row[: row.index("bfloat16" if "bfloat16" in row else "int8")] for row in rows]
    assert [" ".join(name) for name in names] == [
        *["transformers batching, sdpa"] * 2,
        *["transformers generate, sdpa"] * 2,
        *["APT"] * 4,
    ]
    assert "APT and transformers agree on the first token after 8 of 8 prompts" in lines
    assert lines[-1] == "missing   APT in none: no weight_precision"


def test_random_weights_need_no_disk_and_are_the_same_each_time() -> None:
    checkpoint = random_checkpoint(batching.TINY, CPU)
    first, again = dict(checkpoint.tensors()), dict(checkpoint.tensors())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert "lm_head.weight" not in first  # tied
    assert first["model.embed_tokens.weight"].float().std() == pytest.approx(0.02, rel=0.05)


def test_the_random_tokenizer_has_text_for_every_token() -> None:
    tokenizer = random_tokenizer(300)
    assert tokenizer.vocab_size == 300
    assert tokenizer.decode([299]) == " 299" and all(tokenizer.token_bytes(token) for token in range(300))


@pytest.mark.parametrize(("name", "billions"), [("smollm2-135m", 0.1345), ("qwen3-8b", 7.57)])
def test_shapes_have_the_known_number_of_weights(name: str, billions: float) -> None:
    model = parse_model_config(Document(SHAPES[name], "config.json"))
    count = num_layer_weights(model) + model.vocab_size * model.hidden_size
    assert count == pytest.approx(billions * 1e9, rel=0.01)
