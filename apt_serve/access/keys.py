"""API keys: how they look, and what is kept of them.

A key is ``apt_<id>_<secret>``. Kept is the id, by which it is found, and HMAC-SHA256 of id and secret under the
pepper of the server, which is not in the database: whoever copies that can neither use the keys in it nor put one of
theirs in. A secret has 256 random bits, so it needs no slow hash.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import string
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile

from apt_core.errors import ConfigError
from apt_serve.access.config import MIN_SECRET_BYTES

PEPPER_FILE = "key_pepper"
_ID_LETTERS = string.ascii_lowercase + string.digits
_KEY = re.compile(r"apt_([a-z0-9]{8})_([A-Za-z0-9_-]{43})")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """The two parts of a key."""

    id: str
    secret: str = field(repr=False)

    @classmethod
    def make(cls) -> ApiKey:
        """A new key."""
        return cls("".join(secrets.choice(_ID_LETTERS) for _ in range(8)), secrets.token_urlsafe(32))

    @classmethod
    def parse(cls, text: str) -> ApiKey | None:
        """A key as a client sends it; None if it is none."""
        match = _KEY.fullmatch(text)
        return None if match is None else cls(match[1], match[2])

    @property
    def text(self) -> str:
        """What the owner keeps."""
        return f"apt_{self.id}_{self.secret}"

    def digest(self, pepper: bytes) -> str:
        """What the server keeps."""
        return hmac.digest(pepper, f"{self.id}:{self.secret}".encode(), hashlib.sha256).hex()

    def has_digest(self, digest: str, pepper: bytes) -> bool:
        """Whether it is the key of which the server has kept this; takes equally long either way."""
        return hmac.compare_digest(self.digest(pepper), digest)


def read_pepper(variable: str, folder: Path) -> bytes:
    """The server's pepper, from the environment or else from a folder, where the first one to ask makes it.

    Raises:
        ConfigError: it is too short or cannot be kept.
    """
    given = os.environ.get(variable)
    try:
        pepper = given.encode() if given else _kept_pepper(folder)
    except OSError as error:
        raise ConfigError(f"no pepper can be kept in {folder}: {error}", field="access.pepper_variable") from error
    if len(pepper) < MIN_SECRET_BYTES:
        raise ConfigError(f"the pepper must have at least {MIN_SECRET_BYTES} bytes", field="access.pepper_variable")
    return pepper


def _kept_pepper(folder: Path) -> bytes:
    file = folder / PEPPER_FILE
    if not file.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=folder) as new:  # readable to its owner alone
            new.write(secrets.token_hex(32).encode())
            new.flush()
            with suppress(FileExistsError):  # whole or not at all, and only once, whoever else makes one now
                os.link(new.name, file)
    return file.read_bytes()
