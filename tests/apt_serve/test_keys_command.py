"""`apt-serve keys`."""

from __future__ import annotations

from pathlib import Path

import pytest

from apt_serve.cli import main


@pytest.fixture
def config(tmp_path: Path) -> str:
    file = tmp_path / "config.yaml"
    file.write_text(f"applications: [{{args: {{records: {{folder: {tmp_path / 'records'}}}}}}}]")
    return str(file)


def test_a_key_from_its_making_to_its_end(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    def keys(*arguments: str) -> str:
        assert main(["keys", *arguments, "--config", config]) == 0
        return capsys.readouterr().out.strip()

    key = keys("create", "--owner", "alice", "--scope", "jobs", "--model", "small", "--expires-in-days", "3")
    key_id, secret = key.split("_", 2)[1:]
    new = keys("rotate", key_id, "--overlap-days", "0.5")
    assert "revoked  alice" in keys("revoke", key_id)
    lines = {line.split()[0]: line for line in keys("list", "--owner", "alice").splitlines()}
    assert lines.keys() == {key_id, new.split("_", 2)[1]}
    assert all("alice  default  jobs  small  default" in line and secret not in line for line in lines.values())
    assert "  revoked  " in lines[key_id]
    assert keys("list", "--owner", "bob") == ""


def test_what_cannot_be_done_is_said(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "revoke", "aaaaaaaa", "--config", config]) == 1
    assert "there is no key 'aaaaaaaa'" in capsys.readouterr().err
    assert main(["keys", "create", "--owner", "a", "--expires-in-days", "-1", "--config", config]) == 2
