"""vLLM's environment holds all that the server asks for: its packages are pinned and installed one by one."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement


def _unmet(package: str) -> set[str]:
    """What a package asks for, and what that asks for in turn, and is not installed, or not in such a version."""
    unmet: set[str] = set()
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(package)]
    while waiting:
        requirement = waiting.pop()
        try:
            found = distribution(requirement.name)
        except PackageNotFoundError:
            unmet.add(str(requirement))
            continue
        if not requirement.specifier.contains(found.version, prereleases=True):
            unmet.add(f"{requirement} (found {found.version})")
        for extra in requirement.extras | {""}:
            if (requirement.name, extra) not in seen:
                seen.add((requirement.name, extra))
                asked = [Requirement(line) for line in found.requires or ()]
                waiting += [one for one in asked if one.marker is None or one.marker.evaluate({"extra": extra})]
    return unmet


def test_everything_the_server_needs_is_installed() -> None:
    assert _unmet("apt-llm[serve,test]") == set()
