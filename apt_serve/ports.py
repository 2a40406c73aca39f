"""Whether the server can listen where it is to."""

from __future__ import annotations

import socket

from apt_core.errors import ConfigError
from apt_serve.config_file import HttpOptions


def require_free_port(http: HttpOptions) -> None:
    """Refuse at once, before a model is loaded for nothing.

    Raises:
        ConfigError: somebody else listens there, or the address is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in http.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((http.host, http.port))
        except OSError as error:
            raise ConfigError(f"cannot listen on {http.host}:{http.port}: {error.strerror}", field="port") from None
