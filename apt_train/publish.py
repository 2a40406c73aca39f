"""Handing weights over to a server that runs: a manifest beside them, a request to load them, and how it ended."""

from __future__ import annotations

import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from apt_core.checkpoint import Checkpoint, load_into, open_checkpoint
from apt_core.errors import AptError, ConfigError
from apt_core.manifest import MANIFEST, Manifest, Probe, make_manifest, read_manifest, write_manifest
from apt_core.probe import MAX_PROBE_TOKENS, PROBE_TEXT, make_probe
from apt_core.registry import build_model
from apt_train.errors.recovery import RecoverySettings, with_backoff

log = logging.getLogger(__name__)

TOKEN_VARIABLE = "APT_ADMIN_TOKEN"
POLL_S = 0.5
REQUEST_TIMEOUT_S = 60.0
_PASSING_STATUSES = (502, 503, 504)


class PublishError(AptError):
    """A server does not serve the weights; the message says why, and what it serves instead."""


@dataclass(frozen=True)
class PublishSettings:
    """What `apt-train publish` is asked for. The server's admin token comes from the environment, APT_ADMIN_TOKEN."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    folder: str
    """Exported or quantized checkpoint in Hugging Face layout, on a disk that the server shares."""
    step: int | None = None
    """Of the training run, the first part of the weights' version; null keeps that of a manifest that is there."""
    server: str | None = None
    """Base URL, such as http://127.0.0.1:8000; null only writes the manifest."""
    path_on_server: str | None = None
    """The folder as the server sees it, where that is another path."""
    swap: Literal["overlap", "drain", "abort"] | None = None
    """Requests that run on the old weights finish beside new ones (overlap), finish while new ones wait (drain), or end
    with an error (abort); null leaves it to the server."""
    swap_timeout_s: float | None = None
    """Those that have not finished so long after the change end with an error; null leaves it to the server."""
    timeout_s: float = 1800.0
    """After this long without an outcome publishing has failed; the server goes on."""
    probe: bool = True
    """Compute some log-probabilities with these weights in float32, which the server compares with its own."""
    recovery: RecoverySettings = field(default_factory=RecoverySettings)

    def __post_init__(self) -> None:
        for name in ("timeout_s", "swap_timeout_s"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ConfigError(f"must be above 0, got {value}", field=name)
        if self.step is not None and self.step < 0:
            raise ConfigError(f"must be at least 0, got {self.step}", field="step")
        if self.server is not None and not self.server.startswith(("http://", "https://")):
            raise ConfigError(f"expected an http:// or https:// URL, got {self.server}", field="server")


def publish(settings: PublishSettings, report: Callable[[str], None]) -> str:
    """Write the manifest and, where a server is named, wait until all its replicas serve the weights.

    Args:
        report: told of each step in a line.

    Returns:
        The weights' version.

    Raises:
        ConfigError: a setting cannot work.
        CheckpointError: the folder is damaged.
        PublishError: the server refuses the weights, or cannot be reached.
    """
    folder = Path(settings.folder).expanduser().resolve()
    token = admin_token() if settings.server is not None else ""
    manifest = _write(folder, settings)
    report(f"{folder} holds version {manifest.version}")
    if settings.server is not None:
        _Publication(settings, folder, manifest, _Admin(settings.server, token, settings.recovery), report).run()
    return manifest.version


def admin_token() -> str:
    """The server's, from the environment.

    Raises:
        ConfigError: there is none.
    """
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        raise ConfigError("must hold the server's admin token", field=TOKEN_VARIABLE)
    return token


def folder_probe(checkpoint: Checkpoint) -> Probe | None:
    """What a checkpoint's weights make of the probe's text, in float32 on a processor.

    None if that text has not even two tokens.
    """
    model = build_model(checkpoint.config)
    load_into(model, checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    most = min(MAX_PROBE_TOKENS, checkpoint.config.max_position_embeddings)
    token_ids = checkpoint.tokenizer.encode(PROBE_TEXT)[:most]
    return make_probe(model.eval(), token_ids) if len(token_ids) > 1 else None


def _write(folder: Path, settings: PublishSettings) -> Manifest:
    step = settings.step
    if step is None:
        if not (folder / MANIFEST).is_file():
            raise ConfigError(f"{folder} has no manifest yet, so a step is needed", field="step")
        step = read_manifest(folder).step
    checkpoint = open_checkpoint(str(folder))
    manifest = make_manifest(folder, step, folder_probe(checkpoint) if settings.probe else None)
    write_manifest(folder, manifest)
    return manifest


class _Admin:
    """A server's /admin/weights."""

    def __init__(self, server: str, token: str, recovery: RecoverySettings) -> None:
        self._url = f"{server.rstrip('/')}/admin/weights"
        self._token = token
        self._recovery = recovery

    def call(self, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """GET or, with a body, POST; tries again while the server is away or busy.

        Raises:
            PublishError: it refuses, or stays away.
        """
        try:
            return with_backoff(lambda: self._call(body), self._recovery, self._url)
        except OSError as error:
            raise PublishError(f"{self._url} cannot be reached: {error}") from error

    def _call(self, body: dict[str, Any] | None) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as response:
                answer: dict[str, Any] = json.load(response)
                return answer
        except urllib.error.HTTPError as error:
            with error:
                code, message = _error_of(error.read())
            if error.code in _PASSING_STATUSES or code == "swap_running":
                raise ConnectionError(f"{error.code} {message}") from None
            raise PublishError(f"{self._url} answers {error.code}: {message}") from None
        except urllib.error.URLError as error:
            raise error.reason if isinstance(error.reason, OSError) else PublishError(str(error)) from None
        except ValueError as error:
            raise PublishError(f"{self._url} answers what is no JSON: {error}") from None


class _Publication:
    """One version on its way to all replicas of a server."""

    def __init__(
        self, settings: PublishSettings, folder: Path, manifest: Manifest, admin: _Admin, report: Callable[[str], None]
    ) -> None:
        self._settings, self._admin, self._report = settings, admin, report
        self._path = settings.path_on_server or str(folder)
        self._paths = {self._path}
        """With what the server makes of it, where it follows links."""
        self._version = manifest.version
        self._said: str | None = None

    def run(self) -> None:
        """Ask, and wait for the end.

        Raises:
            PublishError: a replica refuses the weights, or there is no outcome in time.
        """
        body = {"path": self._path, "swap": self._settings.swap, "timeout_s": self._settings.swap_timeout_s}
        deadline = time.monotonic() + self._settings.timeout_s
        replicas = self._admin.call(body)["replicas"]
        self._paths |= {replica["swap"]["path"] for replica in replicas if replica["swap"]}
        while not all([self._serves(replica) for replica in replicas]):  # of each, as any may have failed
            self._say(replicas)
            if time.monotonic() > deadline:
                raise PublishError(f"no outcome after {self._settings.timeout_s:g} s: {_summary(replicas)}")
            time.sleep(POLL_S)
            replicas = self._admin.call()["replicas"]
        self._say(replicas)

    def _serves(self, replica: dict[str, Any]) -> bool:
        """Whether a replica has done with the swap; PublishError if it has failed."""
        swap = replica["swap"]
        if swap is not None and swap["path"] in self._paths and swap["phase"] == "failed":
            serves = replica["weight_version"]
            raise PublishError(f"version {self._version} was refused, {serves} goes on serving: {swap['error']}")
        is_over = swap is None or swap["phase"] in ("done", "failed")
        return bool(replica["weight_version"] == self._version and is_over)

    def _say(self, replicas: list[dict[str, Any]]) -> None:
        summary = _summary(replicas)
        if summary != self._said:
            self._report(summary)
        self._said = summary


def _summary(replicas: list[dict[str, Any]]) -> str:
    return ", ".join(f"{_phase(replica['swap'])} (serves {replica['weight_version']})" for replica in replicas)


def _phase(swap: dict[str, Any] | None) -> str:
    if swap is None:
        return "idle"
    ended = f", {swap['ended_generations']} generations ended" if swap["ended_generations"] else ""
    return f"{swap['phase']} after {swap['seconds']:.1f} s{ended}" if swap["phase"] == "done" else str(swap["phase"])


def _error_of(body: bytes) -> tuple[str | None, str]:
    """Code and message of an error in OpenAI's shape; of anything else its text."""
    try:
        error = json.loads(body)["error"]
        return error["code"], error["message"]
    except (ValueError, LookupError, TypeError):
        return None, body[:200].decode(errors="replace")
