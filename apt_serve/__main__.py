"""``python -m apt_serve`` is apt-serve."""

from __future__ import annotations

import sys

from apt_serve.cli import main

sys.exit(main())
