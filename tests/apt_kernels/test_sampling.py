"""Tokens are chosen as the definitions of the filters say, on every instruction set and by the PyTorch twins."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apt_kernels import ops
from apt_kernels.cpu import native
from tests.apt_kernels.isas import using_isa

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = 3e-6
"""Relative, of sums of probabilities: float32 within a few hundred tokens, float64 beyond."""
SIZES = (1, 2, 15, 17, 255, 256, 257, 1000, 5003)
LAST_UNIFORM = 1 - 2.0**-53


@pytest.fixture(params=native.ISAS, autouse=True)
def isa(request):
    """Each instruction set, and `off` for the twins."""
    with using_isa(request.param):
        yield request.param


def make_logits(kind, rows, size, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, size, generator=generator)
    logits = {
        "flat": normal * 0.05,
        "normal": normal * 3,
        "sharp": normal * 40,
        "ties": (normal * 2).round(),
        "equal": torch.full((rows, size), -7.5),
        "masked": normal.masked_fill(torch.rand(rows, size, generator=generator) < 0.9, -torch.inf),
    }[kind]
    if kind == "masked":
        logits[:, size // 2] = 0.25  # something is left
    return logits.to(dtype)


KINDS = ("flat", "normal", "sharp", "ties", "equal", "masked")


def draw(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, uniform=0.5):
    """ops.sample with each parameter a number, or one for each row."""
    rows = len(logits)

    def per_row(value, dtype):
        return torch.tensor(value if isinstance(value, list) else [value] * rows, dtype=dtype)

    return ops.sample(
        logits,
        temperature=per_row(temperature, torch.float32),
        top_k=per_row(top_k, torch.int64),
        top_p=per_row(top_p, torch.float32),
        min_p=per_row(min_p, torch.float32),
        uniform=per_row(uniform, torch.float64),
    ).tolist()


def assert_drawn(token, logits, temperature, top_k, top_p, min_p, uniform):
    """The token is what inverting the filtered distribution gives, computed by definition in float64."""
    row = logits.double().numpy()
    if temperature == 0:
        assert token == row.argmax()
        return
    order = np.lexsort((np.arange(len(row)), -row))
    best = row[order[0]]
    temperature, top_p, min_p = (float(np.float32(x)) for x in (temperature, top_p, min_p))
    if min_p > 0:
        order = order[row[order] >= np.float32(best + temperature * np.log(min_p))]
    order = order[:top_k] if top_k else order
    weights = np.exp((row[order] - best) / temperature)
    before, needed = np.cumsum(weights) - weights, top_p * weights.sum()
    fewest, most = (max(int((before < needed * (1 + slack)).sum()), 1) for slack in (-TOLERANCE, TOLERANCE))
    if top_p == 1:
        fewest = most = len(order)
    assert any(is_at(token, order[:count], weights[:count], uniform) for count in range(fewest, most + 1))


def is_at(token, kept, weights, uniform):
    """Whether the kept weights, summed up in the order of ids, exceed the uniform share of their sum at this token."""
    if token not in kept:
        return False
    by_id = np.argsort(kept)
    cumulative = np.cumsum(weights[by_id])
    place = int(np.flatnonzero(kept[by_id] == token)[0])
    target, slack = uniform * cumulative[-1], TOLERANCE * cumulative[-1]
    return (cumulative[place - 1] if place else 0.0) <= target + slack and cumulative[place] >= target - slack


rows_of_parameters = st.lists(
    st.tuples(
        st.sampled_from([0.0, 1e-30, 1e-5, 0.3, 1.0, 2.0, 1e30]),  # temperature
        st.sampled_from([0, 1, 2, 50, 300, 10**6]),  # top_k
        st.sampled_from([1.0, 0.999, 0.9, 0.3, 1e-6, 5e-324]),  # top_p
        st.sampled_from([0.0, 1e-4, 0.1, 0.9, 1.0]),  # min_p
        st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, LAST_UNIFORM])),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parameters=rows_of_parameters,
    kind=st.sampled_from(KINDS),
    size=st.sampled_from(SIZES),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from(DTYPES),
)
def test_a_draw_inverts_the_filtered_distribution_by_definition(parameters, kind, size, seed, dtype):
    logits = make_logits(kind, len(parameters), size, seed, dtype)
    tokens = draw(logits, *map(list, zip(*parameters, strict=True)))
    for row, token, values in zip(logits, tokens, parameters, strict=True):
        assert_drawn(token, row, *values)


@pytest.mark.parametrize("filters", [{}, {"top_k": 50}, {"top_k": 700}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
@pytest.mark.parametrize("kind", ["flat", "normal", "ties"])
def test_a_large_vocabulary_is_filtered_by_definition(kind, filters):
    logits = make_logits(kind, 4, 49152, seed=5)
    values = {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "uniform": 0.6180339} | filters
    for row, token in zip(logits, draw(logits, **values), strict=True):
        assert_drawn(token, row, **values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_equal_logits_those_with_low_ids_are_kept(dtype):
    logits = make_logits("equal", 1, 1001, 0, dtype)
    for filters, num_kept in [({"top_k": 3}, 3), ({"top_p": 0.5}, 501), ({"top_p": 1e-9}, 1), ({"min_p": 1.0}, 1001)]:
        assert draw(logits, **filters, uniform=LAST_UNIFORM) == [num_kept - 1]
        assert draw(logits, **filters, uniform=0.0) == [0]


def test_a_masked_token_is_never_drawn():
    logits = torch.full((1, 700), -torch.inf)
    logits[0, [300, 650]] = torch.tensor([1.0, 2.0])
    for filters in ({}, {"top_k": 5}, {"top_p": 0.9999}, {"min_p": 1e-9}, {"top_k": 400, "top_p": 0.999}):
        assert draw(logits, **filters, uniform=0.0) == [300]
        assert draw(logits, **filters, uniform=LAST_UNIFORM) == [650]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_without_a_finite_maximum_gets_its_argmax(value):
    logits = torch.full((1, 300), -torch.inf) if value < 0 else torch.zeros(1, 300)
    logits[0, [270, 280]] = value
    expected = [0] if value < 0 else [270]
    assert ops.argmax(logits).tolist() == draw(logits, top_p=0.5) == draw(logits, temperature=0.0) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_argmax_is_the_first_maximum(size, dtype):
    for kind in KINDS:
        logits = make_logits(kind, 5, size, seed=size, dtype=dtype)
        first = [int(np.argmax(row)) for row in logits.float().numpy()]
        assert ops.argmax(logits).tolist() == first
        assert ops.argmax(torch.stack((logits, logits), 2)[:, :, 0]).tolist() == first  # strided


def test_a_row_depends_neither_on_its_company_nor_on_the_number_of_threads():
    parameters = [
        [1.0, 0, 0.9, 0.0, 0.3],
        [0.0, 0, 1.0, 0.0, 0.3],
        [0.7, 50, 1.0, 0.0, 0.9],
        [1.3, 0, 1.0, 0.05, 0.5],
        [1.0, 0, 1.0, 0.0, 0.7],
        [0.9, 400, 0.8, 0.01, 0.2],
    ]
    logits = make_logits("normal", len(parameters), 5003, seed=3)
    ops.set_num_threads(1)
    alone = [draw(logits[i : i + 1], *row)[0] for i, row in enumerate(parameters)]
    logprobs = [ops.top_logprobs(logits[i : i + 1], torch.tensor([alone[i]]), 5) for i in range(len(alone))]
    ops.set_num_threads(3)
    assert draw(logits, *map(list, zip(*parameters, strict=True))) == alone
    together = ops.top_logprobs(logits, torch.tensor(alone), 5)
    for part, expected in zip(together, zip(*logprobs, strict=True), strict=True):
        assert torch.equal(part, torch.cat(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_logprobs_are_those_of_the_softmax_and_the_best_come_first(size, kind, dtype):
    logits = make_logits(kind, 3, size, seed=1, dtype=dtype)
    token_ids, num_top = torch.tensor([0, size // 2, size - 1]), min(size, 20)
    chosen, best, ids = ops.top_logprobs(logits, token_ids, num_top)
    expected = logits.double().log_softmax(-1)
    order = torch.from_numpy(np.argsort(-logits.double().numpy(), axis=-1, kind="stable"))[:, :num_top]
    assert chosen.dtype == best.dtype == torch.float32 and torch.equal(ids, order)
    torch.testing.assert_close(chosen.double(), expected.gather(1, token_ids[:, None]).squeeze(1), rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(best.double(), expected.gather(1, order), rtol=3e-6, atol=3e-6)
    assert torch.equal(ops.top_logprobs(logits, token_ids, 0)[0], chosen)


def test_logprobs_of_a_row_without_a_finite_maximum_are_nan():
    logits = torch.zeros(2, 40)
    logits[0, 3] = torch.nan
    chosen, best, _ = ops.top_logprobs(logits, torch.tensor([3, 3]), 2)
    assert chosen.isnan().tolist() == [True, False] and best.isnan().all(1).tolist() == [True, False]


def test_arguments_that_do_not_fit_are_named():
    logits = torch.zeros(2, 5)
    with pytest.raises(ValueError, match="logits must be"):
        ops.argmax(logits[0])
    with pytest.raises(ValueError, match=r"uniform must be torch.float64 \[2\]"):
        draw(logits, uniform=[0.5])
    with pytest.raises(ValueError, match="token_ids"):
        ops.top_logprobs(logits, torch.tensor([1]), 1)
    with pytest.raises(ValueError, match="num_top must be at most 5"):
        ops.top_logprobs(logits, torch.tensor([1, 1]), 6)


def test_the_declared_fakes_agree_with_the_ops(isa):
    if isa == native.OFF:
        pytest.skip("the twins are made of torch ops")
    logits, ones = torch.randn(3, 40), torch.ones(3)
    token_ids = torch.zeros(3, dtype=torch.int64)
    calls = {
        "argmax": (logits,),
        "sample": (logits, ones, token_ids, ones, ones, ones.double() / 2),
        "top_logprobs": (logits, token_ids, 4),
    }
    for name, args in calls.items():
        torch.library.opcheck(
            getattr(torch.ops.apt_cpu, name).default, args, test_utils=("test_schema", "test_faketensor")
        )
