"""Tiny checkpoints of one shape with different weights, published."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from apt_core.checkpoint import open_checkpoint
from apt_core.manifest import Manifest, make_manifest, write_manifest
from apt_train.publish import folder_probe
from tests.apt_core.checkpoint.tiny import save_folder

MAX_MODEL_LEN = 4096
"""Long enough for a stream to run as long as a test needs it."""


def base_folder(folder: Path, **config: object) -> Path:
    """A checkpoint without a manifest."""
    save_folder(folder, max_position_embeddings=MAX_MODEL_LEN, **config)
    reweigh(folder, seed=0)
    return folder


def reweigh(folder: Path, seed: int) -> None:
    """Other weights, wide enough that greedy output varies with them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    new = {name: torch.randn(x.shape, generator=generator).mul_(0.4).to(x.dtype) for name, x in tensors.items()}
    save_file(new, folder / "model.safetensors", metadata={"format": "pt"})


def publish_copy(base: Path, folder: Path, step: int, *, has_probe: bool = True) -> Manifest:
    """A copy with weights that depend on the step, and its manifest."""
    shutil.copytree(base, folder)
    reweigh(folder, seed=step)
    return publish_as_is(folder, step, has_probe=has_probe)


def publish_as_is(folder: Path, step: int, *, has_probe: bool = True) -> Manifest:
    probe = folder_probe(open_checkpoint(str(folder))) if has_probe else None
    manifest = make_manifest(folder, step, probe)
    write_manifest(folder, manifest)
    return manifest
