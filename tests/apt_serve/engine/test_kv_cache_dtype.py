"""The embedded model with its KV cache in int8."""

import pytest

from apt_core.errors import ConfigError
from apt_kernels.cpu import native
from apt_serve.engine.config import EMBEDDED_MODEL, EngineConfig
from apt_serve.engine.load import load
from apt_serve.engine.sampling_params import SamplingParams
from apt_serve.llm import LLM

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "The quick brown fox jumps over the lazy dog. " * 20,
    "In 1969, Neil Armstrong",
]
SETTINGS = {"num_threads": 1, "max_model_len": 512, "kv_cache_dtype": "int8"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_next_token_is_mostly_that_of_an_unquantized_cache(dtype):
    settings = {"dtype": dtype, "num_threads": 1, "max_model_len": 512}
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    beginnings, wanted = [], []
    for result in LLM(EMBEDDED_MODEL, **settings).generate(PROMPTS, greedy):
        for i, token in enumerate(result.token_ids):
            beginnings.append([*result.prompt_token_ids, *result.token_ids[:i]])
            wanted.append(token)
    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    found = LLM(EMBEDDED_MODEL, kv_cache_dtype="int8", **settings).generate(beginnings, one)
    assert sum(r.token_ids[0] == token for r, token in zip(found, wanted, strict=True)) / len(wanted) >= 0.94


@pytest.mark.skipif(not native.is_enabled(), reason="torch's own ops depend on the chunk")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_result_depends_neither_on_chunks_nor_on_company_nor_on_the_prefix_cache(dtype):
    sampling = SamplingParams(temperature=0, max_tokens=8, logprobs=2)
    results = []
    for budget in (600, 70, 64):
        llm = LLM(EMBEDDED_MODEL, dtype=dtype, max_num_batched_tokens=budget, max_num_seqs=8, **SETTINGS)
        results.append([r.completions[0].logprobs for r in llm.generate(PROMPTS, sampling)])
    assert results[0] == results[1] == results[2]
    again = llm.generate(PROMPTS[2], sampling)[0]
    assert again.num_cached_tokens > 0 and again.completions[0].logprobs == results[0][2]


def test_a_sequence_that_had_to_give_way_continues_with_the_same_tokens():
    sampling = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    roomy = LLM(EMBEDDED_MODEL, dtype="bfloat16", **SETTINGS).generate(PROMPTS, sampling)
    tight = LLM(EMBEDDED_MODEL, dtype="bfloat16", num_kv_blocks=32, **SETTINGS).generate(PROMPTS, sampling)
    assert [r.token_ids for r in tight] == [r.token_ids for r in roomy]


def test_the_same_memory_holds_about_twice_as_many_tokens():
    config = {"dtype": "bfloat16", "kv_cache_gib": 0.25}
    (wide, narrow) = (load(EngineConfig(kv_cache_dtype=kind, **config)).num_kv_blocks for kind in ("auto", "int8"))
    assert narrow == pytest.approx(wide * 128 / 68, rel=1e-3)


def test_a_float_type_other_than_dtype_is_refused():
    with pytest.raises(ConfigError, match="does not go with dtype bfloat16") as caught:
        load(EngineConfig(dtype="bfloat16", kv_cache_dtype="float32"))
    assert caught.value.field == "kv_cache_dtype"
