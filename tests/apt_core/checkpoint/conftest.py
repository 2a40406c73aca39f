"""A cache of its own for every test that converts a GGUF."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of converted files, empty at first."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("APT_CACHE", str(folder))
    return folder / "gguf"
