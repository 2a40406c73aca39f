"""The C++ ops on every instruction set equal their PyTorch twins, and depend on nothing they should not."""

import logging
import os
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from apt_kernels import ops, reference
from apt_kernels.cpu import build, native
from tests.apt_kernels.isas import INSTRUCTION_SETS, using_isa

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2}
INT8_TOLERANCE = {torch.float32: 5e-4, torch.bfloat16: 2e-2}
"""Over an int8 cache queries and weights have 16 bits where integers are multiplied."""


@pytest.fixture(params=INSTRUCTION_SETS, autouse=True)
def isa(request):
    with using_isa(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """Every empty tensor starts as NaN, so that whatever an op fails to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Paged:
    """Sequences of the given (query, context) lengths over a cache whose unused slots (or scales) are NaN."""

    def __init__(self, lengths, *, heads=(6, 2), head_dim=32, block_size=16, dtype=torch.float32, is_int8=False):
        generator = torch.Generator().manual_seed(0)
        num_blocks = [-(-context // block_size) for _, context in lengths]
        shape = (sum(num_blocks) + 2, block_size, heads[1], head_dim)
        self.keys, self.values = torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype)
        self.query = torch.randn(sum(q for q, _ in lengths), heads[0], head_dim, generator=generator).to(dtype)
        self.lengths, self.scale = lengths, head_dim**-0.5
        self.tables = torch.full((len(lengths), max(num_blocks)), 2**31 - 1, dtype=torch.int32)
        free = torch.randperm(shape[0], generator=generator).to(torch.int32)
        for b, (_, context) in enumerate(lengths):
            table, free = free[: num_blocks[b]], free[num_blocks[b] :]
            self.tables[b, : num_blocks[b]] = table
            positions = torch.arange(context)
            slots = table.long()[positions // block_size] * block_size + positions % block_size
            for cache in (self.keys, self.values):
                cache.flatten(0, 1)[slots] = torch.randn(context, *shape[2:], generator=generator).to(dtype)
        self.key_scales = self.value_scales = None
        if is_int8:
            self.keys, self.key_scales = self._quantized(self.keys)
            self.values, self.value_scales = self._quantized(self.values)

    @staticmethod
    def _quantized(cache):
        """As the cache lies in memory in an engine, a head's tokens side by side."""
        scales = (cache.float().abs().amax(-1) / 127).transpose(1, 2).contiguous().transpose(1, 2)
        integers = (cache.float() / scales.unsqueeze(-1)).round().nan_to_num(77).to(torch.int8)
        return integers.transpose(1, 2).contiguous().transpose(1, 2), scales

    def arguments(self, lengths=None):
        queries, contexts = zip(*(lengths or self.lengths), strict=True)
        return {
            "cu_seqlens_q": torch.tensor([0, *queries]).cumsum(0).to(torch.int32),
            "context_lens": torch.tensor(contexts, dtype=torch.int32),
        }

    def run(self, window=None):
        return self._call(self.query, self.lengths, self.tables, window)

    def run_part(self, b, start, end, window=None):
        """The result for queries start .. end - 1 of sequence b, in a step of their own."""
        first = sum(q for q, _ in self.lengths[:b])
        queries, context = self.lengths[b]
        lengths = [(end - start, context - queries + end)]
        return self._call(self.query[first + start : first + end], lengths, self.tables[b : b + 1], window)

    def _call(self, query, lengths, tables, window):
        return ops.paged_attention(
            query,
            self.keys,
            self.values,
            **self.arguments(lengths),
            block_tables=tables,
            num_decodes=0,
            scale=self.scale,
            window=window,
            key_scales=self.key_scales,
            value_scales=self.value_scales,
        )

    def expected(self, window=None):
        wide = (x if x.dtype == torch.int8 else x.float() for x in (self.query, self.keys, self.values))
        layout = (*self.arguments().values(), self.tables)
        return reference.paged_attention(*wide, *layout, self.scale, window, self.key_scales, self.value_scales)

    def check(self, window=None):
        out = self.run(window)
        assert out.dtype == self.query.dtype
        tolerance = INT8_TOLERANCE if self.keys.dtype == torch.int8 else TOLERANCE
        torch.testing.assert_close(out.float(), self.expected(window), rtol=0, atol=tolerance[out.dtype])


MIXED = [(1, 1), (1, 64), (1, 257), (1, 700), (3, 66), (70, 70), (50, 401), (1, 129)]


@pytest.mark.parametrize("is_int8", [False, True], ids=["", "int8 cache"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 5, 64, 300])
def test_attention_equals_the_reference_for_mixed_steps_and_windows(dtype, is_int8, window):
    Paged(MIXED, dtype=dtype, is_int8=is_int8).check(window)


@pytest.mark.parametrize("is_int8", [False, True], ids=["", "int8 cache"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (9, 3), (8, 1), (5, 5), (28, 4)])
@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 128, 256])
def test_attention_equals_the_reference_for_every_head_layout(dtype, is_int8, heads, head_dim):
    Paged([(1, 77), (1, 300), (13, 90)], heads=heads, head_dim=head_dim, dtype=dtype, is_int8=is_int8).check()


@pytest.mark.parametrize("is_int8", [False, True], ids=["", "int8 cache"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [1, 3, 16, 100, 1024])
def test_attention_equals_the_reference_for_every_block_size(dtype, is_int8, block_size):
    Paged(MIXED, block_size=block_size, dtype=dtype, is_int8=is_int8).check()


@pytest.mark.parametrize("is_int8", [False, True], ids=["", "int8 cache"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 100])
def test_a_query_row_depends_neither_on_batch_mates_nor_on_chunks_nor_on_threads(dtype, is_int8, window):
    paged = Paged(MIXED, dtype=dtype, is_int8=is_int8)
    ops.set_num_threads(1)
    together = paged.run(window)
    assert together.isfinite().all()
    ops.set_num_threads(3)
    assert torch.equal(paged.run(window), together)
    first = 0
    for b, (queries, _) in enumerate(paged.lengths):
        rows = together[first : first + queries]
        first += queries
        for chunk in (1, 7, 64):
            cuts = [*range(0, queries, chunk), queries]
            parts = [paged.run_part(b, start, end, window) for start, end in pairwise(cuts)]
            assert torch.equal(torch.cat(parts), rows)


@pytest.mark.parametrize("is_int8", [False, True], ids=["", "int8 cache"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_long_context_does_not_depend_on_how_its_splits_are_shared_out(dtype, is_int8):
    paged = Paged([(1, 5000), (1, 3000), (1, 700)], dtype=dtype, is_int8=is_int8)
    ops.set_num_threads(1)
    together = paged.run()
    torch.testing.assert_close(together.float(), paged.expected(), rtol=0, atol=5e-3)
    for num_threads in (2, 5, 40):
        ops.set_num_threads(num_threads)
        assert torch.equal(paged.run(), together)
        for b in range(3):
            assert torch.equal(paged.run_part(b, 0, 1)[0], together[b])


@pytest.mark.parametrize("is_int8", [False, True], ids=["", "int8 cache"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_shows_in_its_own_sequence_only(dtype, is_int8):
    paged = Paged([(1, 90), (1, 90), (4, 90)], dtype=dtype, is_int8=is_int8)
    block, slot = int(paged.tables[1, 2]), 3
    (paged.values if not is_int8 else paged.value_scales)[block, slot] = torch.nan
    paged.query[3, 0] = torch.nan  # of the third sequence
    out = paged.run()
    assert out[1].isnan().all() and out[3, 0].isnan().all()
    out[1], out[3, 0] = 0, 0
    assert out.isfinite().all()


@pytest.mark.parametrize("is_int8", [False, True], ids=["", "int8 cache"])
def test_attention_follows_strides_of_query_and_caches(is_int8):
    paged = Paged([(1, 40), (5, 33)], is_int8=is_int8)
    expected = paged.run()
    paged.query = torch.stack((paged.query, paged.query + 1), dim=1)[:, 0]
    paged.keys, paged.values = torch.stack((paged.keys, paged.values), dim=2).unbind(2)
    if is_int8:
        paged.key_scales, paged.value_scales = torch.stack((paged.key_scales, paged.value_scales), dim=2).unbind(2)
    assert not paged.keys.is_contiguous()
    assert torch.equal(paged.run(), expected)


def test_attention_and_the_store_reach_slots_beyond_2_to_the_31_elements():
    if _available_gib() < 10:
        pytest.skip("needs an address space of 8 GiB")
    shape = (2**31 // (16 * 2 * 64) + 2, 16, 2, 64)  # 2 x 4 GiB, of which a few pages are touched
    keys, values = (_untouched(shape) for _ in range(2))
    block = shape[0] - 1
    qkv = torch.randn(16, 8 * 64).bfloat16()
    slots = torch.arange(16) + block * 16
    ones, zeros = torch.ones(16, 32).bfloat16(), torch.zeros(16, 32).bfloat16()
    query = ops.rope_and_store_kv(qkv, ones, zeros, keys, values, slots, num_heads=4)
    heads = qkv.view(16, 8, 64)
    assert torch.equal(keys[block], heads[:, 4:6]) and torch.equal(values[block], heads[:, 6:])
    layout = {
        "cu_seqlens_q": torch.tensor([0, 16], dtype=torch.int32),
        "context_lens": torch.tensor([16], dtype=torch.int32),
    }
    out = ops.paged_attention(
        query, keys, values, **layout, block_tables=torch.tensor([[block]], dtype=torch.int32), num_decodes=0, scale=0.1
    )
    first = torch.tensor([[0]], dtype=torch.int32)
    near = reference.paged_attention(query, keys[block:], values[block:], *layout.values(), first, 0.1, None)
    torch.testing.assert_close(out.float(), near.float(), rtol=0, atol=2e-2)


def test_an_int8_cache_is_reached_beyond_2_to_the_31_elements():
    if _available_gib() < 6:
        pytest.skip("needs an address space of 5 GiB")
    shape = (2**31 // (16 * 2 * 64) + 2, 16, 2, 64)
    keys, values = (_untouched(shape, torch.int8) for _ in range(2))
    scales = [_untouched(shape[:3], torch.float32) for _ in range(2)]
    block = shape[0] - 1
    qkv = torch.randn(16, 8 * 64).bfloat16()
    slots = torch.arange(16) + block * 16
    ones, zeros = torch.ones(16, 32).bfloat16(), torch.zeros(16, 32).bfloat16()
    query = ops.rope_and_store_kv(
        *(qkv, ones, zeros, keys, values, slots), num_heads=4, key_scales=scales[0], value_scales=scales[1]
    )
    out = ops.paged_attention(
        query,
        keys,
        values,
        cu_seqlens_q=torch.tensor([0, 16], dtype=torch.int32),
        context_lens=torch.tensor([16], dtype=torch.int32),
        block_tables=torch.tensor([[block]], dtype=torch.int32),
        num_decodes=0,
        scale=0.1,
        key_scales=scales[0],
        value_scales=scales[1],
    )
    heads = qkv.view(16, 8, 64)
    near = reference.varlen_attention(query, heads[:, 4:6], heads[:, 6:], torch.tensor([0, 16]), 0.1, None)
    torch.testing.assert_close(out.float(), near.float(), rtol=0, atol=4e-2)


def _untouched(shape, dtype=torch.bfloat16):
    """Memory whose pages do not exist yet: poisoning it would make them all."""
    torch.use_deterministic_algorithms(False)
    memory = torch.empty(shape, dtype=dtype)
    torch.use_deterministic_algorithms(True)
    return memory


def _available_gib():
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


@pytest.mark.parametrize("change", ["block", "context", "cu_seqlens"])
def test_a_layout_that_reaches_out_of_the_cache_is_refused(change):
    paged = Paged([(1, 40), (5, 33)])
    if change == "block":
        paged.tables[1, 1] = len(paged.keys)
    elif change == "context":
        paged.lengths = [(1, 40), (5, 3)]
    else:
        paged.query = paged.query[:-1]
    with pytest.raises(RuntimeError, match=change):
        paged.run()


ROWS = [(1, 1), (3, 33), (2, 576), (130, 100)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*ROWS, (4, 3, 64)], ids=str)
def test_norms_equal_the_reference(dtype, shape):
    x, residual, weight = (torch.randn(s).to(dtype) for s in (shape, shape, shape[-1:]))
    tolerance = {"rtol": 2**-7 if dtype == torch.bfloat16 else 1e-5, "atol": 1e-6}
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), **tolerance)
    normed, total = ops.fused_add_rms_norm(x, residual, weight, 1e-5)
    expected, expected_total = reference.fused_add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, expected_total)
    torch.testing.assert_close(normed, expected, **tolerance)
    assert torch.equal(
        ops.rms_norm(x.transpose(0, -1).contiguous().transpose(0, -1), weight, 1e-5), ops.rms_norm(x, weight, 1e-5)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_silu_and_mul_equals_the_reference(dtype, shape):
    gate_up = (8 * torch.randn(shape[0], 2 * shape[1])).to(dtype)
    gate_up[0, 0] = 200.0
    gate_up[-1, 0] = -200.0
    tolerance = {"rtol": 2**-7 if dtype == torch.bfloat16 else 1e-5, "atol": 1e-6}
    torch.testing.assert_close(ops.silu_and_mul(gate_up), reference.silu_and_mul(gate_up), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(("num_tokens", "head_dim"), [(1, 64), (5, 16), (70, 80), (33, 6)])
def test_rope_and_store_equals_the_reference(dtype, has_norm, num_tokens, head_dim):
    num_heads, num_kv_heads = 6, 2
    qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
    angle = torch.randn(num_tokens, head_dim // 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    weights = [torch.randn(head_dim).to(dtype) if has_norm else None for _ in range(2)]
    slots = torch.randperm(20 * 8)[:num_tokens]
    slots[num_tokens // 2] = -1
    ours, expected = (torch.zeros(2, 20, 8, num_kv_heads, head_dim, dtype=dtype) for _ in range(2))
    query = ops.rope_and_store_kv(
        qkv,
        cos,
        sin,
        *ours,
        slots,
        num_heads=num_heads,
        query_weight=weights[0],
        key_weight=weights[1],
        eps=1e-6,
    )
    expected_query = reference.rope_and_store_kv(qkv, cos, sin, *expected, slots, num_heads, *weights, 1e-6)
    tolerance = {"rtol": 2**-6, "atol": 2**-6} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(query, expected_query, **tolerance)
    torch.testing.assert_close(ours, expected, **tolerance)
    if not has_norm and dtype == torch.bfloat16:
        assert torch.equal(query, expected_query) and torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(("num_tokens", "head_dim"), [(1, 64), (5, 16), (70, 80), (33, 6)])
def test_rope_and_store_into_an_int8_cache_equals_the_reference(dtype, has_norm, num_tokens, head_dim):
    num_heads, num_kv_heads = 6, 2
    qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
    qkv[0, -head_dim:] = 0
    angle = torch.randn(num_tokens, head_dim // 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    weights = [torch.randn(head_dim).to(dtype) if has_norm else None for _ in range(2)]
    slots = torch.randperm(20 * 8)[:num_tokens]
    slots[num_tokens // 2] = -1
    shape = (20, num_kv_heads, 8, head_dim)
    caches = [[torch.zeros(shape, dtype=torch.int8).transpose(1, 2) for _ in range(2)] for _ in range(2)]
    scales = [[torch.zeros(shape[:3]).transpose(1, 2) for _ in range(2)] for _ in range(2)]
    query = ops.rope_and_store_kv(
        qkv,
        cos,
        sin,
        *caches[0],
        slots,
        num_heads=num_heads,
        key_scales=scales[0][0],
        value_scales=scales[0][1],
        query_weight=weights[0],
        key_weight=weights[1],
        eps=1e-6,
    )
    expected_query = reference.rope_and_store_kv(
        qkv, cos, sin, *caches[1], slots, num_heads, *weights, 1e-6, *scales[1]
    )
    tolerance = {"rtol": 2**-6, "atol": 2**-6} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(query, expected_query, **tolerance)
    assert torch.equal(caches[0][1], caches[1][1]) and torch.equal(scales[0][1], scales[1][1])
    torch.testing.assert_close(scales[0][0], scales[1][0], **tolerance)
    ours, expected = (cache[0] * scale[0].unsqueeze(-1) for cache, scale in zip(caches, scales, strict=True))
    torch.testing.assert_close(ours, expected, rtol=0, atol=float(scales[1][0].max()) * 1.01 + tolerance["atol"])
    if not has_norm and dtype == torch.bfloat16:
        assert torch.equal(caches[0][0], caches[1][0]) and torch.equal(scales[0][0], scales[1][0])


def test_a_slot_out_of_the_cache_is_refused():
    cache = torch.zeros(2, 4, 1, 16)
    with pytest.raises(RuntimeError, match="slot_mapping"):
        cos = torch.zeros(1, 8)
        ops.rope_and_store_kv(torch.zeros(1, 48), cos, cos, cache, cache.clone(), torch.tensor([8]), num_heads=1)


def test_where_gradients_are_wanted_other_ops_serve():
    x, weight = torch.randn(3, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    ops.fused_add_rms_norm(ops.rms_norm(x, weight, 1e-5), x, weight, 1e-5)[0].sum().backward()
    ops.silu_and_mul(x).sum().backward()
    assert x.grad is not None and weight.grad is not None


def test_the_declared_fakes_agree_with_the_ops():
    paged = Paged([(1, 9), (4, 20)])
    x, weight = torch.randn(5, 16), torch.randn(16)
    layout = (*paged.arguments().values(), paged.tables)
    cache = torch.zeros(2, 4, 2, 8)
    rope = (torch.randn(3, 64), torch.ones(3, 4), torch.zeros(3, 4), cache, cache.clone())
    attended = (paged.query, paged.keys.nan_to_num(), paged.values.nan_to_num())
    calls = {
        "rms_norm": (x, weight, 1e-5),
        "fused_add_rms_norm": (x, x, weight, 1e-5),
        "silu_and_mul": (x,),
        "rope_and_store_kv": (*rope, None, None, torch.arange(3), 4, 2, None, None, 0.0),
        "paged_attention": (*attended, None, None, *layout, 0.2, None),
    }
    for name, args in calls.items():
        op = getattr(torch.ops.apt_cpu, name).default
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_threads_that_call_at_the_same_time_take_turns():
    ops.set_num_threads(4)
    paged = Paged(MIXED, heads=(4, 4))
    expected = paged.run()

    def hammer(_):
        return all(torch.equal(paged.run(), expected) for _ in range(10))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(hammer, range(4)))


def _run_python(code, **environment):
    packages = [str(Path(ops.__file__).parents[2])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(packages)} | environment
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=120
    )


SAY_ISA = """
import logging, torch
from apt_kernels import ops
from apt_kernels.cpu import native
logging.basicConfig(level="INFO")
assert torch.equal(ops.silu_and_mul(torch.zeros(2, 4)), torch.zeros(2, 2))
native.log_state()
print(native.isa())
"""


def test_the_environment_holds_the_instruction_set_back(isa):
    done = _run_python(SAY_ISA, APT_CPU_ISA=isa)
    assert done.stdout.strip() == isa and f"C++ for {isa}" in done.stderr


@pytest.mark.parametrize("isa", ["avx2"], indirect=True)
class TestOnce:
    """What does not depend on the instruction set."""

    def test_off_means_torch(self):
        done = _run_python(SAY_ISA, APT_CPU_ISA="off")
        assert done.stdout.strip() == "off" and "torch (APT_CPU_ISA=off)" in done.stderr

    def test_an_unknown_instruction_set_is_refused(self):
        assert "must be one of avx512, avx2, portable, off" in _run_python(SAY_ISA, APT_CPU_ISA="sse9").stderr
        with pytest.raises(RuntimeError):
            torch.ops.apt_cpu.set_isa("sse9")

    def test_without_a_library_torch_serves_and_one_line_says_why(self, tmp_path):
        done = _run_python(SAY_ISA, APT_CACHE=str(tmp_path), APT_CPU_ISA="")
        assert done.returncode == 0 and done.stdout.strip() == "off"
        assert done.stderr.count("\n") == 1 and "python -m apt_kernels.cpu.build" in done.stderr

    def test_a_damaged_library_counts_as_none(self, tmp_path, monkeypatch):
        monkeypatch.setenv("APT_CACHE", str(tmp_path))
        build.library_path().parent.mkdir()
        build.library_path().write_bytes(b"not a library")
        done = _run_python(SAY_ISA, APT_CPU_ISA="")
        assert done.returncode == 0 and done.stdout.strip() == "off" and "does not load" in done.stderr

    def test_without_a_compiler_the_build_says_so_and_fails_nothing(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("APT_CACHE", str(tmp_path))
        monkeypatch.setenv("CXX", "no-such-compiler")
        build.main()
        assert "no C++ compiler (no-such-compiler)" in capsys.readouterr().err
        assert not build.library_path().exists()

    def test_the_log_line_is_no_warning_when_the_ops_serve(self, caplog):
        with caplog.at_level(logging.INFO):
            native.log_state()
        assert [record.levelname for record in caplog.records] == ["INFO"]

    def test_a_forked_process_has_threads_of_its_own(self):
        done = _run_python("""
            import os, torch
            from apt_kernels import ops
            ops.set_num_threads(2)
            x = torch.randn(400, 1000)
            expected = ops.silu_and_mul(x)
            child = os.fork()
            if child == 0:
                os._exit(0 if torch.equal(ops.silu_and_mul(x), expected) else 1)
            assert os.waitpid(child, 0)[1] == 0
        """)
        assert done.returncode == 0, done.stderr

    @pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler")
    def test_the_thread_pool_runs_every_task_once_whoever_calls(self, tmp_path):
        program = tmp_path / "stress"
        sources = [Path(__file__).with_name("thread_pool_stress.cpp"), build.SOURCES / "thread_pool.cpp"]
        flags = ["-std=c++17", "-O1", "-pthread", f"-I{build.SOURCES}"]
        subprocess.run(["g++", *flags, *map(str, sources), "-o", str(program)], check=True)
        assert subprocess.run([program], timeout=100).returncode == 0
