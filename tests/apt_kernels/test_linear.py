"""Packed linear layers against their twins, in every format and for every instruction set of this machine."""

import pytest
import torch
import torch.nn.functional as F

from apt_core.quantization import quantize_int4, quantize_int8
from apt_kernels import ops, reference
from apt_kernels.cpu import native
from tests.apt_kernels.isas import INSTRUCTION_SETS, using_isa

SHAPES = [(96, 64), (960, 576), (50, 192), (17, 1536)]
ODD_SHAPES = [(7, 5), (33, 67), (576, 99)]
NUM_ROWS = (1, 2, 3, 5, 8, 9, 13, 33, 64, 131)


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request):
    with using_isa(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def poison():
    """New tensors are full of NaN until somebody writes to them."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_new_tensors_are_poisoned():
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request):
    return getattr(torch, request.param)


def exact_bf16(x, weight, bias):
    out = x.to(torch.bfloat16).double() @ weight.double().T
    return out if bias is None else out + bias


class Bf16:
    """A random weight and what the product should be."""

    def __init__(self, shape):
        self.weight = torch.randn(shape).bfloat16()
        self.packed = ops.pack_linear_weight(self.weight)

    def twin(self, x, bias, out_dtype):
        return exact_bf16(x, self.weight, bias).to(out_dtype)


class Int8:
    def __init__(self, shape):
        self.quantized = quantize_int8(torch.randn(shape))
        self.packed = ops.pack_int8_weight(self.quantized.values, self.quantized.scales)

    def twin(self, x, bias, out_dtype):
        return reference.int8_linear(x, self.quantized.values, self.quantized.scales, bias, out_dtype)


class Int4:
    group_size = 32

    def __init__(self, shape):
        q = self.quantized = quantize_int4(torch.randn(shape), self.group_size)
        self.packed = ops.pack_int4_weight(q.values, q.scales, q.minima)

    def twin(self, x, bias, out_dtype):
        q = self.quantized
        return reference.int4_linear(x, q.values, q.scales, q.minima, bias, out_dtype)


class Int4Wide(Int4):
    group_size = 64


FORMATS = [Bf16, Int8, Int4, Int4Wide]
CASES = [(f, shape) for f in FORMATS for shape in SHAPES] + [(f, shape) for f in (Bf16, Int8) for shape in ODD_SHAPES]


def case_name(value):
    return value.__name__ if isinstance(value, type) else "x".join(map(str, value))


def assert_close(out, expected):
    """Within float32's rounding of sums, or one step of bfloat16."""
    assert out.dtype == expected.dtype and out.shape == expected.shape
    rtol = 2**-7 if out.dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(out, expected, rtol=rtol, atol=2e-3)


@pytest.mark.parametrize(("format_", "shape"), CASES, ids=case_name)
def test_equals_its_twin(isa, format_, shape, dtype):
    torch.manual_seed(0)
    case, bias = format_(shape), torch.randn(shape[0])
    for num_rows in NUM_ROWS:
        x = torch.randn(num_rows, shape[1]).to(dtype)
        for out_dtype in (torch.float32, torch.bfloat16):
            assert_close(ops.packed_linear(x, case.packed, bias, out_dtype), case.twin(x, bias, out_dtype))
        assert_close(ops.packed_linear(x, case.packed), case.twin(x, None, dtype))


@pytest.mark.parametrize("format_", FORMATS, ids=case_name)
def test_a_row_depends_on_neither_the_other_rows_nor_the_threads(isa, format_):
    torch.manual_seed(0)
    packed, x = format_((200, 576)).packed, torch.randn(300, 576).bfloat16()
    together = ops.packed_linear(x, packed)
    try:
        for num_threads in (1, 2, 3):
            ops.set_num_threads(num_threads)
            for num_rows in (1, 2, 7, 8, 9, 32, 64, 300):
                assert torch.equal(ops.packed_linear(x[:num_rows], packed), together[:num_rows])
            assert torch.equal(ops.packed_linear(x[211:212], packed), together[211:212])
    finally:
        ops.set_num_threads(torch.get_num_threads())


def test_int8_sums_are_exact(isa):
    """Bit for bit, at the largest values, too; longer rows add groups up in float32."""
    torch.manual_seed(0)
    weight = torch.randint(-127, 128, (64, reference.INT8_INPUT_GROUP), dtype=torch.int8)
    weight[0], weight[1] = 127, -127
    scales = torch.rand(64) + 0.5
    packed = ops.pack_int8_weight(weight, scales)
    x = torch.randn(20, reference.INT8_INPUT_GROUP)
    x[3], x[4] = 1.0, -1.0
    assert torch.equal(ops.packed_linear(x, packed), reference.int8_linear(x, weight, scales, None, torch.float32))


@pytest.mark.parametrize("format_", FORMATS, ids=case_name)
def test_extreme_inputs(isa, format_, dtype):
    torch.manual_seed(0)
    case = format_((48, 128))
    x = torch.randn(6, 128).to(dtype)
    x[1] = 0
    x[2, 7] = 1e4
    x[3] *= 1e-20
    x[4] *= 1e20
    out, expected = (f(x) for f in (lambda x: ops.packed_linear(x, case.packed), lambda x: case.twin(x, None, dtype)))
    assert not out[1].any()
    size = expected.double().abs().amax(1, keepdim=True) + 1e-300
    torch.testing.assert_close(out.double() / size, expected.double() / size, rtol=0, atol=1e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("format_", FORMATS, ids=case_name)
def test_what_is_no_number_shows_in_its_row_only(isa, format_, value):
    x = torch.randn(9, 128)
    x[4, 100] = value
    is_finite = ops.packed_linear(x, format_((64, 128)).packed).isfinite()
    assert not is_finite[4].any() and is_finite[[0, 1, 2, 3, 5, 6, 7, 8]].all()


@pytest.mark.parametrize("format_", FORMATS, ids=case_name)
def test_strided_and_empty_inputs(format_):
    case, wide = format_((40, 64)), torch.randn(5, 128).bfloat16()
    x = wide[:, 64:]
    assert torch.equal(ops.packed_linear(x, case.packed), ops.packed_linear(x.contiguous(), case.packed))
    assert ops.packed_linear(x[:0], case.packed).shape == (0, 40)


@pytest.mark.parametrize("format_", FORMATS, ids=case_name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes_go_through_float32(format_, dtype):
    case, x = format_((40, 64)), torch.randn(5, 64).to(dtype)
    out = ops.packed_linear(x, case.packed)
    assert out.dtype == dtype
    torch.testing.assert_close(out, case.twin(x.float(), None, dtype), rtol=1e-3, atol=2e-2)


def test_an_offset_beyond_int32():
    """The last of more than 2^31 outputs."""
    if not native.is_enabled():
        pytest.skip("the C++ ops are not built")
    num_rows, out, in_ = 70_000, 31_000, 32
    weight = torch.zeros(out, in_, dtype=torch.bfloat16)
    weight[-1] = 1
    last = ops.packed_linear(torch.ones(num_rows, in_, dtype=torch.bfloat16), ops.pack_linear_weight(weight))[-1]
    assert last[-1] == in_ and not last[:-1].any()


@pytest.mark.parametrize(
    ("weight", "scales", "name"),
    [
        (torch.zeros(4, 8), torch.ones(4), "weight"),
        (torch.zeros(4, 2**17 + 4, dtype=torch.int8), torch.ones(4), "weight"),
        (torch.zeros(4, 8, dtype=torch.int8), torch.ones(5), "scales"),
        (torch.zeros(4, 8, dtype=torch.int8), torch.ones(4).double(), "scales"),
    ],
)
def test_int8_weights_that_do_not_fit(weight, scales, name):
    with pytest.raises(ValueError, match=name):
        ops.pack_int8_weight(weight, scales)


@pytest.mark.parametrize(
    ("in_", "groups", "name"), [(64, 4, "scales"), (96, 1, "scales"), (100, 3, "scales"), (512, 2, "scales")]
)
def test_int4_groups_that_do_not_fit(in_, groups, name):
    weight = torch.zeros(4, in_, dtype=torch.uint8)
    with pytest.raises(ValueError, match=name):
        ops.pack_int4_weight(weight, torch.ones(4, groups), torch.ones(4, groups))


def test_arguments_that_do_not_fit():
    packed = ops.pack_linear_weight(torch.randn(8, 6))
    with pytest.raises(ValueError, match="x must be"):
        ops.packed_linear(torch.randn(2, 5), packed)
    with pytest.raises(ValueError, match="bias must be"):
        ops.packed_linear(torch.randn(2, 6), packed, torch.randn(7))


@pytest.mark.parametrize("format_", FORMATS, ids=case_name)
def test_without_the_cpp_ops_results_are_nearly_the_same(format_):
    if not native.is_enabled():
        pytest.skip("the C++ ops are not built")
    torch.manual_seed(0)
    with_ops = format_((64, 128))
    with using_isa(native.OFF):
        torch.manual_seed(0)
        without_ops = format_((64, 128))
    x = torch.randn(5, 128)
    out, expected = ops.packed_linear(x, without_ops.packed), ops.packed_linear(x, with_ops.packed)
    assert F.cosine_similarity(out, expected).min() > 0.9999
