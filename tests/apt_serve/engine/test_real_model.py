"""The embedded model through the engine, in float32, equals transformers on the same dequantized weights."""

import pytest
import torch
import transformers

from apt_core.checkpoint import open_checkpoint
from apt_kernels.cpu import native
from apt_serve.engine.config import EMBEDDED_MODEL
from apt_serve.engine.sampling_params import SamplingParams
from apt_serve.llm import LLM

NEAR_TIE = 1e-4
"""Where the reference's two best logits are closer than this, either token is right."""
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Q: What is 12 + 30?\nA:",
    "1, 1, 2, 3, 5, 8, 13,",
    "Dear Sir or Madam,\n\nI am writing to",
    "Die Hauptstadt von Deutschland ist",
    "日本の首都は",
    "The mitochondria is the",
    '{"name": "Ada", "age": 36, "city":',
    "<html>\n<head>\n<title>",
    "To be, or not to be, that is the",
    "SELECT name, age FROM users WHERE",
    "😀 😃 😄",
    "a",
    "The quick brown fox jumps over the lazy dog. " * 20,
    "In 1969, Neil Armstrong",
    "Ingredients:\n- 2 cups of flour\n- 1 cup of sugar\n-",
    "def quicksort(arr):\n    if len(arr) <= 1:\n        return arr\n",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
]


@pytest.fixture(scope="module")
def llm():
    return LLM(EMBEDDED_MODEL, dtype="float32", num_threads=1, max_model_len=1024, max_num_batched_tokens=200)


@pytest.fixture(scope="module")
def reference():
    """transformers' model with the weights of the same checkpoint."""
    checkpoint = open_checkpoint(EMBEDDED_MODEL)
    config = checkpoint.config
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
            tie_word_embeddings=True,
        )
    ).eval()
    missing, unexpected = model.load_state_dict(dict(checkpoint.tensors()), strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    return model


@pytest.fixture(scope="module")
def results(llm):
    """All prompts at once, with chunked prompts and mixed steps."""
    return llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, logprobs=3))


@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_greedy_tokens_and_logprobs_equal_transformers(number, results, reference):
    result = results[number]
    tokens = torch.tensor([*result.prompt_token_ids, *result.token_ids])
    with torch.no_grad():
        logits = reference(tokens[None]).logits[0, len(result.prompt_token_ids) - 1 : -1]
    expected = torch.log_softmax(logits, -1)
    assert len(result.token_ids) == 64
    for position, (token, entry) in enumerate(zip(result.token_ids, result.completions[0].logprobs, strict=True)):
        best = expected[position].topk(2)
        is_near_tie = best.values[0] - best.values[1] < NEAR_TIE
        assert token == best.indices[0] or is_near_tie, f"token {position}"
        assert entry.chosen.logprob == pytest.approx(float(expected[position, token]), abs=1e-3)
        for top in entry.top:
            assert top.logprob == pytest.approx(float(expected[position, top.token_id]), abs=1e-3)


def test_text_is_the_decoded_tokens(llm, results):
    for result in results:
        assert "\ufffd" not in result.text[:-1]  # the last character may be cut by max_tokens
        assert llm.tokenizer.decode(result.token_ids) == result.text


def test_the_chat_template_gets_a_sensible_answer(llm):
    answer = llm.chat([{"role": "user", "content": "What is the capital of France?"}], SamplingParams(temperature=0))
    assert "Paris" in answer.text and answer.completions[0].finish_reason == "stop"


def test_a_prompt_is_text_or_token_ids_and_one_or_many(llm):
    sampling = SamplingParams(temperature=0, max_tokens=3)
    ids = llm.tokenizer.encode(PROMPTS[0])
    alone = llm.generate(PROMPTS[0], sampling)[0]
    assert alone.token_ids == llm.generate(ids, sampling)[0].token_ids
    assert next(r.token_ids for r in llm.generate([PROMPTS[0], PROMPTS[2]], sampling)) == alone.token_ids
    per_prompt = llm.generate([ids, ids], [sampling, SamplingParams(temperature=0, max_tokens=5)])
    assert [len(r.token_ids) for r in per_prompt] == [3, 5]
    assert per_prompt[1].num_cached_tokens == 0  # shorter than a block


def test_bfloat16_gives_a_sensible_answer_and_the_same_alone_and_among_others():
    llm = LLM(EMBEDDED_MODEL, dtype="bfloat16", num_threads=1, max_model_len=512)
    sampling = SamplingParams(temperature=0, max_tokens=16)
    together = llm.generate(PROMPTS[:4], sampling)
    assert "Paris" in together[0].text
    assert [llm.generate(prompt, sampling)[0].token_ids for prompt in PROMPTS[:4]] == [r.token_ids for r in together]


@pytest.mark.skipif(not native.is_enabled(), reason="torch's own ops depend on the chunk")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_result_does_not_depend_on_how_the_prompt_was_cut(dtype):
    sampling = SamplingParams(temperature=0, max_tokens=8, logprobs=2)
    results = []
    for budget, num_threads in ((600, 1), (70, 1), (64, 2)):
        llm = LLM(
            EMBEDDED_MODEL, dtype=dtype, num_threads=num_threads, max_model_len=1024, max_num_batched_tokens=budget
        )
        results.append([r.completions[0].logprobs for r in llm.generate(PROMPTS[12:], sampling)])
    assert results[0] == results[1] == results[2]
