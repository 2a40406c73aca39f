"""Packages, and what the system allows."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from apt_core.errors import ConfigError
from apt_kernels.cache import cache_folder
from apt_serve.config import ServerConfig
from apt_serve.config_file import NO_GRPC, GrpcOptions, HttpOptions
from apt_serve.doctor.finding import Finding, ok, problem, warning
from apt_serve.ports import require_free_port

DISTRIBUTION = "apt-llm"
CONSTRAINTS = Path(__file__).parents[2] / "constraints" / "cpu.txt"
"""In a source checkout only."""
EXTRA_FILES = 512
"""Descriptors beside one per request: libraries, logs, idle connections."""


def packages(distribution: str = DISTRIBUTION, constraints: Path = CONSTRAINTS) -> Finding:
    """Whether everything the server needs is installed, in versions it works with."""
    try:
        requirements = [Requirement(line) for line in requires(distribution) or ()]
    except PackageNotFoundError:
        return warning(
            "packages", f"{distribution} is not installed, it runs from its source", "pip install -e '.[serve]'"
        )
    if unfit := list(_unfit(requirements)):
        return problem("packages", "; ".join(unfit), f"pip install '{distribution}[serve]'")
    if others := list(_untested(requirements, constraints)):
        advice = f"pip install -c {constraints} '{distribution}[serve]', if something fails"
        return warning("packages", f"not the versions that were tested together: {'; '.join(others)}", advice)
    return ok("packages", f"Python {platform.python_version()}, torch {version('torch')}, and all others fit")


def _unfit(requirements: list[Requirement]) -> Iterator[str]:
    for requirement in _needed(requirements):
        found = _version(requirement.name)
        if found is None:
            yield f"{requirement.name} is missing"
        elif not requirement.specifier.contains(found, prereleases=True):
            yield f"{requirement.name} {found} is not {requirement.specifier}"


def _untested(requirements: list[Requirement], constraints: Path) -> Iterator[str]:
    if not constraints.is_file():
        return
    lines = (line.partition("#")[0].strip() for line in constraints.read_text(encoding="utf-8").splitlines())
    pins = {_normal(pin.name): pin for pin in map(Requirement, filter(None, lines))}
    for requirement in _needed(requirements):
        pin, found = pins.get(_normal(requirement.name)), _version(requirement.name)
        if pin is not None and found is not None and not pin.specifier.contains(found, prereleases=True):
            yield f"{requirement.name} {found}, tested {pin.specifier}"


def _needed(requirements: list[Requirement]) -> Iterator[Requirement]:
    """Those of the server. A torch for processors alone needs no Triton."""
    for requirement in requirements:
        is_for_server = requirement.marker is None or requirement.marker.evaluate({"extra": "serve"})
        if is_for_server and not (requirement.name == "triton" and "+cpu" in (_version("torch") or "")):
            yield requirement


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def port(http: HttpOptions, grpc: GrpcOptions = NO_GRPC) -> Finding:
    """Whether the server can listen."""
    try:
        require_free_port(http, grpc)
    except ConfigError as error:
        return problem("port", str(error), "stop what listens there, or choose another with --port")
    return ok("port", f"{http.host}:{http.port} is free")


def open_files(config: ServerConfig) -> Finding:
    """Whether there are descriptors for as many connections as the engine takes requests."""
    wanted = config.replicas * config.max_requests + EXTRA_FILES
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and limit < wanted:
        message = f"{limit} may be open, {wanted} are open with every place in the engine taken"
        return warning(
            "open files", message, f"ulimit -n {wanted} before the server starts, or LimitNOFILE= of systemd"
        )
    return ok("open files", f"{limit} may be open")


def huge_pages(root: Path = Path("/")) -> Finding:
    """Whether the system gives large arrays huge pages: worth a tenth at one stream on a processor."""
    file = root / "sys/kernel/mm/transparent_hugepage/enabled"
    try:
        text = file.read_text(encoding="ascii")
    except OSError:
        return warning("huge pages", f"{file} cannot be read", "nothing, if this system has none")
    chosen = text.partition("[")[2].partition("]")[0]
    if chosen == "never":
        return warning("huge pages", "switched off", f"as root: echo madvise > {file}")
    return ok("huge pages", chosen)


def cache() -> Finding:
    """Whether what can be made again is kept for the next start."""
    folder = cache_folder()
    if not is_writable(folder):
        advice = "make it writable, or name another in $APT_CACHE; each start packs the weights again without it"
        return warning("cache", f"{folder} cannot be written", advice)
    return ok("cache", str(folder))


def is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, or the folder itself where it is not there yet."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
