"""Two ranks, processes that share the layers over gloo, give what one rank gives."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from apt_core.errors import ConfigError
from apt_core.parallel import Communicator
from apt_serve.engine import load
from apt_serve.engine.client import GenerationRequest
from apt_serve.engine.config import EngineConfig
from apt_serve.engine.engine import Engine
from apt_serve.engine.executor import Executor
from apt_serve.engine.metrics import FinishRecord, StepRecord
from apt_serve.engine.sampling_params import SamplingParams
from apt_serve.llm import LLM
from tests.apt_core.checkpoint.quantized import Layer, dequantized, pack_rows, save_quantized
from tests.apt_core.checkpoint.tiny import save_folder

VOCAB_SIZE = 513  # one rank has a row more
TIGHT: dict[str, Any] = {
    "dtype": "float64",  # sums in another order then turn no greedy choice
    "block_size": 4,
    "num_kv_blocks": 40,
    "max_model_len": 96,
    "max_num_seqs": 5,
    "max_num_batched_tokens": 12,
}
"""Little room: prompts come in chunks, and sequences are preempted."""


class Counts:
    """What the engine reports, in sums."""

    def __init__(self) -> None:
        self.num_preemptions = self.prefix_cache_hits = 0

    def step(self, record: StepRecord) -> None:
        self.num_preemptions += record.num_preemptions
        self.prefix_cache_hits += record.prefix_cache_hits

    def finished(self, record: FinishRecord) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases, a tied head, an odd vocabulary."""
    path = tmp_path_factory.mktemp("qwen2") / "model"
    save_folder(path, "qwen2", tie_word_embeddings=True, vocab_size=VOCAB_SIZE)
    return path


@pytest.fixture(scope="module")
def counts() -> Counts:
    return Counts()


@pytest.fixture(scope="module")
def two(folder: Path, counts: Counts) -> Iterator[Engine]:
    engine = Engine(EngineConfig(source=str(folder), tensor_parallel_size=2, num_threads=1, **TIGHT), counts)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def one(folder: Path) -> Engine:
    return Engine(EngineConfig(source=str(folder), num_threads=1, **TIGHT))


def some_requests(count: int, **sampling: Any) -> list[GenerationRequest]:
    """Prompts of which many share their beginnings."""
    rng = random.Random(3)
    stems = [[rng.randrange(VOCAB_SIZE) for _ in range(40)] for _ in range(3)]
    requests = []
    for i in range(count):
        tail = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 6))]
        prompt = tuple(rng.choice(stems)[: rng.randrange(40)] + tail)
        parameters = {"temperature": 0.0, "max_tokens": rng.randrange(1, 24), "seed": i} | sampling
        requests.append(GenerationRequest(str(i), prompt, SamplingParams(**parameters)))
    return requests


def run(engine: Engine, requests: list[GenerationRequest], *, aborts: bool = False) -> list[list[Any]]:
    """All requests at once; the outputs of each sequence. With aborts, every third one is aborted midway."""
    outputs: dict[str, list[Any]] = {}
    for request in requests:
        for seq in engine.sequences_of(request):
            outputs[seq.seq_id] = []
            engine.add(seq)
    step = 0
    while engine.has_work:
        for delta in engine.step():
            outputs[delta.seq_id].append(delta.output)
        step += 1
        if aborts and step % 3 == 0 and step // 3 < len(outputs):
            engine.abort(list(outputs)[step // 3])
        assert step < 3000, "no progress"
    assert engine.num_kv_blocks_used == 0
    return list(outputs.values())


def tokens(outputs: list[list[Any]]) -> list[list[int]]:
    return [[token for output in each for token in output.token_ids] for each in outputs]


def logprobs(outputs: list[list[Any]]) -> list[float]:
    """All of them, those of the prompts included."""
    entries = [
        entry
        for each in outputs
        for output in each
        for entry in (*(output.logprobs or ()), *(output.prompt_logprobs or ()))
        if entry is not None
    ]
    return [value.logprob for entry in entries for value in (entry.chosen, *entry.top)]


def test_greedy_output_equals_that_of_one_rank_in_chunks_and_after_preemptions(
    one: Engine, two: Engine, counts: Counts
) -> None:
    requests = some_requests(40)
    expected, found = (tokens(run(engine, requests, aborts=True)) for engine in (one, two))
    assert found == expected
    assert len({tuple(each) for each in expected}) > 20
    assert counts.num_preemptions > 0 and counts.prefix_cache_hits > 0


load_rank_of = load._load_rank_of


def load_rank_that_runs_ahead(config: EngineConfig, communicator: Communicator) -> Executor[Any]:
    load.MAX_STEPS_IN_FLIGHT["cpu"] = 2
    return load_rank_of(config, communicator)


def test_ranks_launch_steps_ahead_and_change_nothing(
    folder: Path, one: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on GPUs; rows change hands between steps that the ranks collect at different times."""
    monkeypatch.setitem(load.MAX_STEPS_IN_FLIGHT, "cpu", 2)
    monkeypatch.setattr(load, "_load_rank_of", load_rank_that_runs_ahead)
    engine = Engine(EngineConfig(source=str(folder), tensor_parallel_size=2, num_threads=1, **TIGHT))
    try:
        requests = some_requests(25)
        run(engine, requests, aborts=True)
        assert tokens(run(engine, requests)) == tokens(run(one, requests))
    finally:
        engine.close()


def test_draws_by_seed_and_penalties_equal_those_of_one_rank(one: Engine, two: Engine) -> None:
    filters = {"top_k": 50, "top_p": 0.95, "repetition_penalty": 1.2, "logit_bias": {7: 5.0}}
    requests = some_requests(6, n=3, temperature=2.0, **filters)
    expected, found = (tokens(run(engine, requests)) for engine in (one, two))
    assert found == expected
    assert len({tuple(each) for each in expected}) > 15  # choices differ


def test_logprobs_equal_those_of_one_rank(one: Engine, two: Engine) -> None:
    requests = some_requests(6, logprobs=2, prompt_logprobs=2)
    expected, found = (logprobs(run(engine, requests)) for engine in (one, two))
    assert len(expected) > 100
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("settings", [{"dtype": "float32"}, {"dtype": "bfloat16", "kv_cache_dtype": "int8"}], ids=str)
def test_packed_weights_and_an_int8_cache_are_shared_too(settings: dict[str, Any], tmp_path: Path) -> None:
    """Sums in another order differ in the last bits, which here turn no choice of a few."""
    save_folder(tmp_path / "model", "qwen3", head_dim=16)
    check_first_tokens(tmp_path / "model", most=5e-2 if settings["dtype"] == "bfloat16" else 1e-3, **settings)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_quantized_checkpoint_is_shared_at_its_groups(dtype: str, tmp_path: Path) -> None:
    """GPTQ; dequantized in float64, and in bfloat16 as it is stored."""
    check_first_tokens(save_gptq(tmp_path, group_size=64), most=1e-4 if dtype == "float64" else 5e-2, dtype=dtype)


def check_first_tokens(folder: Path, *, most: float, **settings: Any) -> None:
    """Log-probabilities of a prompt and of the first token after it."""
    requests = [
        GenerationRequest(
            "0", tuple(range(5, 60)), SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, logprobs=0)
        )
    ]
    found = []
    for size in (1, 2):
        llm = LLM(str(folder), num_threads=1, tensor_parallel_size=size, max_model_len=96, **settings)
        found.append(torch.tensor(logprobs(run(llm.engine, requests))))
        llm.engine.close()
    assert (found[1] - found[0]).norm() / found[0].norm() < most


def save_gptq(path: Path, group_size: int, **config: Any) -> Path:
    """4 bits, symmetric, all linear layers but the head."""

    def quantize(module: str, num_out: int, num_in: int, generator: torch.Generator) -> Layer | None:
        if module == "lm_head":
            return None
        codes = torch.randint(0, 16, (num_out, num_in), generator=generator)
        scales = ((torch.rand(num_out, num_in // group_size, generator=generator) + 0.5) / 40).half()
        zeros = torch.full(scales.shape, 8)
        parts = {"qweight": pack_rows(codes, 4).T, "qzeros": pack_rows(zeros.T - 1, 4), "scales": scales.T}
        return Layer(parts, dequantized(codes, scales, zeros))

    quantization = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "sym": True, "desc_act": False}
    return save_quantized(path, quantization, quantize, **config).folder


def test_groups_that_ranks_would_cut_are_refused_by_name(tmp_path: Path) -> None:
    """Half of 192 is a group and a half."""
    folder = save_gptq(tmp_path, group_size=64, intermediate_size=192)
    with pytest.raises(ConfigError) as caught:
        LLM(str(folder), dtype="bfloat16", tensor_parallel_size=2)
    assert caught.value.field == "tensor_parallel_size"
    assert "intermediate_size (192 in model.layers.0.mlp.down_proj.weight)" in str(caught.value)
