"""Tokens are those of the twins, whatever the filters, the ties and the way a row is cut."""

from itertools import product

import pytest
import torch
import triton

from apt_kernels import reference
from apt_kernels.triton import sampling
from apt_kernels.triton.launch import INTERPRETED
from apt_kernels.triton.tuning import Config
from tests.apt_kernels.triton.linear_cases import DEVICE, NEEDS_GPU

# The interpreter's numpy warns of what exp and the division before it overflow to: 0 and infinity.
pytestmark = pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value", "ignore:divide by zero")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAST_UNIFORM = 1 - 2.0**-53
KINDS = ("flat", "normal", "sharp", "ties", "equal", "masked")
ROUNDS = 1 if INTERPRETED else 50
NAMES = ("temperature", "top_k", "top_p", "min_p")
FILTERS = [
    (1.0, 0, 1.0, 0.0),
    (0.0, 0, 1.0, 0.0),
    (0.7, 1, 1.0, 0.0),
    (1.0, 7, 1.0, 0.0),
    (1.5, 300, 1.0, 0.0),
    (1.0, 10**6, 1.0, 0.0),
    (1.0, 0, 0.9, 0.0),
    (0.3, 0, 0.3, 0.0),
    (1.0, 0, 1e-9, 0.0),
    (2.0, 0, 0.999, 0.0),
    (1.0, 0, 1.0, 0.1),
    (1.0, 0, 1.0, 1.0),
    (1.0, 50, 0.8, 0.0),
    (0.8, 5, 0.95, 0.05),
    (1.0, 0, 0.7, 0.02),
    (1e-30, 0, 0.9, 0.0),
    (1e30, 3, 1.0, 0.0),
    (1e30, 0, 0.5, 0.0),
]
"""(temperature, top_k, top_p, min_p)."""


def use_tile(monkeypatch, tile):
    monkeypatch.setattr(sampling, "tuned", lambda *_: Config({"TILE": tile}, num_warps=4))


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
    return logits.to(dtype).to(DEVICE)


def per_row(rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, uniform=0.5):
    """The arguments after the logits, each a number or one for each row."""
    dtypes = (torch.float32, torch.int64, torch.float32, torch.float32, torch.float64)
    values = (temperature, top_k, top_p, min_p, uniform)
    return [
        torch.tensor(value if isinstance(value, list) else [value] * rows, dtype=dtype, device=DEVICE)
        for value, dtype in zip(values, dtypes, strict=True)
    ]


def draw(logits, **parameters):
    return sampling.sample(logits, *per_row(len(logits), **parameters)).tolist()


def assert_equals_twin(logits, uniform, **parameters):
    args = per_row(len(logits), **parameters, uniform=uniform)
    found, expected = sampling.sample(logits, *args), reference.sample(logits, *args)
    wrong = (found != expected).nonzero().flatten().tolist()
    assert not wrong, [(i, found[i].item(), expected[i].item(), [x[i].item() for x in args]) for i in wrong]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "tile"), [(700, 1024), (600, 256)])
def test_draws_are_those_of_the_twin(kind, size, tile, monkeypatch):
    """Also of rows of several tiles, and of more than one tile of tokens that may be kept."""
    use_tile(monkeypatch, tile)
    filters = dict(zip(NAMES, map(list, zip(*FILTERS, strict=True)), strict=True))
    for seed in range(ROUNDS):
        logits = make_logits(kind, len(FILTERS), size, seed)
        uniform = torch.rand(len(FILTERS), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).tolist()
        assert_equals_twin(logits, uniform, **filters)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 600])
def test_all_dtypes_and_odd_sizes(size, dtype):
    filters = [FILTERS[i] for i in (0, 3, 6, 10, 13)]
    parameters = dict(zip(NAMES, map(list, zip(*filters, strict=True)), strict=True))
    assert_equals_twin(make_logits("ties", 5, size, seed=size, dtype=dtype), [0.1, 0.3, 0.5, 0.7, 0.9], **parameters)


@pytest.mark.parametrize("size", [pytest.param(size, marks=NEEDS_GPU) for size in (49152, 128256, 262144)])
@pytest.mark.parametrize("kind", KINDS)
def test_large_vocabularies(kind, size):
    filters = FILTERS * 4
    parameters = dict(zip(NAMES, map(list, zip(*filters, strict=True)), strict=True))
    uniform = torch.rand(len(filters), dtype=torch.float64, generator=torch.Generator().manual_seed(1)).tolist()
    assert_equals_twin(make_logits(kind, len(filters), size, seed=2), uniform, **parameters)


@pytest.mark.parametrize("uniform", [0.0, LAST_UNIFORM])
def test_the_first_and_the_last_kept_token_can_be_drawn(uniform):
    logits = make_logits("normal", 6, 700, seed=4)
    assert_equals_twin(logits, uniform)
    assert_equals_twin(
        logits, uniform, top_k=[3, 20, 0, 0, 9, 0], top_p=[1.0, 1.0, 0.5, 0.9, 0.5, 1.0], min_p=[0.1] * 6
    )


@pytest.mark.parametrize("tile", [256, 1024])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_equal_logits_those_with_low_ids_are_kept(dtype, tile, monkeypatch):
    use_tile(monkeypatch, tile)
    logits = make_logits("equal", 1, 1001, 0, dtype)
    for filters, num_kept in [({"top_k": 3}, 3), ({"top_p": 0.5}, 501), ({"top_p": 1e-9}, 1), ({"min_p": 1.0}, 1001)]:
        assert draw(logits, **filters, uniform=LAST_UNIFORM) == [num_kept - 1]
        assert draw(logits, **filters, uniform=0.0) == [0]


def test_zeros_of_both_signs_are_equal():
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0]], device=DEVICE)
    assert sampling.argmax(logits).tolist() == [1] and sampling.argmax(logits.flip(1)).tolist() == [0]
    assert draw(logits, top_k=2, uniform=LAST_UNIFORM) == [2]
    assert draw(logits, top_p=0.3, uniform=0.0) == [1]


def test_a_masked_token_is_never_drawn():
    logits = torch.full((1, 700), -torch.inf, device=DEVICE)
    logits[0, [300, 650]] = torch.tensor([1.0, 2.0], device=DEVICE)
    for filters in ({}, {"top_k": 5}, {"top_p": 0.9999}, {"min_p": 1e-9}, {"top_k": 400, "top_p": 0.999}):
        assert draw(logits, **filters, uniform=0.0) == [300]
        assert draw(logits, **filters, uniform=LAST_UNIFORM) == [650]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_a_row_without_a_finite_maximum_gets_its_argmax(value, dtype):
    logits = torch.zeros(2, 600, dtype=dtype, device=DEVICE)
    logits[0] = -torch.inf if value == -torch.inf else 0
    logits[0, [570, 580]] = value
    expected = [0 if value == -torch.inf else 570, 300]
    assert sampling.argmax(logits).tolist() == reference.argmax(logits).tolist() == [expected[0], 0]
    assert draw(logits, top_p=0.9999, uniform=0.5)[0] == expected[0] and draw(logits, uniform=0.5) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 5003])
def test_argmax_is_the_first_maximum(size, dtype):
    for kind in KINDS:
        logits = make_logits(kind, 5, size, seed=size, dtype=dtype)
        assert sampling.argmax(logits).tolist() == reference.argmax(logits).tolist()


def test_rows_may_lie_apart():
    wide = make_logits("normal", 4, 900, seed=1)
    logits = wide[::2, 100:800]
    assert torch.equal(sampling.argmax(logits), reference.argmax(logits))
    assert_equals_twin(logits, 0.4, top_k=[0, 5], top_p=[0.8, 1.0])
    found, expected = (
        ops.top_logprobs(logits, torch.tensor([3, 5], device=DEVICE), 2) for ops in (sampling, reference)
    )
    assert torch.equal(found[2], expected[2])


def test_a_row_does_not_depend_on_its_company():
    filters = [FILTERS[i] for i in (0, 1, 3, 6, 12, 14)]
    logits = make_logits("normal", len(filters), 600, seed=3)
    alone = [
        draw(logits[i : i + 1], **dict(zip(NAMES, row, strict=True)), uniform=0.37)[0] for i, row in enumerate(filters)
    ]
    parameters = dict(zip(NAMES, map(list, zip(*filters, strict=True)), strict=True))
    assert draw(logits, **parameters, uniform=0.37) == alone == draw(logits, **parameters, uniform=0.37)


def test_the_tile_changes_no_token(monkeypatch):
    filters = FILTERS[3:10:2]
    logits = make_logits("ties", len(filters), 600, seed=9)
    parameters = dict(zip(NAMES, map(list, zip(*filters, strict=True)), strict=True))
    outs = []
    for tile in (256, 1024):
        use_tile(monkeypatch, tile)
        outs.append(draw(logits, **parameters, uniform=0.61803))
    assert outs[0] == outs[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "size", "num_top"), [*product(KINDS, [300], [5]), ("normal", 1, 1), ("flat", 1300, 20)]
)
def test_logprobs_are_those_of_the_twin(kind, size, num_top, dtype):
    logits = make_logits(kind, 3, size, seed=1, dtype=dtype)
    token_ids = torch.tensor([0, size // 2, size - 1], device=DEVICE)
    found, expected = (ops.top_logprobs(logits, token_ids, num_top) for ops in (sampling, reference))
    assert torch.equal(found[2], expected[2]) and found[0].dtype == found[1].dtype == torch.float32
    for part, twin in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(part, twin, rtol=3e-6, atol=3e-6)
    assert torch.equal(sampling.top_logprobs(logits, token_ids, 0)[0], found[0])


def test_more_candidates_than_a_tile(monkeypatch):
    """Equal logits all compete for the last place; the row itself is read then."""
    use_tile(monkeypatch, 256)
    logits = make_logits("equal", 2, 700, seed=0)
    logits[0, [650, 10]] = torch.tensor([1.0, 0.5], device=DEVICE)
    ids = sampling.top_logprobs(logits, torch.tensor([0, 0], device=DEVICE), 4)[2]
    assert ids.tolist() == [[650, 10, 0, 1], [0, 1, 2, 3]]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logprobs_of_a_row_without_a_finite_maximum_are_nan(value):
    logits = torch.zeros(2, 40, device=DEVICE)
    logits[0, 3] = value
    chosen, best, ids = sampling.top_logprobs(logits, torch.tensor([3, 3], device=DEVICE), 2)
    assert chosen.isnan().tolist() == [True, False] and best.isnan().all(1).tolist() == [True, False]
    assert ids.tolist() == [[3, 0], [0, 1]]


def test_no_rows_give_no_tokens():
    logits = torch.zeros(0, 40, device=DEVICE)
    assert sampling.argmax(logits).shape == (0,) and draw(logits) == []
    parts = sampling.top_logprobs(logits, torch.zeros(0, dtype=torch.int64, device=DEVICE), 3)
    assert [part.shape for part in parts] == [(0,), (0, 3), (0, 3)]


def test_arguments_that_do_not_fit_are_named():
    logits, good = torch.zeros(2, 5, device=DEVICE), per_row(2)
    token_ids = torch.tensor([1, 1], device=DEVICE)
    for wrong, message in [
        (logits[0], r"logits must be \[R, V\]"),
        (torch.zeros(1, sampling.MAX_VOCAB + 1, device=DEVICE), r"logits must be \[R, V\] with V up to 262144"),
        (logits.double(), "logits must be float32"),
        (torch.zeros(5, 2, device=DEVICE).T, "logits must have a row's side by side"),
    ]:
        with pytest.raises(ValueError, match=message):
            sampling.argmax(wrong)
        with pytest.raises(ValueError, match=message):
            sampling.sample(wrong, *good)
    for i, name in enumerate((*NAMES, "uniform")):
        for wrong in (good[i][:1], good[i].to(torch.int32), torch.stack((good[i], good[i]), 1)[:, 0]):
            with pytest.raises(ValueError, match=f"{name} must be"):
                sampling.sample(logits, *good[:i], wrong, *good[i + 1 :])
    with pytest.raises(ValueError, match="token_ids must be"):
        sampling.top_logprobs(logits, token_ids[:1], 1)
    with pytest.raises(ValueError, match="num_top must be at most 5"):
        sampling.top_logprobs(logits, token_ids, 6)


@pytest.mark.parametrize("size", [5, 3000, 262144])
def test_candidates_differ_and_hold_the_default(size):
    found = [str(config) for config in sampling.candidates(size)]
    assert len(set(found)) == len(found)
    assert str(sampling._default_config(size)) in found
    assert sampling.shape_class(size) == sampling.shape_class(triton.next_power_of_2(size))
