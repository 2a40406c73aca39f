"""Linear cross-entropy by Triton: loss and gradients equal the twin's, whatever the chunks and blocks."""

import pytest
import torch

from apt_kernels import reference
from apt_kernels.triton import cross_entropy
from apt_kernels.triton.cross_entropy import linear_cross_entropy
from apt_kernels.triton.tuning import Config
from tests.apt_kernels.triton.training_cases import (
    DEVICE,
    DTYPES_WITHOUT_PRODUCTS,
    NEEDS_GPU,
    assert_same_bits,
    normal,
)

IGNORED = -100
TOLERANCE = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(cross_entropy, "tuned", lambda *_: Config({"BLOCK": 32}))


def make(num_tokens=13, width=24, vocab_size=70, dtype=torch.float32):
    """Hidden states, a weight, and targets of which some do not count."""
    hidden, weight = normal(num_tokens, width, dtype=dtype), normal(vocab_size, width, dtype=dtype, seed=1)
    targets = torch.randint(0, vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    targets[2::5] = IGNORED
    return hidden, weight, targets


def gradients(function, hidden, weight, targets, **options):
    """The mean loss, the number of tokens, and the gradients of the mean."""
    hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
    total, count = function(hidden, weight, targets, **options)
    mean = total / count.clamp(min=1)
    mean.backward()
    return [mean.detach(), count, hidden.grad, weight.grad]


def twin(hidden, weight, targets, z_loss=0.0):
    return reference.linear_cross_entropy(hidden, weight, targets, IGNORED, z_loss)


def assert_close(results, expected, dtype):
    for got, wanted in zip(results, expected, strict=True):
        assert got.shape == wanted.shape
        largest = wanted.abs().max().item() if wanted.numel() else 0.0
        torch.testing.assert_close(got.double(), wanted.double(), rtol=0, atol=TOLERANCE[dtype] * max(largest, 1e-3))


@pytest.mark.parametrize("dtype", DTYPES_WITHOUT_PRODUCTS, ids=str)
@pytest.mark.parametrize("z_loss", [0.0, 0.03])
@pytest.mark.parametrize("chunk_size", [None, 1, 5])
def test_equals_its_twin(chunk_size, z_loss, dtype):
    hidden, weight, targets = make(dtype=dtype)
    results = gradients(linear_cross_entropy, hidden, weight, targets, z_loss=z_loss, chunk_size=chunk_size)
    assert results[0].dtype == torch.float32 and results[2].dtype == results[3].dtype == dtype
    assert_close(results, gradients(twin, hidden.double(), weight.double(), targets, z_loss=z_loss), dtype)


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 65])
def test_equals_its_twin_for_vocabularies_of_any_size(vocab_size):
    hidden, weight, targets = make(vocab_size=vocab_size)
    results = gradients(linear_cross_entropy, hidden, weight, targets)
    assert_close(results, gradients(twin, hidden.double(), weight.double(), targets), torch.float32)


def test_strided_hidden_states_and_weights():
    hidden, weight, targets = make(width=48)
    hidden, weight = hidden[:, ::2], weight.T.contiguous().T[:, 24:]
    results = gradients(linear_cross_entropy, hidden, weight, targets, chunk_size=4)
    assert_close(results, gradients(twin, hidden.double(), weight.double(), targets), torch.float32)


def test_large_logits_neither_overflow_nor_lose_the_loss():
    hidden, weight, targets = make()
    hidden = 100 * hidden
    results = gradients(linear_cross_entropy, hidden, weight, targets)
    expected = gradients(twin, hidden.double(), weight.double(), targets)
    torch.testing.assert_close(results[0].double(), expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(results[2].double(), expected[2], rtol=0, atol=2e-3)


def test_tokens_that_do_not_count_have_no_gradient_even_if_all_are_such():
    hidden, weight, targets = make()
    results = gradients(linear_cross_entropy, hidden, weight, targets, chunk_size=4)
    assert not results[2][targets == IGNORED].any()
    results = gradients(linear_cross_entropy, hidden, weight, torch.full_like(targets, IGNORED), chunk_size=4)
    assert not any(x.any() for x in results)
    results = gradients(linear_cross_entropy, hidden[:0], weight, targets[:0])
    assert not any(x.any() for x in results)


def test_the_number_that_does_not_count_is_the_callers():
    hidden, weight, targets = make()
    results = gradients(
        linear_cross_entropy, hidden, weight, targets.masked_fill(targets == IGNORED, 7), ignore_index=7
    )
    expected = gradients(twin, hidden.double(), weight.double(), targets.masked_fill(targets == 7, IGNORED))
    assert_close(results, expected, torch.float32)


@pytest.mark.parametrize("target", [-1, 70, 2**40])
def test_a_target_that_is_no_id_makes_the_loss_nan(target):
    """A kernel cannot raise; it must not read another row's logits either."""
    hidden, weight, targets = make()
    targets[3] = target
    assert linear_cross_entropy(hidden, weight, targets)[0].isnan()


def test_only_the_gradients_that_are_wanted_are_computed():
    hidden, weight, targets = make()
    full = gradients(linear_cross_entropy, hidden, weight, targets)
    with torch.no_grad():
        total, count = linear_cross_entropy(hidden, weight, targets)
    assert torch.equal(total / count, full[0])
    for one, other in ((hidden, weight), (weight, hidden)):
        wanted = one.detach().requires_grad_()
        inputs = (wanted, other) if one is hidden else (other, wanted)
        total, count = linear_cross_entropy(*inputs, targets)
        (total / count).backward()
        assert torch.equal(wanted.grad, full[2] if one is hidden else full[3])


def test_a_weight_tied_to_the_embedding_gets_both_gradients():
    _, weight, targets = make()
    ids = targets.masked_fill(targets == IGNORED, 3)

    def gradient(function, embedding):
        embedding = embedding.detach().requires_grad_()
        total, count = function(torch.tanh(embedding[ids]), embedding, targets)
        (total / count).backward()
        return embedding.grad

    assert_close([gradient(linear_cross_entropy, weight)], [gradient(twin, weight.double())], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES_WITHOUT_PRODUCTS, ids=str)
def test_the_weights_gradient_is_summed_in_float32(dtype):
    """Many chunks add the same small number to a large one, which a narrow sum would not notice."""
    num_tokens = 400
    hidden = torch.full((num_tokens, 16), 2.0**-6, dtype=dtype, device=DEVICE)
    hidden[0] = 8.0
    weight = torch.zeros(2, 16, dtype=dtype, device=DEVICE, requires_grad=True)
    targets = torch.zeros(num_tokens, dtype=torch.int64, device=DEVICE)
    linear_cross_entropy(hidden, weight, targets, chunk_size=1)[0].backward()
    expected = torch.full((16,), (8 + (num_tokens - 1) * 2.0**-6) / 2, device=DEVICE)
    torch.testing.assert_close(weight.grad[0].float(), -expected, rtol=2**-8, atol=0)


def test_gradients_are_the_same_bits_in_every_run():
    inputs = make(dtype=torch.float16)
    assert_same_bits(*(gradients(linear_cross_entropy, *inputs, chunk_size=3) for _ in range(2)))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("hidden", lambda h, w, t: (h[0], w, t)),
        ("hidden", lambda h, w, t: (h.double(), w.double(), t)),
        ("weight", lambda h, w, t: (h, w[:, :8], t)),
        ("weight", lambda h, w, t: (h, w[:0], t)),
        ("weight", lambda h, w, t: (h, w.half(), t)),
        ("weight", lambda h, w, t: (h, w.to("meta"), t)),
        ("targets", lambda h, w, t: (h, w, t[1:])),
        ("targets", lambda h, w, t: (h, w, t.int())),
        ("targets", lambda h, w, t: (h, w, t.repeat_interleave(2)[::2])),
    ],
)
def test_what_the_kernels_cannot_run_is_refused_by_name(name, change):
    with pytest.raises(ValueError, match=f"^{name} "):
        linear_cross_entropy(*change(*make()))


def test_a_chunk_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match=r"^chunk_size "):
        linear_cross_entropy(*make(), chunk_size=0)


def test_the_op_is_well_behaved():
    """Schema, fake tensors, autograd and compilation with shapes that vary."""
    hidden, weight, targets = make()
    op = torch.ops.apt_triton.linear_cross_entropy.default
    options = (IGNORED, 0.1, 5)
    torch.library.opcheck(op, (hidden.requires_grad_(), weight.requires_grad_(), targets, *options, True, True))
    torch.library.opcheck(op, (hidden, weight.detach(), targets, *options, True, False))


def test_it_compiles_into_one_graph():
    inputs = make()
    compiled = torch.compile(lambda *x: linear_cross_entropy(*x, chunk_size=4), backend="aot_eager", fullgraph=True)
    plain = gradients(linear_cross_entropy, *inputs, chunk_size=4)
    assert_same_bits(gradients(compiled, *inputs), plain)


@pytest.mark.parametrize("_", [pytest.param(None, marks=NEEDS_GPU)])
def test_offsets_beyond_32_bits(_):
    """A chunk whose last rows lie behind element 2**31 of its logits."""
    vocab_size = 2**17
    num_tokens = 2**31 // vocab_size + 40
    hidden, weight, targets = make(num_tokens, 16, vocab_size, dtype=torch.bfloat16)
    whole = gradients(linear_cross_entropy, hidden, weight, targets, chunk_size=num_tokens)
    parts = gradients(linear_cross_entropy, hidden, weight, targets, chunk_size=4096)
    torch.testing.assert_close(whole[0], parts[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(whole[2], parts[2], rtol=2e-2, atol=1e-8)
