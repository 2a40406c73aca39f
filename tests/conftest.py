"""What every test shares."""

from __future__ import annotations

import os

import pytest

# Before torch or Ray is imported by any test: the machine's cores are shared fairly and nothing reports usage.
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")
# The only model tests load comes from a package: a look-up at a hub would be a bug.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Triton kernels run as Python; `make test-gpu` sets 0, which compiles them. Triton reads this when it is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the marks in its own
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Share the tests among pytest-xdist's workers by file, so that fixtures of a module are made once.

    Tests that start Ray run one after another, as Ray finds other clusters of the machine, and begin first: they wait
    much, and what computes fills those waits on the other workers to the end.
    """
    if not config.pluginmanager.hasplugin("xdist"):
        return
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
    for item in items:
        group = "ray" if item.get_closest_marker("ray") else item.nodeid.split("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))
