"""The embedded model with its weights in fewer bits."""

import pytest
import torch

from apt_core.config import parse
from apt_core.errors import ConfigError
from apt_kernels.cpu import native
from apt_serve.engine import weights as weights_module
from apt_serve.engine.config import EMBEDDED_MODEL, EngineConfig
from apt_serve.engine.load import load
from apt_serve.engine.sampling_params import SamplingParams
from apt_serve.llm import LLM

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "1, 1, 2, 3, 5, 8, 13,",
    "The mitochondria is the",
    "To be, or not to be, that is the",
    "In 1969, Neil Armstrong",
]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def generate(prompts, params=GREEDY, **settings):
    llm = LLM(EMBEDDED_MODEL, num_threads=1, max_model_len=256, max_num_batched_tokens=128, **settings)
    return llm.generate(prompts, params)


@pytest.fixture(scope="module")
def expected():
    return generate(PROMPTS, dtype="float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("precision", "least"), [("bfloat16", 0.94), ("int8", 0.88), ("int4", 0.88)])
def test_the_next_token_is_mostly_that_of_float32(expected, dtype, precision, least):
    """After every beginning of float32's own texts."""
    beginnings, wanted = [], []
    for result in expected:
        for i, token in enumerate(result.token_ids):
            beginnings.append([*result.prompt_token_ids, *result.token_ids[:i]])
            wanted.append(token)
    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    found = [result.token_ids[0] for result in generate(beginnings, one, dtype=dtype, weight_precision=precision)]
    assert sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted) >= least


def test_int8_answers_do_not_depend_on_company():
    settings = {"dtype": "bfloat16", "weight_precision": "int8"}
    together = generate(PROMPTS, **settings)
    assert generate(PROMPTS[:1], **settings)[0].token_ids == together[0].token_ids


@pytest.mark.skipif(not native.is_enabled(), reason="the C++ ops are off")
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_second_start_takes_the_packed_weights_from_the_cache_and_answers_alike(precision, monkeypatch, tmp_path):
    monkeypatch.setenv("APT_CACHE", str(tmp_path))
    settings = {"dtype": "bfloat16", "weight_precision": precision}
    first = generate(PROMPTS, **settings)
    monkeypatch.setattr(weights_module, "pack_linears", lambda *_: pytest.fail("packed again"))
    second = generate(PROMPTS, **settings)
    assert [result.token_ids for result in second] == [result.token_ids for result in first]
    assert len(list((tmp_path / "packed").iterdir())) == 1


@pytest.mark.parametrize("setting", ["weight_precision", "lm_head_precision"])
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_dtypes_that_no_quantized_product_takes(dtype, setting):
    with pytest.raises(ConfigError, match="goes with dtype") as caught:
        load(EngineConfig(dtype=dtype, **{setting: "int8"}))
    assert caught.value.field == setting


@pytest.mark.parametrize("setting", ["weight_precision", "lm_head_precision"])
def test_a_precision_there_is_not_is_refused(setting):
    with pytest.raises(ConfigError, match="'float8', 'int8' or 'int4'") as caught:
        parse(EngineConfig, {setting: "int3"}, where="model")
    assert caught.value.field == f"model.{setting}"


def test_the_head_has_a_precision_of_its_own():
    """Log-probabilities of the prompts' tokens move a little with an int8 head and more with an int4 one."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)

    def logprobs(**settings):
        results = generate(PROMPTS, params, dtype="bfloat16", **settings)
        return torch.tensor([entry.chosen.logprob for result in results for entry in result.prompt_logprobs if entry])

    plain = logprobs()
    assert torch.equal(logprobs(lm_head_precision="bfloat16"), plain)
    int8, int4 = ((logprobs(lm_head_precision=wanted) - plain).abs().mean() for wanted in ("int8", "int4"))
    assert 0 < int8 < int4 < 0.5


@pytest.mark.parametrize("setting", ["weight_precision", "lm_head_precision"])
def test_a_precision_that_the_device_has_no_product_for_is_refused(setting):
    with pytest.raises(ConfigError, match="float32, bfloat16, int8, int4 on cpu, got float8") as caught:
        load(EngineConfig(device="cpu", **{setting: "float8"}))
    assert caught.value.field == setting


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("precision", "least"), [("float8", 0.85), ("int8", 0.9), ("int4", 0.85)])
def test_on_a_gpu_the_next_token_is_mostly_that_of_float32(expected, precision, least):
    texts = [[*result.prompt_token_ids, *result.token_ids] for result in expected]
    scored = SamplingParams(max_tokens=1, prompt_logprobs=1)
    llm = LLM(EMBEDDED_MODEL, device="cuda", max_model_len=256, weight_precision=precision)
    agrees = [
        entry.top[0].token_id == entry.chosen.token_id
        for result, truth in zip(llm.generate(texts, scored), expected, strict=True)
        for entry in result.prompt_logprobs[len(truth.prompt_token_ids) :]
    ]
    assert sum(agrees) / len(agrees) >= least
