"""Norms, rope, KV store and packed linear layers."""

import pytest
import torch
import torch.nn.functional as F

from apt_kernels import ops


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_equals_torchs(dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(7, 33, dtype=torch.float64), torch.randn(33, dtype=torch.float64)
    expected = F.rms_norm(x, (33,), weight, 1e-5)
    out = ops.rms_norm(x.to(dtype), weight.to(dtype), 1e-5)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=3e-2 if dtype == torch.bfloat16 else 1e-5, atol=3e-2)


def test_fused_add_rms_norm_returns_the_new_residual_too():
    x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    normed, new_residual = ops.fused_add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(new_residual, x + residual)
    assert torch.equal(normed, ops.rms_norm(x + residual, weight, 1e-6))


def test_rope_keeps_lengths_and_turns_the_dot_product_into_one_of_distances():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 8, dtype=torch.float64)
    inv_freq = torch.tensor([1.0, 0.3, 0.1, 0.01], dtype=torch.float64)

    def rotate(x, position):
        angle = (position * inv_freq).unsqueeze(0)
        return ops.apply_rope(x, angle.cos(), angle.sin())

    torch.testing.assert_close(rotate(q, 11).norm(), q.norm())
    torch.testing.assert_close((rotate(q, 9) * rotate(k, 4)).sum(), (rotate(q, 105) * rotate(k, 100)).sum())


def test_silu_and_mul_gates_the_second_half():
    gate, up = torch.randn(4, 6), torch.randn(4, 6)
    torch.testing.assert_close(ops.silu_and_mul(torch.cat((gate, up), -1)), F.silu(gate) * up)


def test_store_kv_writes_each_slot_and_skips_padding():
    keys, values = torch.zeros(3, 4, 2, 5), torch.zeros(3, 4, 2, 5)
    key, value = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    ops.store_kv(key, value, keys, values, torch.tensor([9, -1, 2]))
    assert torch.equal(keys[2, 1], key[0]) and torch.equal(values[2, 1], value[0])
    assert torch.equal(keys[0, 2], key[2]) and torch.equal(values[0, 2], value[2])
    assert int((keys != 0).any(-1).any(-1).sum()) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_store_kv_quantizes_each_head_of_a_token_by_itself(dtype):
    torch.manual_seed(0)
    keys, values = torch.zeros(2, 3, 4, 2, 16, dtype=torch.int8)
    scales = torch.zeros(2, 3, 4, 2)
    key, value = torch.randn(2, 3, 2, 16).to(dtype)
    key[0, 1] *= 1000
    ops.store_kv(key, value, keys, values, torch.tensor([9, -1, 2]), *scales)
    for x, cache, scale in ((key, keys, scales[0]), (value, values, scales[1])):
        for token, place in ((0, (2, 1)), (2, (0, 2))):
            largest = x[token].abs().amax(-1)
            torch.testing.assert_close(scale[place], largest.float() / 127)
            assert (cache[place].abs().amax(-1) == 127).all()
            error = (cache[place] * scale[place].unsqueeze(-1) - x[token]).abs().amax(-1)
            assert (error <= scale[place] * 0.501).all()


PACKED_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.25}


@pytest.mark.parametrize("dtype", PACKED_TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(960, 576), (576, 1536), (7, 5)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_packed_linear_equals_linear(dtype, shape, has_bias):
    torch.manual_seed(0)
    weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype) if has_bias else None
    if not ops.can_pack(weight):
        pytest.skip("oneDNN has no packed layout for this type here")
    packed = ops.pack_linear_weight(weight)
    for num_rows in (1, 2, 33):
        x = torch.randn(num_rows, shape[1]).to(dtype)
        expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        out = ops.packed_linear(x, packed, None if bias is None else bias.float())
        torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=PACKED_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", PACKED_TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(576, 576), (576, 1536)])
def test_a_row_of_a_packed_linear_does_not_depend_on_the_other_rows(dtype, shape):
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    if not ops.can_pack(weight):
        pytest.skip("oneDNN has no packed layout for this type here")
    packed, x = ops.pack_linear_weight(weight), torch.randn(100, shape[1]).to(dtype)
    together = ops.packed_linear(x, packed, None)
    for num_rows in (1, 2, 3, 8, 17, 64):
        assert torch.equal(ops.packed_linear(x[:num_rows].contiguous(), packed, None), together[:num_rows])
    for row in range(len(x)):
        assert torch.equal(ops.packed_linear(x[row : row + 1], packed, None), together[row : row + 1])


def test_float64_and_float16_are_not_packed():
    assert not ops.can_pack(torch.zeros(4, 4, dtype=torch.float64))
    assert not ops.can_pack(torch.zeros(4, 4, dtype=torch.float16))
