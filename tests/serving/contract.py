"""The tests of the API's contract, run against a live server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONTRACT = (
    "test_openai_client.py",
    "test_bad_requests.py",
    "test_completions.py",
    "test_chat.py",
    "test_simple.py",
    "test_websocket.py",
)
"""Files of tests/apt_serve/api that hold for any server."""


def check_contract(base_url: str, file: str) -> None:
    """Run one file in a process of its own, which knows no more of the server than its address."""
    path = ROOT / "tests" / "apt_serve" / "api" / file
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(path)]
    environment = os.environ | {"APT_TEST_BASE_URL": base_url}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-6000:]
