"""Weights as quantized checkpoints store them: what a packed product takes of them, and several side by side."""

import pytest
import torch

from apt_core.quantization import (
    Float8Weight,
    GroupedWeight,
    own_precision,
    pack_weight,
    pack_weights,
    quantize_int4,
    quantize_int8,
)
from apt_core.quantization.int4 import Int4Tensor
from apt_core.quantization.int8 import Int8Tensor
from apt_kernels import ops


def grouped(group_size, num_bits=4, num_in=512, dtype=torch.float32, zeros=None):
    torch.manual_seed(0)
    scales = (torch.rand(20, num_in // group_size) + 0.1).to(dtype)
    if zeros is None:
        zeros = torch.randint(0, 2**num_bits, scales.shape)
    codes = torch.randint(0, 2**num_bits, (20, num_in), dtype=torch.uint8)
    return GroupedWeight(codes, scales, torch.as_tensor(zeros).expand(scales.shape).to(torch.uint8), num_bits)


@pytest.mark.parametrize(("group_size", "kept"), [(32, 32), (64, 64), (96, 32), (128, 128), (512, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int4_moves_a_weight_by_less_than_2_percent_of_a_step(group_size, kept, dtype):
    weight = grouped(group_size, num_in=group_size * 4, dtype=dtype)
    form = weight.kernel_form()
    assert isinstance(form, Int4Tensor) and form.group_size == kept
    assert torch.equal(form.values, weight.codes)
    steps = weight.scales.float().repeat_interleave(group_size, 1)
    assert ((form.dequantize() - weight.dequantize()).abs() / steps).max() < 0.02


def test_symmetric_codes_with_float16_scales_are_exact_in_int4():
    weight = grouped(32, dtype=torch.float16, zeros=8)
    assert torch.equal(weight.kernel_form().dequantize(), weight.dequantize())


def test_one_scale_an_output_is_exact_in_int8():
    weight = grouped(512, num_bits=8, zeros=128)
    form = weight.kernel_form()
    assert isinstance(form, Int8Tensor)
    assert torch.equal(form.dequantize(), weight.dequantize())


@pytest.mark.parametrize(
    "weight",
    [grouped(64, num_bits=8), grouped(512, num_bits=8, zeros=0), grouped(16)],
    ids=["8 bits in groups", "beyond int8", "small groups"],
)
def test_what_no_product_takes(weight):
    assert weight.kernel_form() is None
    assert own_precision([weight]) == "bfloat16"


def test_scales_beyond_float16_are_no_int4():
    weight = grouped(32)
    weight.scales[0, 0] = 1e5
    assert weight.kernel_form() is None


def test_parts_side_by_side_are_packed_as_each_alone():
    """In one group size: the outputs of the whole are those of its parts."""
    x = torch.randn(3, 512)
    parts = [grouped(64).kernel_form(), quantize_int4(torch.randn(10, 512), 64)]
    whole = ops.packed_linear(x, pack_weights(parts, "int4"))
    alone = [ops.packed_linear(x, pack_weight(part, "int4")) for part in parts]
    assert torch.equal(whole, torch.cat(alone, 1))


def test_groups_of_different_sizes_take_the_smallest():
    parts = [grouped(128), torch.randn(7, 512)]
    packed = pack_weights(parts, "int4")
    assert packed.out_features == 27
    x = torch.randn(5, 512)
    expected = x @ torch.cat([parts[0].dequantize(), quantize_int4(parts[1]).dequantize()]).T
    assert (ops.packed_linear(x, packed) - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize(
    ("parts", "precision"),
    [
        ([grouped(32), grouped(64)], "int4"),
        ([quantize_int8(torch.randn(4, 64))], "int8"),
        ([grouped(32), quantize_int8(torch.randn(4, 512))], "bfloat16"),
        ([grouped(32), torch.randn(4, 512).bfloat16()], "bfloat16"),
        ([grouped(32), torch.randn(4, 512)], "float32"),
    ],
)
def test_the_precision_of_parts_side_by_side(parts, precision):
    assert own_precision(parts) == precision


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ([(True, 0.5), (True, 0.5)], (True, 0.5)),
        ([(True, 0.5), (True, 0.25)], (True, None)),
        ([(True, None), (True, None)], (True, None)),
        ([(True, 0.5), (False, None)], (False, None)),
        ([(False, None)], (False, None)),
    ],
)
def test_inputs_are_int8_where_all_parts_were_made_for_it(inputs, expected, monkeypatch):
    given = {}
    monkeypatch.setattr(ops, "pack_int8_weight", lambda *args, **kwargs: given.update(kwargs))
    values, scales = torch.zeros(4, 64, dtype=torch.int8), torch.ones(4)
    pack_weights([Int8Tensor(values, scales, *each) for each in inputs], "int8")
    assert (given["has_int8_inputs"], given["input_scale"]) == expected


class TestFloat8:
    """What a GPU's product is given; a processor has none."""

    @pytest.fixture(autouse=True)
    def given(self, monkeypatch):
        given = []
        monkeypatch.setattr(Float8Weight, "kernel_form", lambda self: self)
        monkeypatch.setattr(ops, "pack_float8_weight", lambda *args: given.append(args) or given[-1])
        return given

    @staticmethod
    def weight(num_out, block, num_in=256):
        torch.manual_seed(num_out)
        values = torch.randn(num_out, num_in).to(torch.float8_e4m3fn)
        return Float8Weight(values, torch.rand(-(-num_out // block[0]), -(-num_in // block[1])), block)

    @pytest.mark.parametrize("blocks", [[(300, 256), (20, 256)], [(1, 256), (1, 256)], [(300, 256), (1, 256)]])
    def test_scales_of_whole_rows_become_one_per_output(self, blocks):
        parts = [self.weight(300, blocks[0]), self.weight(20, blocks[1])]
        assert own_precision(parts) == "float8"
        values, scales = pack_weights(parts, "float8")
        expected = torch.cat([part.dequantize() for part in parts])
        assert torch.equal(values.float() * scales.unsqueeze(1), expected)

    def test_blocks_are_kept_where_parts_end_between_them(self):
        parts = [self.weight(256, (128, 128)), self.weight(100, (128, 128))]
        assert torch.equal(
            Float8Weight(*pack_weights(parts, "float8")).dequantize(), torch.cat([p.dequantize() for p in parts])
        )

    @pytest.mark.parametrize("parts", [[(100, (128, 128)), (128, (128, 128))], [(128, (128, 128)), (128, (64, 128))]])
    def test_other_blocks_are_dequantized(self, parts, given):
        weights = [self.weight(*part) for part in parts]
        packed, x = pack_weights(weights, "float8"), torch.randn(3, 256)
        assert not given
        expected = x @ torch.cat([weight.dequantize() for weight in weights]).T
        assert (ops.packed_linear(x, packed) - expected).norm() / expected.norm() < 0.01


def test_a_processor_has_no_product_for_float8():
    weight = TestFloat8.weight(4, (1, 256))
    assert weight.kernel_form() is None and own_precision([weight]) == "bfloat16"
