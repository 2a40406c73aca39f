"""Greedy output of the engine equals a naive full recompute, whatever happens around it."""

import random
from functools import cache

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apt_serve.engine.client import GenerationRequest
from apt_serve.engine.sampling_params import SamplingParams
from tests.apt_serve.engine.tiny_engine import VOCAB_SIZE, naive_greedy, tiny_engine


@cache
def expected_output(prompt, max_tokens):
    return tuple(naive_greedy(prompt, max_tokens))


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


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    arrivals=arrivals,
    block_size=st.sampled_from([1, 2, 3, 4, 8]),
    spare_blocks=st.integers(0, 20),
    max_num_seqs=st.integers(1, 6),
    extra_budget=st.integers(0, 20),
    enable_prefix_caching=st.booleans(),
    policy=st.sampled_from(["fcfs", "priority"]),
)
def test_greedy_output_equals_a_naive_recompute(
    arrivals, block_size, spare_blocks, max_num_seqs, extra_budget, enable_prefix_caching, policy
):
    longest = max(len(some_prompts()[prompt]) + max_tokens for prompt, max_tokens, *_ in arrivals)
    engine = tiny_engine(
        num_kv_blocks=-(-longest // block_size) + spare_blocks,  # few: preemption is common
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + extra_budget,
        enable_prefix_caching=enable_prefix_caching,
        policy=policy,
    )
    outputs, finish_reasons, wanted, aborts = {}, {}, {}, {}

    def take(deltas):
        for delta in deltas:
            outputs[delta.seq_id] += delta.output.token_ids
            finish_reasons[delta.seq_id] = delta.output.finish_reason

    step, pending = 0, sorted(arrivals, key=lambda arrival: arrival[2])
    while pending or engine.has_work:
        while pending and pending[0][2] <= step:
            prompt, max_tokens, _, priority, abort_after = pending.pop(0)
            sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
            request = GenerationRequest("r", some_prompts()[prompt], sampling, priority)
            (seq,) = engine.sequences_of(request)
            outputs[seq.seq_id] = ()
            wanted[seq.seq_id] = expected_output(some_prompts()[prompt], max_tokens)
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
