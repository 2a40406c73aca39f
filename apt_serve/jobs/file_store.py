"""Files: their rows in the database, their bytes in a folder under names of our own making."""

from __future__ import annotations

import asyncio
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import BinaryIO

from sqlalchemy import ColumnElement, delete, func, insert, or_, select

from apt_core.errors import AptError
from apt_serve.jobs.records import ACTIVE, FILES, JOBS, FileRecord
from apt_serve.records.config import RecordsConfig
from apt_serve.records.database import Database

_FILE_ID = re.compile(r"file-[0-9a-f]{32}")
_UNFINISHED = ".part"
_ORPHAN_S = 3600.0
"""Bytes without a row, left by a process that was killed, are deleted after this long."""
_NAMES_AT_A_TIME = 1000
"""In one query: databases limit its parameters."""


class StorageFullError(AptError):
    """An owner's files take all the room they may."""


class FileStore:
    """The files of all owners. Nobody is told of another's."""

    def __init__(self, database: Database, config: RecordsConfig) -> None:
        self._database = database
        self._folder = config.path / "files"

    def path(self, file_id: str) -> Path:
        """Where the bytes of a file lie; the id is one of ours, not a client's."""
        assert _FILE_ID.fullmatch(file_id)
        return self._folder / file_id

    async def add(
        self, owner: str, filename: str, purpose: str, source: BinaryIO, *, expires_s: float, max_stored_bytes: int
    ) -> FileRecord:
        """Keep a client's file.

        Raises:
            StorageFullError: the owner's files would take more than ``max_stored_bytes``.
        """
        file_id = new_file_id()
        size = await asyncio.to_thread(self._copy, file_id, source)
        now = time.time()
        file = FileRecord(file_id, owner, filename, purpose, size, now, now + expires_s)
        stored = select(func.coalesce(func.sum(FILES.c.bytes), 0)).where(FILES.c.owner == owner)
        try:
            async with self._database.begin(alone=f"files of {owner}") as connection:
                await connection.execute(insert(FILES).values(**asdict(file)))
                if (await connection.execute(stored)).scalar_one() > max_stored_bytes:
                    raise StorageFullError(f"Your files may take {max_stored_bytes} bytes together; delete some first.")
        except BaseException:
            self.remove(file_id)
            raise
        return file

    async def get(self, owner: str, file_id: str) -> FileRecord | None:
        """One of an owner's that has not expired."""
        if not _FILE_ID.fullmatch(file_id):
            return None
        async with self._database.begin() as connection:
            row = (await connection.execute(select(FILES).where(*_visible(owner), FILES.c.id == file_id))).mappings()
            found = row.first()
        return None if found is None else FileRecord(**{field.name: found[field.name] for field in fields(FileRecord)})

    async def page(
        self, owner: str, *, after: str | None, limit: int, is_ascending: bool, purpose: str | None
    ) -> list[FileRecord]:
        """An owner's by age, those that come after one of them."""
        query = select(*(FILES.c[field.name] for field in fields(FileRecord))).where(*_visible(owner))
        if purpose is not None:
            query = query.where(FILES.c.purpose == purpose)
        if after is not None:
            number = select(FILES.c.number).where(FILES.c.id == after, FILES.c.owner == owner).scalar_subquery()
            query = query.where(FILES.c.number > number if is_ascending else FILES.c.number < number)
        order = FILES.c.number.asc() if is_ascending else FILES.c.number.desc()
        async with self._database.begin() as connection:
            return [FileRecord(*row) for row in await connection.execute(query.order_by(order).limit(limit))]

    async def delete(self, file_id: str) -> None:
        """Its row and its bytes."""
        async with self._database.begin() as connection:
            await connection.execute(delete(FILES).where(FILES.c.id == file_id))
        self.remove(file_id)

    @contextmanager
    def writing(self, file_id: str) -> Iterator[BinaryIO]:
        """Bytes of a new file, whole under its id at the end of the context or not there at all."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = self._folder / f"{file_id}-{uuid.uuid4().hex}{_UNFINISHED}"
        try:
            with part.open("xb") as file:
                yield file
            part.replace(self.path(file_id))
        finally:
            part.unlink(missing_ok=True)

    def remove(self, file_id: str) -> None:
        """The bytes alone."""
        self.path(file_id).unlink(missing_ok=True)

    async def sweep(self) -> None:
        """Delete files that have expired and that no batch still reads, and bytes that belong to none."""
        read = select(JOBS.c.id).where(JOBS.c.input_file_id == FILES.c.id, JOBS.c.state.in_(ACTIVE))
        expired = FILES.c.expires_at < time.time()
        async with self._database.begin() as connection:
            await connection.execute(delete(FILES).where(expired, ~read.exists()))
        old = await asyncio.to_thread(self._older_than, time.time() - _ORPHAN_S)
        for start in range(0, len(old), _NAMES_AT_A_TIME):
            names = old[start : start + _NAMES_AT_A_TIME]
            async with self._database.begin() as connection:
                known = set((await connection.execute(select(FILES.c.id).where(FILES.c.id.in_(names)))).scalars())
            for name in set(names) - known:
                (self._folder / name).unlink(missing_ok=True)

    def _copy(self, file_id: str, source: BinaryIO) -> int:
        with self.writing(file_id) as file:
            shutil.copyfileobj(source, file)
            return file.tell()

    def _older_than(self, before: float) -> list[str]:
        names = []
        if self._folder.is_dir():
            for path in self._folder.iterdir():
                with suppress(FileNotFoundError):
                    if path.stat().st_mtime < before:
                        names.append(path.name)
        return names


def new_file_id() -> str:
    """Not to be guessed, and a plain name."""
    return f"file-{uuid.uuid4().hex}"


def _visible(owner: str) -> tuple[ColumnElement[bool], ...]:
    lives = or_(FILES.c.expires_at.is_(None), FILES.c.expires_at > time.time())
    return FILES.c.owner == owner, lives
