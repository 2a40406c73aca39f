"""What every test shares."""

from __future__ import annotations

import os
from typing import Any

import pytest

# Before torch or Ray is imported by any test: the machine's cores are shared fairly and nothing reports usage.
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")
# The only model tests load comes from a package: a look-up at a hub would be a bug.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Triton kernels run as Python; `make test-gpu` sets 0, which compiles them. Triton reads this when it is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

RAY = ("tests/apt_serve/test_deployment.py", "tests/serving/", "tests/vllm/")
"""Where tests start Ray. They run one after another, as Ray finds other clusters of the machine."""

UNTRACED = (
    "tests/apt_kernels/triton/",
    "tests/benchmarks/test_tune.py",
    "tests/apt_serve/api/test_openapi.py",
    "tests/apt_serve/api/test_schema_with_access.py",
    "tests/apt_serve/engine/test_engine_property.py",
    "tests/apt_serve/engine/test_scheduler_simulated.py",
    "tests/apt_serve/models/test_model_cache_property.py",
    "tests/apt_serve/test_schema_on_real_engine.py",
)
"""Where coverage would double the time, to see interpreted kernels, which it leaves out, or what other tests run, too:
each of these tries hundreds of random cases."""


@pytest.fixture(scope="session", autouse=True)
def _records_in_a_folder_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Servers that are told no other folder for their records keep none in the user's."""
    os.environ["APT_RECORDS"] = str(tmp_path_factory.mktemp("records"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Among pytest-xdist's workers, begin with Ray: it waits much, and the rest fills those waits to the end."""
    for item in items:
        if item.get_closest_marker("ray") and not item.nodeid.startswith(RAY):
            raise pytest.UsageError(f"{item.nodeid} starts Ray and is not in RAY of tests/conftest.py")
        if item.nodeid.startswith(UNTRACED) and config.pluginmanager.hasplugin("_cov"):
            item.add_marker(pytest.mark.no_cover)
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not item.nodeid.startswith(RAY))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Share the tests by file, so that fixtures of a module are made once, with all that starts Ray as one file.

    Groups by mark (``--dist loadgroup``) do nothing with pytest 9.2: pytest-xdist 3.8 renames tests, which it ignores.
    """
    from xdist.scheduler import LoadScopeScheduling  # vLLM's environment has no pytest-xdist

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if nodeid.startswith(RAY) else nodeid.split("::")[0]

    return Scheduling(config, log)
