"""The engine around the model: choices, logprobs, preemption, aborts, failing steps."""

import pytest
import torch

from apt_core.errors import ConfigError, InvalidRequestError
from apt_serve.engine.client import GenerationRequest
from apt_serve.engine.config import EngineConfig
from apt_serve.engine.engine import MAX_FAILED_STEPS, EngineBrokenError
from apt_serve.engine.load import load
from apt_serve.engine.sampling_params import SamplingParams
from tests.apt_serve.engine.tiny_engine import EOS, MAX_MODEL_LEN, VOCAB_SIZE, naive_greedy, naive_logits, tiny_engine

PROMPT = tuple(range(20, 60))


class Run:
    """Drives requests to their ends and keeps what came."""

    def __init__(self, engine):
        self.engine = engine
        self.outputs = {}

    def submit(self, prompt=PROMPT, priority=0, **sampling):
        sampling = {"temperature": 0, "ignore_eos": True} | sampling
        request = GenerationRequest("r", tuple(prompt), SamplingParams(**sampling), priority)
        self.engine.check(request)
        sequences = self.engine.sequences_of(request)
        for seq in sequences:
            self.outputs[seq.seq_id] = []
            self.engine.add(seq)
        return [seq.seq_id for seq in sequences]

    def step(self):
        for delta in self.engine.step():
            self.outputs[delta.seq_id].append(delta.output)

    def finish(self):
        for _ in range(2000):
            if not self.engine.has_work:
                return self
            self.step()
        raise AssertionError("no progress")

    def tokens(self, seq_id):
        return [token for output in self.outputs[seq_id] for token in output.token_ids]

    def reason(self, seq_id):
        return self.outputs[seq_id][-1].finish_reason


def test_a_long_prompt_is_computed_in_chunks_beside_running_streams():
    run = Run(tiny_engine(max_num_batched_tokens=10))
    (first,) = run.submit(prompt=PROMPT[:3], max_tokens=30)
    run.step()
    (second,) = run.submit(max_tokens=5)
    before = len(run.tokens(first))
    while not run.tokens(second):
        run.step()
    assert len(run.tokens(first)) - before >= 4  # a token in every step, while 40 tokens came in chunks of 9
    run.finish()
    assert run.tokens(first) == naive_greedy(PROMPT[:3], 30, stops_at_eos=False)
    assert run.tokens(second) == naive_greedy(PROMPT, 5, stops_at_eos=False)


class UnreadableTokens(list):
    """Tokens that can grow but not be gone through, save for a block of them."""

    def __iter__(self):
        raise AssertionError("a step went through all tokens of a sequence")

    def __getitem__(self, key):
        if isinstance(key, slice):
            assert len(range(*key.indices(len(self)))) <= 4, "a step copied more than a block of a sequence's tokens"
        return super().__getitem__(key)


def test_a_decode_step_does_not_go_through_what_a_sequence_has_so_far():
    engine = tiny_engine(block_size=4)
    sequences = [
        engine.sequences_of(GenerationRequest("r", tuple(prompt), SamplingParams(max_tokens=40, ignore_eos=True)))[0]
        for prompt in ([5] * 20, [6, 7] * 9)
    ]
    for seq in sequences:
        engine.add(seq)
    while any(seq.num_output_tokens == 0 for seq in sequences):
        engine.step()
    for seq in sequences:
        seq.token_ids = UnreadableTokens(seq.token_ids)
    while engine.has_work:
        assert all(delta.output.finish_reason in (None, "length") for delta in engine.step())
    assert [seq.num_output_tokens for seq in sequences] == [40, 40]


def test_preemption_recomputes_and_changes_nothing():
    run = Run(tiny_engine(num_kv_blocks=24, max_num_batched_tokens=64, enable_prefix_caching=False))
    ids = [run.submit(prompt=PROMPT[i : i + 20], max_tokens=40)[0] for i in range(4)]
    run.finish()
    assert run.engine._scheduler.num_preemptions > 0
    for i, seq_id in enumerate(ids):
        assert run.tokens(seq_id) == naive_greedy(PROMPT[i : i + 20], 40, stops_at_eos=False)


def test_sampled_tokens_survive_preemption_and_batch_mates():
    def outputs(**settings):
        run = Run(tiny_engine(max_num_batched_tokens=64, **settings))
        ids = [run.submit(PROMPT[i : i + 20], temperature=1.0, seed=i, max_tokens=30)[0] for i in range(4)]
        run.finish()
        return [run.tokens(i) for i in ids], run.engine._scheduler.num_preemptions

    calm, none = outputs()
    cramped, some = outputs(num_kv_blocks=24, enable_prefix_caching=False)
    assert none == 0 < some
    assert calm == cramped
    alone = Run(tiny_engine())
    (only,) = alone.submit(PROMPT[2:22], temperature=1.0, seed=2, max_tokens=30)
    assert alone.finish().tokens(only) == calm[2]


def test_choices_share_the_prompt_and_differ():
    run = Run(tiny_engine(max_num_batched_tokens=64))
    ids = run.submit(n=4, temperature=1.0, seed=5, max_tokens=12)
    run.finish()
    assert len({tuple(run.tokens(i)) for i in ids}) == 4
    assert [run.outputs[i][0].index for i in ids] == [0, 1, 2, 3]
    assert [run.outputs[i][0].num_cached_tokens for i in ids] == [0, 36, 36, 36]
    again = Run(tiny_engine())
    assert [again.tokens(i) for i in again.submit(n=4, temperature=1.0, seed=5, max_tokens=12) if again.finish()] == [
        run.tokens(i) for i in ids
    ]


def test_a_second_request_finds_its_prefix_in_the_cache():
    run = Run(tiny_engine())
    run.submit(max_tokens=1)
    run.finish()
    (second,) = run.submit(max_tokens=3)
    run.finish()
    assert run.outputs[second][0].num_cached_tokens == 36
    assert run.tokens(second) == naive_greedy(PROMPT, 3, stops_at_eos=False)


@pytest.mark.parametrize("budget", [8, 64])
def test_prompt_and_output_logprobs_equal_a_full_recompute(budget):
    run = Run(tiny_engine(max_num_batched_tokens=budget))
    (seq_id,) = run.submit(max_tokens=4, logprobs=2, prompt_logprobs=2)
    run.finish()
    tokens = [*PROMPT, *run.tokens(seq_id)]
    expected = torch.log_softmax(naive_logits(tokens), -1)
    first = run.outputs[seq_id][0].prompt_logprobs
    assert first[0] is None and len(first) == len(PROMPT)
    found = [*first[1:], *(entry for output in run.outputs[seq_id] for entry in output.logprobs)]
    for position, entry in enumerate(found):
        row = expected[position]
        assert entry.chosen.token_id == tokens[position + 1]
        assert entry.chosen.logprob == pytest.approx(float(row[tokens[position + 1]]), abs=1e-9)
        assert [top.token_id for top in entry.top] == row.topk(2).indices.tolist()


def test_max_tokens_zero_only_scores_the_prompt():
    run = Run(tiny_engine())
    (seq_id,) = run.submit(max_tokens=0, prompt_logprobs=0)
    run.finish()
    assert run.tokens(seq_id) == [] and run.reason(seq_id) == "length"
    assert len(run.outputs[seq_id][0].prompt_logprobs) == len(PROMPT)


def test_generation_ends_at_the_context_length():
    run = Run(tiny_engine())
    (seq_id,) = run.submit()
    run.finish()
    assert len(run.tokens(seq_id)) == MAX_MODEL_LEN - len(PROMPT) and run.reason(seq_id) == "length"


def test_an_abort_frees_everything_at_once_and_others_go_on():
    run = Run(tiny_engine())
    (gone,), (other,) = run.submit(max_tokens=50), run.submit(prompt=PROMPT[:9], max_tokens=10)
    for _ in range(5):
        run.step()
    used = run.engine.num_kv_blocks_used
    delta = run.engine.abort(gone)
    assert delta.output.finish_reason == "abort"
    assert run.engine.num_kv_blocks_used < used and run.engine.num_running == 1
    assert run.engine.abort(gone) is None
    run.finish()
    assert run.tokens(other) == naive_greedy(PROMPT[:9], 10, stops_at_eos=False)
    assert run.engine.num_kv_blocks_used == 0


class Faulty:
    """An executor whose steps raise while ``is_broken``, midway, after the runner has seen them."""

    def __init__(self, runner):
        self.runner, self.is_broken = runner, False
        self.max_steps_in_flight = runner.max_steps_in_flight
        self.is_alive = True

    def launch(self, step):
        handle = self.runner.launch(step)
        if self.is_broken:
            raise RuntimeError("injected")
        return handle

    def collect(self, handle):
        return self.runner.collect(handle)

    def reset(self):
        self.runner.reset()

    def close(self):
        self.runner.close()


def test_a_failed_step_ends_its_own_requests_and_no_later_ones():
    run = Run(tiny_engine(executor=Faulty))
    (lost,) = run.submit(max_tokens=20)
    run.step()
    run.engine._executor.is_broken = True
    run.step()
    run.engine._executor.is_broken = False
    assert run.reason(lost) == "error"
    assert run.engine.num_kv_blocks_used == 0 and not run.engine.has_work
    (after,) = run.submit(max_tokens=20)
    run.finish()
    assert run.outputs[after][0].num_cached_tokens == 0  # what the failed step left in the cache is not trusted
    assert run.tokens(after) == naive_greedy(PROMPT, 20, stops_at_eos=False)


def test_step_after_step_failing_means_the_engine_is_broken():
    run = Run(tiny_engine(executor=Faulty))
    run.engine._executor.is_broken = True
    for _ in range(MAX_FAILED_STEPS - 1):
        run.submit(max_tokens=2)
        run.step()
    run.submit(max_tokens=2)
    with pytest.raises(EngineBrokenError):
        run.step()


class Records:
    def __init__(self):
        self.steps, self.finishes = [], []

    def step(self, record):
        self.steps.append(record)

    def finished(self, record):
        self.finishes.append(record)


def test_what_is_reported_adds_up():
    records = Records()
    run = Run(tiny_engine(metrics=records, max_num_batched_tokens=256))
    run.submit(max_tokens=7, n=2, temperature=1.0)
    run.submit(max_tokens=5)
    (gone,) = run.submit(max_tokens=50)
    run.step()
    run.engine.abort(gone)
    run.finish()
    assert sum(r.num_prompt_tokens for r in records.steps) == 3 * len(PROMPT)
    assert sum(len(r.times_to_first_token_s) for r in records.steps) >= 3
    finished = [r for r in records.finishes if r.reason == "length"]
    assert sorted(r.num_generated_tokens for r in finished) == [5, 7, 7]
    assert [r.reason for r in records.finishes].count("abort") == 1
    generated = sum(r.num_generated_tokens for r in records.steps)
    assert generated == sum(r.num_generated_tokens for r in records.finishes)
    gaps = sum(len(r.inter_token_latencies_s) for r in records.steps)
    assert gaps == generated - sum(len(r.times_to_first_token_s) for r in records.steps)


REFUSED = {
    "empty prompt": (dict(prompt=()), "prompt"),
    "token beyond the vocabulary": (dict(prompt=(VOCAB_SIZE,)), "prompt"),
    "negative token": (dict(prompt=(-1,)), "prompt"),
    "prompt as long as the context": (dict(prompt=(1,) * MAX_MODEL_LEN), "prompt"),
    "prompt and max_tokens over the context": (dict(max_tokens=MAX_MODEL_LEN), "max_tokens"),
    "bias of an unknown token": (dict(logit_bias={VOCAB_SIZE: 1.0}), "logit_bias"),
    "more choices than the server has places": (dict(n=100, temperature=1.0), "n"),
    "unknown stop token": (dict(stop_token_ids=(9999,)), "stop_token_ids"),
}


@pytest.mark.parametrize("request_, param", REFUSED.values(), ids=REFUSED.keys())
def test_what_could_never_be_served_is_refused_by_name(request_, param):
    run = Run(tiny_engine(max_waiting_requests=50))
    with pytest.raises(InvalidRequestError) as refusal:
        run.submit(**request_)
    assert refusal.value.param == param
    assert not run.engine.has_work


def test_a_prompt_as_long_as_the_context_can_still_be_scored():
    run = Run(tiny_engine())
    (seq_id,) = run.submit(prompt=(1,) * MAX_MODEL_LEN, max_tokens=0, prompt_logprobs=0)
    run.finish()
    assert run.reason(seq_id) == "length"


def test_eos_ends_a_generation_unless_ignored():
    prompt = next(p for p in (PROMPT[i:] for i in range(30)) if EOS in naive_greedy(p, 40))
    run = Run(tiny_engine())
    (ends,), (goes_on,) = run.submit(prompt, ignore_eos=False, max_tokens=40), run.submit(prompt, max_tokens=40)
    run.finish()
    assert run.tokens(ends)[-1] == EOS and run.reason(ends) == "stop"
    assert len(run.tokens(goes_on)) == 40


@pytest.mark.parametrize(
    "settings, field",
    [
        (dict(num_kv_blocks=2), "num_kv_blocks"),
        (dict(kv_cache_gib=0.01), "kv_cache_gib"),
        (dict(num_kv_blocks=10**9), "num_kv_blocks"),
        (dict(max_model_len=10**6), "max_model_len"),
        (dict(device="cuda"), "device"),
    ],
)
def test_settings_that_do_not_go_with_model_or_machine_are_refused_by_name(settings, field):
    if field == "device" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ConfigError) as refusal:
        load(EngineConfig(**settings))
    assert refusal.value.field == field


def test_prefixes_are_shared_among_requests_of_one_salt_alone():
    run = Run(tiny_engine(policy="fair"))

    def cached_tokens(salt):
        request = GenerationRequest("r", PROMPT, SamplingParams(temperature=0, max_tokens=2), cache_salt=salt)
        (seq,) = run.engine.sequences_of(request)
        run.outputs[seq.seq_id] = []
        run.engine.add(seq)
        run.finish()
        return run.outputs[seq.seq_id][-1].num_cached_tokens

    assert [cached_tokens(salt) for salt in ("", "a", "b")] == [0, 0, 0]
    assert min(cached_tokens(salt) for salt in ("", "a", "b")) > 0
