"""/v1/files as OpenAI's client and a hostile one see it."""

from __future__ import annotations

import sqlite3

import openai
import pytest

from tests.apt_serve.jobs.conftest import Jobs


def test_a_file_is_kept_listed_read_and_deleted(jobs: Jobs) -> None:
    file = jobs.client.files.create(file=("in put.jsonl", b"1\n2\n"), purpose="batch")
    assert (file.filename, file.purpose, file.bytes, file.object) == ("in put.jsonl", "batch", 4, "file")
    assert jobs.client.files.retrieve(file.id) == file
    assert jobs.client.files.content(file.id).content == b"1\n2\n"
    assert [each.id for each in jobs.client.files.list(purpose="batch")] == [file.id]
    assert jobs.client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        jobs.client.files.retrieve(file.id)
    assert not (jobs.folder / "files" / file.id).exists()


def test_pages_hold_every_file_once(jobs: Jobs) -> None:
    ids = [jobs.upload(str(number)) for number in range(5)]
    assert [file.id for file in jobs.client.files.list(limit=2, order="asc")] == ids
    page = jobs.client.files.list(limit=2)
    assert ([file.id for file in page.data], page.has_more) == (ids[:2:-1], True)
    assert [file.id for file in page] == ids[::-1]


def test_a_file_of_another_owner_is_not_there(jobs: Jobs) -> None:
    file_id, bob = jobs.upload("secret"), {"X-Test-Owner": "bob"}
    for url in (f"/v1/files/{file_id}", f"/v1/files/{file_id}/content", f"/v1/files?after={file_id}"):
        assert jobs.http.get(url, headers=bob).status_code == 404
    assert jobs.http.delete(f"/v1/files/{file_id}", headers=bob).status_code == 404
    assert jobs.http.get("/v1/files", headers=bob).json()["data"] == []
    batch = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
    assert jobs.http.post("/v1/batches", json=batch, headers=bob).json()["error"]["code"] == "file_not_found"
    assert jobs.client.files.content(file_id).content == b"secret"


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", "a\\b", "a\nb", "a\x00b", "a" * 256])
def test_a_file_name_that_is_more_than_a_name_is_refused(jobs: Jobs, name: str) -> None:
    jobs.upload("x")
    before = set(jobs.folder.rglob("*"))
    body = (
        b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x\r\nContent-Disposition: form-data; '
    )
    body += b'name="file"; filename="' + name.encode() + b'"\r\n\r\nhello\r\n--x--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = jobs.http.post("/v1/files", content=body, headers=headers)
    assert answer.status_code == 400, answer.text
    assert set(jobs.folder.rglob("*")) == before


@pytest.mark.parametrize(
    "name", ["..%2f..%2frecords.sqlite", "%2e%2e", "records.sqlite", "file-%00", "file-" + "0" * 32]
)
def test_an_id_that_is_none_of_ours_is_not_there(jobs: Jobs, name: str) -> None:
    jobs.upload("x")
    for url in (f"/v1/files/{name}", f"/v1/files/{name}/content"):
        assert jobs.http.get(url).status_code == 404
    assert jobs.http.delete(f"/v1/files/{name}").status_code in (404, 405)
    assert (jobs.folder / "records.sqlite").exists()


def test_other_purposes_are_refused(jobs: Jobs) -> None:
    with pytest.raises(openai.BadRequestError, match="purpose"):
        jobs.client.files.create(file=b"x", purpose="fine-tune")
    for data in ({"purpose": "batch"}, {"purpose": "batch", "file": "not a file"}):
        assert jobs.http.post("/v1/files", data=data).json()["error"]["param"] == "file"


def test_an_upload_may_be_larger_than_other_bodies_and_not_larger_than_its_own_limit(jobs: Jobs) -> None:
    file = jobs.client.files.create(file=b"x" * (5 * 1024 * 1024), purpose="batch")
    assert file.bytes == 5 * 1024 * 1024
    with pytest.raises(openai.APIStatusError) as refused:
        jobs.client.files.create(file=b"x" * (8 * 1024 * 1024 + 1), purpose="batch")
    assert refused.value.status_code == 413
    assert jobs.http.post("/v1/batches", content=b" " * (4 * 1024 * 1024 + 1)).status_code == 413


def test_an_owner_has_so_much_room(jobs: Jobs) -> None:
    files = [jobs.client.files.create(file=b"x" * (8 * 1024 * 1024), purpose="batch") for _ in range(2)]
    with pytest.raises(openai.APIStatusError, match="together"):
        jobs.upload("x")
    assert len(list((jobs.folder / "files").glob("*.part"))) == 0
    jobs.client.files.delete(files[0].id)
    assert jobs.upload("x")


def test_a_file_expires(jobs: Jobs) -> None:
    expiry = {"anchor": "created_at", "seconds": 3600}
    file = jobs.client.files.create(file=b"x", purpose="batch", expires_after=expiry)  # type: ignore[arg-type]
    assert file.expires_at == file.created_at + 3600
    with sqlite3.connect(jobs.folder / "records.sqlite", timeout=10) as database:
        database.execute("UPDATE apt_files SET expires_at = 1 WHERE id = ?", (file.id,))
    with pytest.raises(openai.NotFoundError):
        jobs.client.files.content(file.id)
    assert not jobs.client.files.list().data
