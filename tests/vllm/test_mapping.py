"""APT's words are vLLM's: every argument that is passed on exists there, and takes the values that APT allows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams as VllmSamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs

from apt_core.errors import ConfigError
from apt_serve.engine.config import EngineConfig
from apt_serve.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from apt_serve.engine.sequence import Sequence
from apt_serve.engine.vllm import VllmEngine, settings
from apt_serve.engine.vllm.settings import engine_args
from apt_serve.engine.vllm.translation import sampling_arguments

KNOWN = {field.name for field in dataclasses.fields(AsyncEngineArgs)}


def test_vllm_knows_every_argument() -> None:
    for is_cpu in (True, False):
        config = EngineConfig(engine="vllm", vllm_attention="apt")
        assert set(engine_args(config, Path("m"), is_cpu=is_cpu)) <= KNOWN
    assert set(settings._SETTING_OF) <= KNOWN


EXTREMES: list[dict[str, Any]] = [
    {},
    {"temperature": 2.0, "top_p": 1e-6, "top_k": -1, "min_p": 1.0},
    {"temperature": 1e-6, "top_p": 0.5},
    {"repetition_penalty": 0.01, "presence_penalty": -2.0, "frequency_penalty": 2.0},
    {"repetition_penalty": 100.0, "seed": -(2**63)},
    {"seed": 2**63 - 1, "logit_bias": {0: -100.0, 7: 100.0}},
    {"logprobs": MAX_LOGPROBS, "prompt_logprobs": 0},
    {"min_tokens": 9, "stop_token_ids": (1, 1, 2), "ignore_eos": True},
    {"stop": ("a" * 1000,), "n": 128, "temperature": 0.0},
]


@pytest.mark.parametrize("given", EXTREMES)
def test_vllm_takes_what_apt_allows(given: dict[str, Any]) -> None:
    seq = Sequence("s", [1], 1, SamplingParams(**given), seed=given.get("seed", 0), max_tokens=0)
    for max_tokens in (0, 9, 10**6):
        seq.max_tokens = max(max_tokens, seq.sampling.min_tokens)
        VllmSamplingParams(**sampling_arguments(seq, frozenset({2})))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"vllm_args": {"eager": True}}, "vllm_args.eager: vLLM has no such argument"),
        ({"vllm_args": {"max_num_seqs": 3}}, "vllm_args.max_num_seqs: set max_num_seqs instead"),
        ({"device": "cuda"}, "device: the installed vLLM was built for processors"),
        ({"max_model_len": 10**7}, "engine: vLLM refuses this model or these settings: "),
    ],
)
async def test_settings_that_cannot_work_are_refused_before_anything_starts(
    given: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = VllmEngine(EngineConfig(engine="vllm", **given))
    with pytest.raises(ConfigError) as caught:
        await engine.start()
    assert str(caught.value).startswith(message)
    assert not engine.stats().is_alive
    await engine.stop()
