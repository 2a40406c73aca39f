"""Linear cross-entropy by torch's own ops: exact, in bounded memory, and refused by name."""

import pytest
import torch
import torch.nn.functional as F

from apt_kernels import cross_entropy, ops, reference
from apt_kernels.cpu import training


def make(num_tokens=13, width=5, vocab_size=11, dtype=torch.float64):
    torch.manual_seed(0)
    hidden, weight = torch.randn(num_tokens, width, dtype=dtype), torch.randn(vocab_size, width, dtype=dtype)
    targets = torch.randint(0, vocab_size, (num_tokens,))
    targets[2::5] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def test_the_twin_is_torchs_cross_entropy_and_the_square_of_the_logsumexp():
    hidden, weight, targets = make()
    total, count = reference.linear_cross_entropy(hidden, weight, targets, -100, 0.5)
    logits = hidden @ weight.T
    squares = logits.logsumexp(-1).square()[targets != -100].sum()
    torch.testing.assert_close(total, F.cross_entropy(logits, targets, reduction="sum") + 0.5 * squares)
    assert count == (targets != -100).sum()


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk_size", [1, 4, 13, None])
def test_gradients_are_exact(chunk_size, z_loss):
    hidden, weight, targets = make()

    def loss(hidden, weight):
        return training.linear_cross_entropy(hidden, weight, targets, -100, z_loss, chunk_size)[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight))
    torch.testing.assert_close(
        loss(hidden, weight), reference.linear_cross_entropy(hidden, weight, targets, -100, z_loss)[0]
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_the_op_equals_the_twin(dtype, tolerance):
    hidden, weight, targets = make(40, 16, 50, dtype)
    total, count = ops.linear_cross_entropy(hidden, weight, targets, z_loss=0.01)
    (total / count).backward()
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected, expected_count = reference.linear_cross_entropy(*wide, targets, -100, 0.01)
    (expected / expected_count).backward()
    assert total.dtype == torch.float32 and count == expected_count
    torch.testing.assert_close(total.double(), expected, rtol=tolerance, atol=0)
    for x, other in zip((hidden, weight), wide, strict=True):
        assert x.grad.dtype == dtype
        largest = other.grad.abs().max().item()
        torch.testing.assert_close(x.grad.double(), other.grad, rtol=0, atol=tolerance * largest)


def test_no_more_than_a_chunk_of_logits_exists(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 300 * 700 * 4)
    hidden, weight, targets = make(1000, 3, 700, torch.float32)
    chunks, buffers = [], set()

    def step(logits, *others):
        chunks.append(len(logits))
        buffers.add(logits.data_ptr())
        cross_entropy.torch_step(logits, *others)

    total, _ = cross_entropy.define("apt_test::linear_cross_entropy", step)(hidden, weight, targets, -100, 0.0)
    assert chunks == [256, 256, 256, 232] and len(buffers) == 1
    torch.testing.assert_close(total, reference.linear_cross_entropy(hidden, weight, targets, -100, 0.0)[0])


def test_no_second_derivative_is_made_up():
    hidden, weight, targets = make()
    (grad,) = torch.autograd.grad(ops.linear_cross_entropy(hidden, weight, targets)[0] ** 2, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("hidden", lambda h, w, t: (h[0], w, t)),
        ("weight", lambda h, w, t: (h, w[:, :3], t)),
        ("weight", lambda h, w, t: (h, w.float(), t)),
        ("weight", lambda h, w, t: (h, w[:0], t)),
        ("targets", lambda h, w, t: (h, w, t[1:])),
        ("targets", lambda h, w, t: (h, w, t.int())),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(name, change):
    with pytest.raises(ValueError, match=f"^{name} "):
        ops.linear_cross_entropy(*change(*make()))


def test_a_target_that_is_no_id_is_an_error():
    hidden, weight, targets = make()
    targets[0] = 11
    with pytest.raises((IndexError, RuntimeError), match=r"out of bounds|is no id"):
        ops.linear_cross_entropy(hidden, weight, targets)


def test_the_op_is_well_behaved():
    """Schema, fake tensors, autograd and compilation with shapes that vary."""
    hidden, weight, targets = make()
    torch.library.opcheck(
        torch.ops.apt.linear_cross_entropy.default, (hidden, weight, targets, -100, 0.1, 5, True, True)
    )
