"""Loaders of bytes, and what their micro-batches hold."""

import itertools

import torch

from apt_train.data import UNSCORED, DataLoader

END = 256


def loader(config, tokenizer, **more):
    return DataLoader(config, tokenizer, **({"vocab_size": 257, "end_id": END} | more))


def sequences(batch):
    """Inputs and labels of each sequence; padding is left out."""
    bounds = batch.cu_seqlens.tolist()
    for begin, end in itertools.pairwise(bounds):
        if end > begin and (batch.labels[begin:end] != UNSCORED).any():
            yield batch.input_ids[begin:end].tolist(), batch.labels[begin:end].tolist()


def predictions(batches):
    return [
        pair for batch in batches for inputs, labels in sequences(batch) for pair in zip(inputs, labels, strict=True)
    ]


def same(a, b):
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("input_ids", "labels", "positions", "cu_seqlens"))
