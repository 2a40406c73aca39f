"""Installing and building peers: each step once, with its output in a log, at the lowest priority."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_PEERS = Path(__file__).resolve().parent
ROOT = _PEERS.parent.parent
"""The repository."""


class SetupError(Exception):
    """A peer cannot be had on this machine; says why."""


class Setup:
    """The folder of one peer and what has been done in it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.log = folder / "setup.log"

    @property
    def python(self) -> str:
        """The interpreter of the peer's own environment."""
        return str(self.folder / "venv" / "bin" / "python")

    @property
    def import_folder(self) -> Path:
        """A folder with nothing but this package: in the repository's root a peer would find other modules as well."""
        package = self.folder / "import" / _PEERS.parent.name
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").touch()
        link = package / _PEERS.name
        if link.resolve() != _PEERS:
            link.unlink(missing_ok=True)
            link.symlink_to(_PEERS)
        return package.parent

    def once(self, step: str, recipe: str, do: Callable[[], None]) -> None:
        """Take a step, unless an earlier run has taken it by the same recipe.

        Raises:
            SetupError: it failed; the next run tries again.
        """
        stamp = self.folder / f".{step}"
        if stamp.is_file() and stamp.read_text(encoding="utf-8") == recipe:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        do()
        stamp.write_text(recipe, encoding="utf-8")
        self.say(f"{step}: done in {time.perf_counter() - started:.0f} s")

    def environment(self, requirements: Sequence[Sequence[str]], unwanted: Sequence[str] = ()) -> None:
        """A virtual environment with these packages, one call of pip for each group; then without the unwanted ones."""

        def install() -> None:
            self.run("making its environment", [sys.executable, "-m", "venv", "--clear", str(self.folder / "venv")])
            pip = [self.python, "-m", "pip", "--disable-pip-version-check"]
            for group in requirements:
                self.run(f"installing {' '.join(group)}", [*pip, "install", *group])
            if unwanted:
                self.run(f"removing {' '.join(unwanted)}", [*pip, "uninstall", "--yes", *unwanted])

        self.once("environment", f"{sys.version}\n{requirements}\n{unwanted}", install)

    def run(self, what: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Run a command at the lowest priority.

        Raises:
            SetupError: it could not be started, or failed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.say(what)
        with self.log.open("ab") as log:
            log.write(f"\n== {what}: {' '.join(command)}\n".encode())
            log.flush()
            try:
                code = subprocess.run(
                    ["nice", "-n", "19", *command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | dict(environment or {}),
                    check=False,
                ).returncode
            except OSError as error:
                raise SetupError(f"{what} failed ({error})") from None
        if code != 0:
            raise SetupError(f"{what} failed: {self._last_words()} (all of it: {self.log})")

    def say(self, text: str) -> None:
        """Tell the user what is done."""
        print(f"{self.name}: {text}", file=sys.stderr, flush=True)

    def _last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")[:300]
