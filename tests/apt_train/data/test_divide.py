"""A micro-batch in parts."""

from __future__ import annotations

import pytest
import torch

from apt_train.data.batch import UNSCORED, MicroBatch
from apt_train.data.divide import divided


def micro_batch(*lengths: int, unused: int = 2) -> MicroBatch:
    total = sum(lengths)
    labels = torch.arange(total) + 1
    labels[::5] = UNSCORED
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist(), *[total] * unused], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return MicroBatch(torch.arange(total), labels, positions, bounds, max(lengths), int((labels != UNSCORED).sum()))


def documents(batches: list[MicroBatch]) -> list[list[int]]:
    return [
        batch.input_ids[a:b].tolist()
        for batch in batches
        for a, b in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)
        if a < b
    ]


@pytest.mark.parametrize("num_parts", [1, 2, 3, 8])
@pytest.mark.parametrize("lengths", [(4, 3, 2, 4, 3), (10, 1, 1, 4), (16,)])
def test_every_token_is_in_one_part_with_its_label_and_place(lengths, num_parts):
    whole = micro_batch(*lengths)
    parts = divided([whole], num_parts)
    for name in ("input_ids", "labels", "positions"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert sum(part.num_scored for part in parts) == whole.num_scored
    for part in parts:
        assert int(part.cu_seqlens[-1]) == len(part.input_ids)
        assert part.max_seqlen == int(part.cu_seqlens.diff().max())
        assert len(part.input_ids) < 2 * sum(lengths) / num_parts or num_parts == 1


def test_documents_that_fit_into_a_part_are_not_cut():
    whole = micro_batch(4, 3, 2, 4, 3)
    parts = divided([whole, whole], 3)
    assert len(parts) == 6
    assert documents(parts) == 2 * documents([whole])


def test_a_document_longer_than_a_part_is_cut():
    assert documents(divided([micro_batch(2, 14)], 4)) == [
        [0, 1],
        [2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
        [12, 13, 14, 15],
    ]
