"""Where APT keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$APT_CACHE, else apt in $XDG_CACHE_HOME, else ~/.cache/apt."""
    if own := os.environ.get("APT_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "apt"
