"""Triton's store_kv equals the reference bit for bit, in every cache, and writes nowhere else."""

from __future__ import annotations

import pytest
import torch

from apt_kernels import reference
from apt_kernels.triton.store_kv import candidates, default_config, store_kv

FP8 = torch.float8_e4m3fn
BFLOAT16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu, id="bfloat16")
DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.float16, id="float16"), BFLOAT16]
FLOAT8 = pytest.param(FP8, marks=pytest.mark.gpu, id="float8")  # the interpreter does not round to it
CACHE_DTYPES = [pytest.param(None, id="same"), pytest.param(torch.int8, id="int8"), FLOAT8]
POISON = 77.0


class Step:
    """Keys and values of some tokens, cut out of wider rows, and two equal caches that hold a number nobody stores."""

    def __init__(
        self,
        device: torch.device,
        *,
        num_tokens: int = 19,
        num_kv_heads: int = 3,
        head_dim: int = 24,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        torch.manual_seed(0)
        width = num_kv_heads * head_dim
        rows = torch.randn(num_tokens, 8 + 2 * width).to(dtype).to(device)
        self.key, self.value = (x.unflatten(1, (num_kv_heads, head_dim)) for x in rows[:, 8:].split(width, 1))
        num_blocks = num_tokens // block_size + 2
        self.slots = torch.randperm(num_blocks * block_size)[:num_tokens].to(device)
        self.slots[num_tokens // 2] = -1
        shape = (num_blocks, num_kv_heads, block_size, 2 * head_dim)
        caches = [torch.full(shape, POISON).to(cache_dtype or dtype).to(device).transpose(1, 2) for _ in range(2)]
        self.ours, self.theirs = (cache.split(head_dim, -1) for cache in caches)  # as vLLM lays them out
        is_int8 = cache_dtype == torch.int8
        self.our_scales, self.their_scales = (
            [torch.full(shape[:3], POISON, device=device).transpose(1, 2) if is_int8 else None for _ in range(2)]
            for _ in range(2)
        )

    def compare(self) -> None:
        store_kv(self.key, self.value, *self.ours, self.slots, *self.our_scales)
        reference.store_kv(self.key, self.value, *self.theirs, self.slots, *self.their_scales)
        for mine, wanted in zip((*self.ours, *self.our_scales), (*self.theirs, *self.their_scales), strict=True):
            if mine is not None and wanted is not None:
                torch.testing.assert_close(mine.float(), wanted.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_every_cache_holds_what_the_references_does(
    dtype: torch.dtype, cache_dtype: torch.dtype | None, device: torch.device
) -> None:
    step = Step(device, dtype=dtype, cache_dtype=cache_dtype)
    step.compare()
    assert bool((step.ours[0].float() == POISON).any())  # slots of nobody


@pytest.mark.parametrize(("num_kv_heads", "head_dim", "block_size"), [(1, 1, 1), (5, 64, 32), (9, 128, 16)])
def test_other_shapes(num_kv_heads: int, head_dim: int, block_size: int, device: torch.device) -> None:
    Step(device, num_tokens=3, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size).compare()


def test_heads_of_zeros(device: torch.device) -> None:
    step = Step(device, cache_dtype=torch.int8)
    step.key[0, 0] = 0.0
    step.value[1, 0] = 0.0
    step.compare()


def test_no_tokens(device: torch.device) -> None:
    step = Step(device)
    store_kv(step.key[:0], step.value[:0], *step.ours, step.slots[:0])
    assert bool((step.ours[0] == POISON).all())


def test_the_default_is_worth_measuring() -> None:
    assert default_config() in candidates()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("key", lambda s: setattr(s, "key", s.key[:, :, ::2])),
        ("value", lambda s: setattr(s, "value", s.value.double())),
        ("slot_mapping", lambda s: setattr(s, "slots", s.slots.int())),
        ("key_scales", lambda s: setattr(s, "our_scales", [torch.ones(3, 16, 3), torch.ones(3, 16, 3)])),
        ("value_cache", lambda s: setattr(s, "ours", (s.ours[0], s.ours[1].contiguous()))),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_arguments_that_do_not_fit_are_named(name: str, change: object, device: torch.device) -> None:
    step = Step(device)
    change(step)  # type: ignore[operator]
    with pytest.raises(ValueError, match=name):
        store_kv(step.key, step.value, *step.ours, step.slots, *step.our_scales)
