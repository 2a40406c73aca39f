"""What every test shares."""

from __future__ import annotations

import os

# Before torch or Ray is imported by any test: the machine's cores are shared fairly and nothing reports usage.
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")
# The only model tests load comes from a package: a look-up at a hub would be a bug.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Triton kernels run as Python; `make test-gpu` sets 0, which compiles them. Triton reads this when it is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")
