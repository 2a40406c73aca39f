"""Asks a server that was just started, and stops it while it answers: run inside the image by deploy/image.sh.

python3 - URL PID_FILE API_KEY < deploy/image_check.py
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from http.client import HTTPResponse
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

START_TIMEOUT_S = 180


def main() -> None:
    """Print an answer; then stream one, send SIGTERM after its first token, and require its end."""
    url, pid_file, key = sys.argv[1:]
    headers = {"Content-Type": "application/json"}

    def ask(**fields: object) -> HTTPResponse:
        body = {"prompt": "The capital of France is", "temperature": 0, **fields}
        response: HTTPResponse = urlopen(
            Request(f"{url}/v1/completions", json.dumps(body).encode(), headers), timeout=60
        )
        return response

    wait_healthy(url)
    try:
        ask(max_tokens=1)
    except HTTPError as refusal:
        if refusal.code != 401:
            raise
    else:
        sys.exit("it answers requests without a key")
    headers["Authorization"] = f"Bearer {key}"
    print("Answer:", json.load(ask(max_tokens=8))["choices"][0]["text"])
    with ask(max_tokens=200, ignore_eos=True, stream=True) as stream:
        stream.readline()
        os.kill(int(Path(pid_file).read_text(encoding="ascii")), signal.SIGTERM)
        *_, last = (line for line in stream if line.strip())
    if last.strip() != b"data: [DONE]":
        sys.exit(f"SIGTERM cut a running stream, which ended with {last!r}")
    print("SIGTERM: the running stream ended as it should")


def wait_healthy(url: str) -> None:
    """As the image's HEALTHCHECK does."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            urlopen(f"{url}/health", timeout=4).close()
            return
        except (URLError, OSError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


if __name__ == "__main__":
    main()
