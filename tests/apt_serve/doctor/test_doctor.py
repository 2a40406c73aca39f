"""Each check of `apt-serve doctor` finds what it looks for, in the thing itself."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from fakeredis import TcpFakeServer

from apt_core.checkpoint import locate
from apt_serve.config import ServerConfig
from apt_serve.config_file import HttpOptions
from apt_serve.doctor import engine, environment, stores
from apt_serve.doctor.examine import examine
from apt_serve.doctor.finding import Finding, Level
from apt_serve.engine.config import EMBEDDED_MODEL, EngineConfig
from apt_serve.models.config import ModelsConfig
from apt_serve.records.config import SQLITE_FILE, RecordsConfig
from apt_serve.records.database import SCHEMA_VERSION
from benchmarks.serve.launch import free_port

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Section:
    redis_url: str | None = None


@dataclass(frozen=True)
class Settings:
    limits: Section = field(default_factory=Section)
    jobs: Section = field(default_factory=Section)


def run_doctor(*flags: str, **variables: str) -> tuple[int, dict[str, dict[str, str]]]:
    command = [sys.executable, "-m", "apt_serve", "doctor", "--json", f"--port={free_port()}", *flags]
    environment_ = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"} | variables
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment_, timeout=120)
    assert done.stdout, done.stderr
    return done.returncode, {finding["check"]: finding for finding in json.loads(done.stdout)}


def test_a_good_machine_has_no_problem_and_is_left_as_it_was(tmp_path: Path) -> None:
    code, findings = run_doctor(f"--records.folder={tmp_path / 'records'}")
    assert code == 0
    assert {finding["level"] for finding in findings.values()} <= {"ok", "warning"}
    assert {"packages", "port", "device", "model", "memory", "records"} <= findings.keys()
    assert not (tmp_path / "records").exists()


def test_a_problem_is_told_by_the_exit_code(tmp_path: Path) -> None:
    code, findings = run_doctor("/absent", APT_OPS=str(tmp_path))
    assert code == 1
    assert findings["model"]["level"] == "problem"
    assert "/absent" in findings["model"]["message"]
    assert "memory" not in findings  # of which nothing can be said
    # The other one: ops that were never compiled.
    assert findings["device"]["level"] == "warning"
    assert "apt_kernels.cpu.build" in findings["device"]["advice"]


def expect(finding: Finding, level: Level, text: str) -> None:
    assert finding.level is level, finding
    assert text in finding.message
    assert bool(finding.advice) == (level is not Level.OK)


def distribution(folder: Path, *requirements: str) -> None:
    """An installed package that requires these."""
    info = folder / "sample-1.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", "Name: sample", "Version: 1", *(f"Requires-Dist: {r}" for r in requirements)]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


class TestPackages:
    def test_all_fit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        distribution(tmp_path, "torch>=2", 'absent-thing; extra == "train"')
        monkeypatch.syspath_prepend(tmp_path)
        expect(environment.packages("sample", tmp_path / "none"), Level.OK, "torch")

    def test_missing_and_too_old_ones_are_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        distribution(tmp_path, "torch>=99", 'absent-thing; extra == "serve"')
        monkeypatch.syspath_prepend(tmp_path)
        found = environment.packages("sample", tmp_path / "none")
        expect(found, Level.PROBLEM, f"torch {torch.__version__} is not >=99")
        assert "absent-thing is missing" in found.message

    def test_other_versions_than_the_tested_ones(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        distribution(tmp_path, "torch>=2")
        monkeypatch.syspath_prepend(tmp_path)
        pins = tmp_path / "pins.txt"
        pins.write_text("# versions\ntorch==1.0  # old\n")
        expect(environment.packages("sample", pins), Level.WARNING, f"torch {torch.__version__}, tested ==1.0")

    def test_a_source_that_is_not_installed(self) -> None:
        expect(environment.packages("not-installed-anywhere"), Level.WARNING, "source")


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        http = HttpOptions(port=taken.getsockname()[1])
        expect(environment.port(http), Level.PROBLEM, "Address already in use")
    expect(environment.port(http), Level.OK, "free")


def test_too_few_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    config = ServerConfig(model=EngineConfig(max_num_seqs=64, max_waiting_requests=512))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(1000, soft), hard))
        expect(environment.open_files(config), Level.WARNING, "1088 are open")
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(1088, hard), hard))
        expect(environment.open_files(config), Level.OK, "1088")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("text", "level", "message"),
    [
        ("always [madvise] never", Level.OK, "madvise"),
        ("always madvise [never]", Level.WARNING, "switched off"),
        (None, Level.WARNING, "cannot be read"),
    ],
)
def test_huge_pages(tmp_path: Path, text: str | None, level: Level, message: str) -> None:
    if text is not None:
        folder = tmp_path / "sys/kernel/mm/transparent_hugepage"
        folder.mkdir(parents=True)
        (folder / "enabled").write_text(text + "\n")
    expect(environment.huge_pages(tmp_path), level, message)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "new" / "apt"))
    expect(environment.cache(), Level.OK, "apt")
    (tmp_path / "file").touch()
    monkeypatch.setenv("APT_CACHE", str(tmp_path / "file" / "apt"))
    expect(environment.cache(), Level.WARNING, "cannot be written")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    expect(engine.device(EngineConfig(device="cuda")), Level.PROBLEM, "no CUDA device")


def test_a_damaged_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    [found] = engine.model(EngineConfig(source=str(tmp_path)))
    expect(found, Level.PROBLEM, "config.json")


def test_further_models_are_looked_at_too(tmp_path: Path) -> None:
    models = ModelsConfig(others={"b": EngineConfig(source=str(tmp_path / "absent"))})
    found = examine(ServerConfig(models=models), HttpOptions())
    assert [each.level for each in found if "absent" in each.message] == [Level.PROBLEM]


def test_a_gguf_that_was_cut(tmp_path: Path) -> None:
    whole, cut = locate(EMBEDDED_MODEL), tmp_path / "cut.gguf"
    shutil.copyfile(whole, cut)
    os.truncate(cut, 100_000)
    [found] = engine.model(EngineConfig(source=str(cut)))
    expect(found, Level.PROBLEM, "cut.gguf")


def test_a_model_of_the_hub_that_is_not_here_yet() -> None:
    [found] = engine.model(EngineConfig(source="nobody/has-this-model"))
    expect(found, Level.WARNING, "downloads it")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EngineConfig(kv_cache_gib=1e5), "kv_cache_gib: needs a KV cache of"),
        (EngineConfig(max_model_len=10**6), "max_model_len: must be at most"),
        (EngineConfig(num_kv_blocks=2), "num_kv_blocks: gives 2 KV blocks"),
        (EngineConfig(tensor_parallel_size=7), "7"),
    ],
)
def test_a_model_that_does_not_fit(config: EngineConfig, message: str) -> None:
    readable, memory = engine.model(config)
    assert readable.level is Level.OK
    expect(memory, Level.PROBLEM, message)


def test_weights_are_counted_in_their_precision() -> None:
    _, stored = engine.model(EngineConfig(dtype="float32"))
    _, packed = engine.model(EngineConfig(dtype="float32", weight_precision="int8"))
    assert stored.message.startswith("weights 0.50 GiB")  # 134.5 million in 4 bytes
    assert packed.message.startswith("weights 0.13 GiB")


class TestRecords:
    def test_a_new_folder_is_not_made(self, tmp_path: Path) -> None:
        folder = tmp_path / "records"
        expect(stores.records(RecordsConfig(folder=str(folder))), Level.OK, "when something is first kept")
        assert not folder.exists()

    def test_a_folder_that_cannot_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        expect(stores.records(RecordsConfig(folder=str(tmp_path / "file"))), Level.PROBLEM, "cannot be written")

    def test_a_database_that_opens(self, tmp_path: Path) -> None:
        expect(stores.records(RecordsConfig(folder=str(tmp_path))), Level.OK, "opens")

    def test_one_of_a_newer_apt(self, tmp_path: Path) -> None:
        config = RecordsConfig(folder=str(tmp_path))
        stores.records(config)
        with closing(sqlite3.connect(tmp_path / SQLITE_FILE)) as database, database:
            database.execute("UPDATE apt_schema SET version = ?", (SCHEMA_VERSION + 1,))
        expect(stores.records(config), Level.PROBLEM, "newer APT")

    def test_a_file_that_is_no_database(self, tmp_path: Path) -> None:
        (tmp_path / SQLITE_FILE).write_text("a letter to a friend, which is long enough to be looked at " * 50)
        expect(stores.records(RecordsConfig(folder=str(tmp_path))), Level.PROBLEM, "not a database")

    def test_a_server_that_does_not_answer_and_its_password(self, tmp_path: Path) -> None:
        url = f"postgresql+psycopg://user:secret@127.0.0.1:{free_port()}/apt"
        found = stores.records(RecordsConfig(url=url, folder=str(tmp_path)))
        expect(found, Level.PROBLEM, "user:***@127.0.0.1")
        assert "secret" not in found.message


@contextmanager
def redis_server() -> Iterator[str]:
    server = TcpFakeServer(("127.0.0.1", 0), server_type="redis")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"redis://127.0.0.1:{server.server_address[1]}/0"
    finally:
        server.shutdown()
        server.server_close()


def test_redis_is_asked_wherever_a_setting_names_one() -> None:
    assert stores.redis_servers(Settings()) == []
    with redis_server() as url:
        absent = f"redis://127.0.0.1:{free_port()}/0"
        jobs, limits = stores.redis_servers(Settings(limits=Section(absent), jobs=Section(url)))
    assert (jobs.check, limits.check) == ("jobs.redis_url", "limits.redis_url")
    expect(jobs, Level.OK, "answers")
    expect(limits, Level.PROBLEM, "does not answer")


def test_an_address_that_is_none() -> None:
    [found] = stores.redis_servers(Settings(limits=Section("localhost:6379")))
    expect(found, Level.PROBLEM, "does not answer")
