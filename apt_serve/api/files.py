"""/v1/files: what batches read and write."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Form, Query, Response, UploadFile
from starlette.responses import FileResponse

from apt_serve.access.identity import Scope
from apt_serve.api.access import Caller, needs
from apt_serve.api.errors import ApiError
from apt_serve.api.openapi import answer, errors
from apt_serve.api.schemas.jobs import MAX_EXPIRY_S, MIN_EXPIRY_S, FileDeleted, FileList, FileObject
from apt_serve.api.state import ApiState, State
from apt_serve.jobs.file_store import StorageFullError
from apt_serve.jobs.records import FileRecord

router = APIRouter(tags=["Jobs"], dependencies=[needs(Scope.JOBS)])

MAX_FILENAME_LENGTH = 255
_MAX_PAGE = 10_000
_Seconds = Annotated[int | None, Form(alias="expires_after[seconds]", ge=MIN_EXPIRY_S, le=MAX_EXPIRY_S)]
_Anchor = Annotated[Literal["created_at"] | None, Form(alias="expires_after[anchor]")]


@router.post("/v1/files", response_model=FileObject, responses=errors(400, 401, 403, 413, 429))
async def upload_file(
    file: UploadFile,
    purpose: Annotated[Literal["batch"], Form()],
    state: State,
    caller: Caller,
    expires_anchor: _Anchor = None,
    expires_s: _Seconds = None,
) -> Response:
    """Keep a JSONL file for a batch."""
    if (expires_anchor is None) is not (expires_s is None):
        raise ApiError(400, "expires_after: needs both anchor and seconds", param="expires_after", code="invalid_value")
    name, config = _plain_name(file.filename), state.config.jobs
    if file.size is not None and file.size > config.max_file_bytes:
        raise ApiError(413, f"A file may have {config.max_file_bytes} bytes.", param="file", code="file_too_large")
    try:
        kept = await state.jobs.files.add(
            caller.owner,
            name,
            purpose,
            file.file,
            expires_s=expires_s or config.retention_s,
            max_stored_bytes=config.max_stored_bytes,
        )
    except StorageFullError as error:
        raise ApiError(413, str(error), param="file", code="storage_full") from None
    return FileObject.of(kept).response()


@router.get("/v1/files", response_model=FileList, responses=errors(400, 401, 403, 404))
async def list_files(
    state: State,
    caller: Caller,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=_MAX_PAGE)] = _MAX_PAGE,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=32)] = None,
) -> Response:
    """The caller's files, the newest first."""
    if after is not None:
        await find_file(state, caller.owner, after, param="after")
    found = await state.jobs.files.page(
        caller.owner, after=after, limit=limit + 1, is_ascending=order == "asc", purpose=_without_nul(purpose)
    )
    page = [FileObject.of(file) for file in found[:limit]]
    first, last = (page[0].id, page[-1].id) if page else (None, None)
    return FileList(object="list", data=page, first_id=first, last_id=last, has_more=len(found) > limit).response()


@router.get("/v1/files/{file_id}", response_model=FileObject, responses=errors(401, 403, 404))
async def get_file(file_id: str, state: State, caller: Caller) -> Response:
    """One file."""
    return FileObject.of(await find_file(state, caller.owner, file_id)).response()


@router.get(
    "/v1/files/{file_id}/content",
    response_class=FileResponse,
    responses=answer("Its bytes.", "application/octet-stream") | errors(401, 403, 404),
)
async def get_file_content(file_id: str, state: State, caller: Caller) -> Response:
    """The bytes of a file."""
    file = await find_file(state, caller.owner, file_id)
    path = state.jobs.files.path(file.id)
    if not path.is_file():
        raise _no_file(file_id, None)
    return FileResponse(path, media_type="application/octet-stream", filename=file.filename)


@router.delete("/v1/files/{file_id}", response_model=FileDeleted, responses=errors(401, 403, 404, 409))
async def delete_file(file_id: str, state: State, caller: Caller) -> Response:
    """Delete a file that no running batch reads."""
    file = await find_file(state, caller.owner, file_id)
    if not await state.jobs.delete_file(file.id):
        raise ApiError(409, "A batch that has not finished reads this file.", code="file_in_use")
    return FileDeleted(id=file.id, object="file", deleted=True).response()


async def find_file(state: ApiState, owner: str, file_id: str, param: str | None = None) -> FileRecord:
    """A file of the caller's; another's is as if it were not there.

    Raises:
        ApiError: there is none.
    """
    file = await state.jobs.files.get(owner, file_id)
    if file is None:
        raise _no_file(file_id, param)
    return file


def _no_file(file_id: str, param: str | None) -> ApiError:
    return ApiError(404, f"No such File object: {file_id}", param=param or "id", code="file_not_found")


def _plain_name(name: str | None) -> str:
    """A file's name, which must be nothing but a name."""
    is_plain = name and name not in (".", "..") and name.isprintable() and not set(name) & set("/\\")
    if not is_plain or not name or len(name) > MAX_FILENAME_LENGTH:
        message = f"file: its name must have 1 to {MAX_FILENAME_LENGTH} printable characters and no path"
        raise ApiError(400, message, param="file", code="invalid_filename")
    return name


def _without_nul(text: str | None) -> str | None:
    """PostgreSQL has no texts with NUL."""
    return None if text is None else text.replace("\0", "\ufffd")
