"""Checkpoints on disk: opening them, and filling models with their weights."""

from apt_core.checkpoint.checkpoint import Checkpoint
from apt_core.checkpoint.export import exported
from apt_core.checkpoint.loading import load_into
from apt_core.checkpoint.opening import open_checkpoint
from apt_core.checkpoint.packed_cache import PackedCache
from apt_core.checkpoint.sources import EMBEDDED_MODEL, locate

__all__ = ["EMBEDDED_MODEL", "Checkpoint", "PackedCache", "exported", "load_into", "locate", "open_checkpoint"]
