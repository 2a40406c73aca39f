"""Triton's rope_and_store_kv equals the reference bit for bit but for a norm's sum, in every cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from apt_kernels import reference
from apt_kernels.triton import rope_store as module
from apt_kernels.triton.launch import compilations
from apt_kernels.triton.tuning import Config

FP8 = torch.float8_e4m3fn
BFLOAT16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu, id="bfloat16")
DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.float16, id="float16"), BFLOAT16]
FLOAT8 = pytest.param(FP8, marks=pytest.mark.gpu, id="float8")  # the interpreter does not round to it
CACHE_DTYPES = [pytest.param(None, id="same"), pytest.param(torch.int8, id="int8"), FLOAT8]
EPSILON = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2**-6}
"""How far an element may be off, relative to it and absolutely, where the order of a norm's sum matters."""


class Step:
    """Projections of some tokens, and two equal caches that hold a number nobody stores."""

    def __init__(
        self,
        num_tokens: int,
        device: torch.device,
        *,
        num_heads: int = 6,
        num_kv_heads: int = 2,
        head_dim: int = 16,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        cache_dtype: torch.dtype | None = None,
        has_norm: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.num_heads = num_heads
        width = (num_heads + 2 * num_kv_heads) * head_dim
        self.qkv = torch.randn(num_tokens, width).to(dtype).to(device)
        angles = torch.randn(num_tokens, head_dim // 2)
        self.cos, self.sin = angles.cos().to(dtype).to(device), angles.sin().to(dtype).to(device)
        self.weights = [torch.randn(head_dim).to(dtype).to(device) if has_norm else None for _ in range(2)]
        num_blocks = num_tokens // block_size + 2
        self.slots = torch.randperm(num_blocks * block_size)[:num_tokens].to(device)
        shape = (num_blocks, num_kv_heads, block_size, head_dim)
        self.ours, self.theirs = (
            [torch.full(shape, 77.0).to(cache_dtype or dtype).to(device).transpose(1, 2) for _ in range(2)]
            for _ in range(2)
        )
        is_int8 = cache_dtype == torch.int8
        self.our_scales, self.their_scales = (
            [torch.full(shape[:3], 77.0, device=device).transpose(1, 2) if is_int8 else None for _ in range(2)]
            for _ in range(2)
        )

    def run(self, **changed: object) -> torch.Tensor:
        """The kernel's queries, with some arguments changed."""
        arguments = {
            "qkv": self.qkv,
            "cos": self.cos,
            "sin": self.sin,
            "key_cache": self.ours[0],
            "value_cache": self.ours[1],
            "slot_mapping": self.slots,
            "num_heads": self.num_heads,
            "query_weight": self.weights[0],
            "key_weight": self.weights[1],
            "eps": 1e-6,
            "key_scales": self.our_scales[0],
            "value_scales": self.our_scales[1],
        }
        return module.rope_and_store_kv(**(arguments | changed))

    def expected(self) -> torch.Tensor:
        """The reference's queries."""
        layout = (self.cos, self.sin, *self.theirs, self.slots, self.num_heads)
        return reference.rope_and_store_kv(self.qkv, *layout, *self.weights, 1e-6, *self.their_scales)

    def assert_equal_caches(self) -> None:
        """Bit for bit, all that nobody stored included."""
        for ours, theirs in zip(self.ours, self.theirs, strict=True):
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
        for ours, theirs in zip(self.our_scales, self.their_scales, strict=True):
            assert ours is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize(("num_tokens", "head_dim"), [(1, 64), (7, 16), (9, 80), (5, 6)])
def test_queries_and_caches_equal_the_reference_bit_for_bit(device, dtype, cache_dtype, num_tokens, head_dim):
    step = Step(num_tokens, device, dtype=dtype, cache_dtype=cache_dtype, head_dim=head_dim)
    assert torch.equal(step.run(), step.expected())
    step.assert_equal_caches()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("head_dim", [16, 80])
def test_queries_and_keys_are_normed_as_by_the_reference(device, dtype, cache_dtype, head_dim):
    step = Step(7, device, dtype=dtype, cache_dtype=cache_dtype, head_dim=head_dim, has_norm=True)
    tolerance = {"rtol": EPSILON[dtype], "atol": EPSILON[dtype]}
    torch.testing.assert_close(step.run(), step.expected(), **tolerance)
    values = [(caches[1].view(torch.uint8), scales[1]) for caches, scales in zip(*step_pairs(step), strict=True)]
    assert torch.equal(values[0][0], values[1][0])
    keys = [
        reference.dequantize_kv(caches[0], scales[0], torch.float32)
        for caches, scales in zip(*step_pairs(step), strict=True)
    ]
    if cache_dtype is not None:  # one rounding further
        tolerance = {"rtol": 2**-3, "atol": 2**-5}
    torch.testing.assert_close(*(k.float() for k in keys), **tolerance)


def step_pairs(step: Step) -> tuple[list[list[torch.Tensor]], list[list[torch.Tensor | None]]]:
    return [step.ours, step.theirs], [step.our_scales, step.their_scales]


@pytest.mark.parametrize("heads", [(1, 1), (5, 5), (9, 3), (16, 1), (20, 17)], ids=str)
@pytest.mark.parametrize("tile", [1, 4, 16])
def test_every_number_of_heads_equals_the_reference_in_tiles_of_any_size(device, monkeypatch, heads, tile):
    monkeypatch.setattr(module, "tuned", lambda *_: Config({"HEADS": tile}, 1, 1))
    step = Step(3, device, num_heads=heads[0], num_kv_heads=heads[1])
    assert torch.equal(step.run(), step.expected())
    step.assert_equal_caches()


def test_tokens_without_a_slot_are_rotated_and_not_stored(device):
    step = Step(9, device, cache_dtype=torch.int8)
    step.slots[::2] = -1
    assert torch.equal(step.run(), step.expected())
    step.assert_equal_caches()


@pytest.mark.parametrize("block_size", [1, 5, 256])
def test_any_block_size_and_any_strides_will_do(device, block_size):
    step = Step(9, device, block_size=block_size, cache_dtype=torch.int8)
    step.ours = [cache.contiguous() for cache in step.ours]
    step.our_scales = [scales.contiguous() for scales in step.our_scales if scales is not None]
    wide = torch.cat([step.qkv, step.qkv], 1)
    assert torch.equal(step.run(qkv=wide[:, step.qkv.shape[1] :]), step.expected())
    step.assert_equal_caches()


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_halves_and_extremes_are_stored_as_by_the_reference(device, dtype):
    step = Step(4, device, dtype=dtype, cache_dtype=torch.int8)
    step.qkv[0] = 0
    step.qkv[1, -16:] = torch.arange(16) / 2 - 4  # 127 of these is 4: integers and a half
    step.qkv[2] *= 1e4
    step.qkv[3] *= 1e-4
    step.run(), step.expected()
    step.assert_equal_caches()


def test_a_float8_cache_holds_its_largest_number_for_larger_ones(device):
    step = Step(1, device, cache_dtype=FP8)
    step.qkv[:] = torch.tensor([0.0, 1.5, -0.25, 448.0, 1e6, -448.0, -1e6, -1e9], device=device).repeat(20)
    step.cos[:], step.sin[:] = 1, 0
    step.run(), step.expected()
    step.assert_equal_caches()
    block, place = step.slots // 16, step.slots % 16
    assert step.ours[1][block, place, 1].float().unique().tolist() == [-448.0, -0.25, 0.0, 1.5, 448.0]


@pytest.mark.gpu
def test_a_nan_stays_one_in_a_float8_cache(device):
    step = Step(1, device, cache_dtype=FP8)
    step.qkv[:, -16:] = float("nan")
    step.run()
    assert step.ours[1][step.slots // 16, step.slots % 16, 1].float().isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value")  # which integer it is matters to numpy alone
def test_a_nan_stays_one_in_an_int8_cache(device):
    step = Step(2, device, cache_dtype=torch.int8)
    step.qkv[1, -3] = float("nan")
    step.run()
    block, place = step.slots // 16, step.slots % 16
    assert step.our_scales[1][block[1], place[1]].isnan().tolist() == [False, True]
    assert not step.our_scales[1][block[0], place[0]].isnan().any()


def test_a_step_without_tokens_stores_nothing(device):
    step = Step(0, device)
    assert step.run().shape == (0, 6, 16)
    step.assert_equal_caches()


def test_slots_are_reached_beyond_2_to_the_31_elements(device):
    step = Step(2, device, dtype=torch.float16, head_dim=64)
    shape = (2**31 // (16 * 2 * 64) + 2, 2, 16, 64)
    if device.type == "cuda":
        caches = [torch.zeros(shape, dtype=torch.float16, device=device).transpose(1, 2) for _ in range(2)]
    else:  # pages of the system's that exist once they are written
        caches = [torch.from_numpy(np.zeros(shape, np.float16)).transpose(1, 2) for _ in range(2)]
    step.expected()
    block = shape[0] - 1
    step.run(key_cache=caches[0], value_cache=caches[1], slot_mapping=step.slots % 16 + block * 16)
    for cache, theirs in zip(caches, step.theirs, strict=True):
        for slot in step.slots.tolist():
            assert torch.equal(cache[block, slot % 16], theirs[slot // 16, slot % 16])


REFUSALS = {
    "projections of other heads": ("qkv", lambda s: {"qkv": s.qkv[:, :-16]}),
    "strided projections": ("qkv", lambda s: {"qkv": s.qkv.T.contiguous().T}),
    "float64": ("qkv", lambda s: {"qkv": s.qkv.double()}),
    "cosines of other tokens": ("cos", lambda s: {"cos": s.cos[1:]}),
    "sines in another dtype": ("sin", lambda s: {"sin": s.sin.half()}),
    "narrow slots": ("slot_mapping", lambda s: {"slot_mapping": s.slots.int()}),
    "slots of other tokens": ("slot_mapping", lambda s: {"slot_mapping": s.slots[1:]}),
    "keys in another dtype": ("key_cache", lambda s: {"key_cache": s.ours[0].half()}),
    "keys with strided heads": ("key_cache", lambda s: {"key_cache": s.ours[0].transpose(2, 3)}),
    "values in other strides": ("value_cache", lambda s: {"value_cache": s.ours[1].contiguous()}),
    "scales without int8": ("value_scales", lambda s: {"value_scales": torch.ones(s.ours[0].shape[:3])}),
    "one weight": ("key_weight", lambda s: {"query_weight": torch.ones(16)}),
    "short weights": ("query_weight", lambda s: {"query_weight": torch.ones(8), "key_weight": torch.ones(16)}),
    "no heads": ("num_heads", lambda s: {"num_heads": 0}),
    "tensors elsewhere": ("cos", lambda s: {"cos": s.cos.to("meta")}),
}


@pytest.mark.parametrize(("name", "change"), REFUSALS.values(), ids=REFUSALS.keys())
def test_what_the_kernel_does_not_take_is_refused_by_name_before_a_launch(monkeypatch, name, change):
    monkeypatch.setattr(module, "_rope_store", None)
    monkeypatch.setattr("apt_kernels.triton.launch.INTERPRETED", True)
    step = Step(3, torch.device("cpu"))
    with pytest.raises(ValueError, match=rf"^{name} "):
        step.run(**change(step))


@pytest.mark.gpu
def test_nothing_compiles_once_few_and_many_tokens_were_seen(device):
    for num_tokens in (1, 600):
        Step(num_tokens, device, dtype=torch.bfloat16).run()
    with compilations() as compiled:
        for num_tokens in (2, 16, 17, 512, 1024):
            Step(num_tokens, device, dtype=torch.bfloat16).run()
    assert not compiled
