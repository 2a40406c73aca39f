"""Settings of the logs and of traces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlsplit

from apt_core.errors import ConfigError


@dataclass(frozen=True)
class TelemetryConfig:
    """What is said of requests besides metrics; see docs/observability.md."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    access_log: bool = False
    """Write a line of JSON to stdout for each request."""
    error_log: bool = True
    """Keep faults of the server in the records' folder, for `apt-serve errors`."""
    traces_endpoint: str | None = None
    """Where traces go, by OTLP over HTTP, such as http://127.0.0.1:4318/v1/traces; None: nowhere."""
    traces_sample_ratio: float = 1.0
    """Share of requests that are traced, 0 to 1, where the caller's traceparent does not say."""

    def __post_init__(self) -> None:
        if not 0 <= self.traces_sample_ratio <= 1:
            raise ConfigError(
                f"must be within 0 and 1, got {self.traces_sample_ratio}", field="telemetry.traces_sample_ratio"
            )
        if self.traces_endpoint is not None:
            url = urlsplit(self.traces_endpoint)
            if url.scheme not in ("http", "https") or not url.netloc:
                raise ConfigError("must be an http or https URL", field="telemetry.traces_endpoint")
