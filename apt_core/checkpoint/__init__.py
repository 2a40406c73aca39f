"""Checkpoints on disk: opening them, and filling models with their weights."""

from apt_core.checkpoint.checkpoint import Checkpoint
from apt_core.checkpoint.loading import load_into
from apt_core.checkpoint.opening import open_checkpoint
from apt_core.checkpoint.packed_cache import PackedCache
from apt_core.checkpoint.sources import EMBEDDED_MODEL

__all__ = ["EMBEDDED_MODEL", "Checkpoint", "PackedCache", "load_into", "open_checkpoint"]
