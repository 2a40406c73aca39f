"""Greedy output of the engine equals a naive full recompute, whatever happens around it."""

import os
import random
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apt_core.kv_cache import allocate_kv_cache
from apt_core.models.linked import link_layers
from apt_kernels.cpu import native
from apt_serve.engine.client import GenerationRequest
from apt_serve.engine.sampling_params import SamplingParams
from tests.apt_serve.engine.tiny_engine import (
    VOCAB_SIZE,
    naive_greedy,
    naive_paged_greedy,
    tiny_engine,
    tiny_model,
    tiny_native_model,
)

NATIVE_MODELS = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "int8": (torch.bfloat16, "int8"),
    "int8 KV cache": (torch.bfloat16, None),
}


def kv_cache_dtype_of(name):
    return "int8" if name == "int8 KV cache" else "auto"


@cache
def expected_output(prompt, max_tokens):
    return tuple(naive_greedy(prompt, max_tokens))


@cache
def expected_native_output(name, prompt, max_tokens):
    """(token id, log-probability) each."""
    model = tiny_native_model(*NATIVE_MODELS[name])
    return tuple(naive_paged_greedy(model, prompt, max_tokens, kv_cache_dtype_of(name)))


@cache
def some_prompts():
    """Prompts of which many share their beginnings."""
    rng = random.Random(1)
    stems = [[rng.randrange(VOCAB_SIZE) for _ in range(40)] for _ in range(3)]
    prompts = []
    for _ in range(14):
        stem = rng.choice(stems)
        tail = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(0, 6))]
        prompts.append(tuple(stem[: rng.randrange(1, 40)] + tail))
    return prompts


arrivals = st.lists(
    st.tuples(
        st.integers(0, 13),  # which prompt
        st.integers(1, 12),  # max_tokens
        st.integers(0, 6),  # steps before it arrives
        st.integers(0, 2),  # priority
        st.one_of(st.none(), st.integers(0, 8)),  # aborted after so many steps
    ),
    min_size=1,
    max_size=10,
)


scenarios = st.fixed_dictionaries(
    {
        "arrivals": arrivals,
        "block_size": st.sampled_from([1, 2, 3, 4, 8]),
        "spare_blocks": st.integers(0, 20),
        "max_num_seqs": st.integers(1, 6),
        "extra_budget": st.integers(0, 20),
        "enable_prefix_caching": st.booleans(),
        "policy": st.sampled_from(["fcfs", "priority", "fair"]),
    }
)


VERSIONS = ("1-a", "2-b", "3-c")


@cache
def weights(version):
    """Another model for each version, of one shape."""
    return tiny_model.__wrapped__(seed=VERSIONS.index(version) + 1)


@cache
def expected_output_on(version, prompt, max_tokens):
    return tuple(naive_greedy(prompt, max_tokens, model=weights(version)))


swaps = st.lists(st.tuples(st.integers(0, 12), st.sampled_from(VERSIONS)), max_size=5)
"""(after so many steps, to which version): back and forth, also while older ones are still in use."""


def tokens(delta):
    return delta.output.token_ids


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(scenario=scenarios)
def test_greedy_output_equals_a_naive_recompute(scenario):
    check(scenario, tokens, expected_output)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(scenario=scenarios)
def test_decode_steps_padded_as_for_a_gpu_change_nothing(scenario):
    check(scenario, tokens, expected_output, pads_decodes=True)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(scenario=scenarios)
def test_steps_launched_before_the_one_before_them_is_known_change_nothing(scenario):
    check(scenario, tokens, expected_output, pads_decodes=True, max_steps_in_flight=2)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(scenario=scenarios, swaps=swaps, is_ahead=st.booleans())
def test_whatever_weights_are_published_meanwhile_a_sequence_runs_on_one_version(scenario, swaps, is_ahead):
    """Equal to a recompute on that version: so no step, and no block of the prefix cache, was another's."""
    settings = {"pads_decodes": True, "max_steps_in_flight": 2} if is_ahead else {}
    check(scenario, tokens, expected_output_on, swaps=swaps, model=weights(VERSIONS[0]), **settings)


@pytest.mark.parametrize("name", NATIVE_MODELS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(scenario=scenarios)
def test_with_the_cpp_ops_tokens_and_logprobs_equal_a_naive_recompute_bit_for_bit(name, scenario):
    if os.environ.get("APT_CPU_ISA") == native.OFF:
        pytest.skip("APT_CPU_ISA=off: the C++ ops are not wanted")
    assert native.is_enabled(), "the C++ ops are not built: python -m apt_kernels.cpu.build"
    model = tiny_native_model(*NATIVE_MODELS[name])
    kv_cache = allocate_kv_cache(
        model.config, num_blocks=1, block_size=4, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    assert name == "float32" or link_layers(model, kv_cache, max_positions=64) is not None

    def tokens_and_logprobs(delta):
        return tuple((entry.chosen.token_id, entry.chosen.logprob) for entry in delta.output.logprobs or ())

    def expected(prompt, max_tokens):
        return expected_native_output(name, prompt, max_tokens)

    kv_cache_dtype = kv_cache_dtype_of(name)
    check(scenario, tokens_and_logprobs, expected, logprobs=0, model=model, kv_cache_dtype=kv_cache_dtype)


class Swapping:
    """Publishes versions to an engine as it steps; old ones are dropped once nothing runs on them."""

    def __init__(self, engine, swaps):
        self.engine = engine
        self.swaps = sorted(swaps, key=lambda swap: swap[0])
        self.loaded = {engine.model.weight_version}

    def before_step(self, step):
        engine = self.engine
        while self.swaps and self.swaps[0][0] <= step:
            version = self.swaps.pop(0)[1]
            if version not in self.loaded:
                engine.add_weights(version, weights(version))
                assert not engine.prepare_weights(version)
                self.loaded.add(version)
            engine.model = replace(engine.model, weight_version=version)
        for version in self.loaded - {engine.model.weight_version}:
            if not engine._scheduler.num_on(version):
                engine.drop_weights(version)
                self.loaded.remove(version)
                break


def check(scenario, result_of, expected, *, logprobs=None, swaps=None, **settings):
    """Run a scenario; what result_of finds in a sequence's deltas is what expected(prompt, max_tokens) says.

    With swaps, expected takes the weight version before these.
    """
    arrivals, block_size = scenario["arrivals"], scenario["block_size"]
    longest = max(len(some_prompts()[prompt]) + max_tokens for prompt, max_tokens, *_ in arrivals)
    engine = tiny_engine(
        num_kv_blocks=-(-longest // block_size) + scenario["spare_blocks"],  # few: preemption is common
        block_size=block_size,
        max_num_seqs=scenario["max_num_seqs"],
        max_num_batched_tokens=scenario["max_num_seqs"] + scenario["extra_budget"],
        enable_prefix_caching=scenario["enable_prefix_caching"],
        policy=scenario["policy"],
        **settings,
    )
    outputs, finish_reasons, wanted, aborts, versions = {}, {}, {}, {}, {}
    swapping = None if swaps is None else Swapping(engine, swaps)

    def take(deltas):
        for delta in deltas:
            outputs[delta.seq_id] += result_of(delta)
            finish_reasons[delta.seq_id] = delta.output.finish_reason
            assert delta.output.weight_version == versions[delta.seq_id]

    step, pending = 0, sorted(arrivals, key=lambda arrival: arrival[2])
    while pending or engine.has_work:
        if swapping:
            swapping.before_step(step)
        while pending and pending[0][2] <= step:
            prompt, max_tokens, _, priority, abort_after = pending.pop(0)
            sampling = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=logprobs)
            request = GenerationRequest("r", some_prompts()[prompt], sampling, priority)
            (seq,) = engine.sequences_of(request)
            outputs[seq.seq_id] = ()
            versions[seq.seq_id] = engine.model.weight_version
            version = () if swaps is None else (engine.model.weight_version,)
            wanted[seq.seq_id] = expected(*version, some_prompts()[prompt], max_tokens)
            if abort_after is not None:
                aborts[seq.seq_id] = step + abort_after
            engine.add(seq)
        for seq_id in [seq_id for seq_id, at in aborts.items() if at == step]:
            if (delta := engine.abort(seq_id)) is not None:
                take([delta])
        take(engine.step())
        step += 1
        assert step < 1000, "no progress"

    for seq_id, output in outputs.items():
        if finish_reasons[seq_id] == "abort":
            assert output == wanted[seq_id][: len(output)]
        else:
            assert output == wanted[seq_id]
            assert finish_reasons[seq_id] in ("stop", "length")
    assert engine.num_kv_blocks_used == 0
    assert engine.num_running == engine.num_waiting == 0
