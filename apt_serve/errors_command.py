"""`apt-serve errors`: what went wrong in servers and workers, from the folder that the settings name."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Final

from apt_core.error_log.report import to_html, to_markdown
from apt_core.errors import ConfigError
from apt_serve.config import ServerConfig
from apt_serve.telemetry.error_log import server_errors

DAY_S: Final = 86_400.0


def run(options: argparse.Namespace, config: ServerConfig) -> int:
    """Print a report as Markdown, and write it as a page where that is asked for.

    Raises:
        ConfigError: the number of days cannot be, or the page cannot be written.
    """
    if not options.days > 0:
        raise ConfigError("must be above 0", field="--days")
    patterns = server_errors(config.records.path).analyze_error_patterns(time.time() - options.days * DAY_S)
    print(to_markdown(patterns), end="")
    if options.html is not None:
        try:
            Path(options.html).write_text(to_html(patterns), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"the page cannot be written: {error}", field="--html") from None
    return 0
