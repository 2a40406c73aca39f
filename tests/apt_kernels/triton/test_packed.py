"""What `ops` makes of weights on a GPU, and that its products are those of the twins."""

import pytest
import torch

from apt_kernels import ops, reference
from apt_kernels.cpu.linear import PlainWeight
from apt_kernels.ops import backends
from apt_kernels.triton import linear_fp8, packed
from apt_kernels.triton.launch import INTERPRETED
from tests.apt_kernels.triton.as_on_gpu import take_for_gpu
from tests.apt_kernels.triton.linear_cases import DEVICE, assert_close, make_bias, make_float8_x, make_x


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """Where there is none, `ops` takes this machine for one, and kernels are interpreted."""
    if INTERPRETED:
        take_for_gpu(monkeypatch)


def make_int8(num_out=50, num_in=192):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (num_out, num_in), generator=generator, dtype=torch.int8)
    return weight.to(DEVICE), (torch.rand(num_out, generator=generator) * 0.02 + 0.001).to(DEVICE)


@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_int8_weights_leave_inputs_as_they_are(out_dtype):
    weight, scales = make_int8()
    x, bias = make_x(5, 192, torch.float16), make_bias(50)
    found = ops.pack_int8_weight(weight, scales)
    assert isinstance(found, packed.W8A16Weight) and (found.out_features, found.in_features) == (50, 192)
    exact = reference.dequantize_int8(weight, scales, torch.float64)
    out = ops.packed_linear(x, found, bias, out_dtype)
    assert_close(out, reference.weight_only_linear(x, exact, bias, out_dtype or torch.float16))


@pytest.mark.parametrize("input_scale", [None, 0.03])
def test_int8_weights_made_for_int8_inputs_get_them(input_scale):
    weight, scales = make_int8()
    x = make_x(5, 192, torch.float16)
    found = ops.pack_int8_weight(weight, scales, has_int8_inputs=True, input_scale=input_scale)
    assert isinstance(found, packed.W8A8Weight) and (found.out_features, found.in_features) == (50, 192)
    expected = reference.int8_row_linear(x, weight, scales, None, torch.float16, input_scale)
    assert_close(ops.packed_linear(x, found), expected)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_4_bit_weights_leave_inputs_as_they_are(group_size):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (50, 384), generator=generator, dtype=torch.uint8).to(DEVICE)
    scales, minima = (torch.rand(50, 384 // group_size, generator=generator).half().to(DEVICE) for _ in range(2))
    x = make_x(5, 384, torch.float16)
    found = ops.pack_int4_weight(codes, scales, minima)
    assert isinstance(found, packed.W4A16Weight) and (found.out_features, found.in_features) == (50, 384)
    weight = reference.dequantize_int4(codes, scales, minima).half()
    assert_close(ops.packed_linear(x, found), reference.weight_only_linear(x, weight, None, torch.float16))


@pytest.mark.parametrize("block", [None, (128, 128)])
def test_float8_weights(block):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(150, 192, generator=generator).to(torch.float8_e4m3fn).to(DEVICE)
    scales = torch.rand((150,) if block is None else (2, 2), generator=generator).to(DEVICE)
    x = make_float8_x(5, 192, torch.float16)
    found = ops.pack_float8_weight(weight, scales, block)
    assert isinstance(found, packed.Fp8Weight) and (found.out_features, found.in_features) == (150, 192)
    quantizes_x = linear_fp8.has_float8(x.device)
    expected = reference.float8_linear(x, weight, scales, None, torch.float16, block=block, quantizes_x=quantizes_x)
    assert_close(ops.packed_linear(x, found), expected)


def test_float_weights_stay_with_torch():
    weight = torch.randn(7, 5, device=DEVICE)
    assert isinstance(ops.pack_linear_weight(weight), PlainWeight)
    assert not ops.can_pack(weight.to("meta")), "only what is on a processor is worth packing"


def test_inputs_and_weights_may_lie_in_any_way():
    weight, scales = make_int8()
    x = make_x(192, 5, torch.float16).T
    for has_int8_inputs in (False, True):
        found = ops.pack_int8_weight(weight.T.contiguous().T, scales.repeat(2)[::2], has_int8_inputs=has_int8_inputs)
        expected = ops.pack_int8_weight(weight, scales.repeat(2)[::2].contiguous(), has_int8_inputs=has_int8_inputs)
        assert torch.equal(ops.packed_linear(x, found), ops.packed_linear(x.contiguous(), expected))


def test_tokens_are_chosen_by_the_kernels(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(backends, "is_triton", lambda *_: True)
    logits = torch.randn(300, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE).T
    ones, ids = torch.ones(3, device=DEVICE), torch.tensor([5, 0, 299], device=DEVICE)
    parameters = {
        "temperature": ones,
        "top_k": ids,
        "top_p": ones * 0.9,
        "min_p": ones * 0,
        "uniform": ones.double() / 2,
    }
    assert torch.equal(ops.argmax(logits), reference.argmax(logits))
    assert torch.equal(ops.sample(logits, **parameters), reference.sample(logits, *parameters.values()))
    for found, expected in zip(ops.top_logprobs(logits, ids, 3), reference.top_logprobs(logits, ids, 3), strict=True):
        torch.testing.assert_close(found, expected, rtol=3e-6, atol=3e-6)


def test_arguments_that_do_not_fit_are_named(monkeypatch):
    weight = torch.zeros(50, 192, device=DEVICE).to(torch.float8_e4m3fn)
    for args, message in [
        ((weight.float(), torch.ones(50, device=DEVICE)), "weight must be float8_e4m3fn"),
        ((weight, torch.ones(49, device=DEVICE)), r"scales must be float32 \(50,\)"),
        ((weight, torch.ones(2, 2, device=DEVICE), (64, 128)), r"scales must be float32 \(1, 2\)"),
        ((weight, torch.ones(1, 3, device=DEVICE), (64, 64)), "block must hold a multiple of 128"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.pack_float8_weight(*args)
    monkeypatch.setattr(backends, "is_on_gpu", lambda x: False)
    with pytest.raises(ValueError, match="weight must be on a CUDA device"):
        ops.pack_float8_weight(weight, torch.ones(50, device=DEVICE))
