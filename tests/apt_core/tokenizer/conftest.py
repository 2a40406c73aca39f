"""The embedded model's tokenizer."""

from __future__ import annotations

import pytest

from apt_core.checkpoint import EMBEDDED_MODEL, open_checkpoint
from apt_core.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def smollm2() -> Tokenizer:
    """A byte-level BPE of 49152 tokens, 17 of them special, with a chat template."""
    return open_checkpoint(EMBEDDED_MODEL).tokenizer
