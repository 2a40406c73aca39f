"""What is shipped for containers: checked by the tools that know these formats, and against what the code says."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def tool(name: str, *arguments: str) -> None:
    command = [str(Path(sys.executable).parent / name), *arguments]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_dockerfile_is_clean() -> None:
    tool("hadolint", "Dockerfile")


def test_shell_scripts_are_clean() -> None:
    tool("shellcheck", *map(str, DEPLOY.glob("*.sh")))


def test_yaml_files_are_clean() -> None:
    tool("yamllint", "--strict", "deploy", ".hadolint.yaml", ".yamllint.yaml")


def test_the_compose_file_has_the_specified_form() -> None:
    tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "deploy/compose.yaml")


def test_everything_the_dockerfile_copies_reaches_the_builder() -> None:
    """.dockerignore lets nothing through that it does not name."""
    copied = [source for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.M) for source in line.split()]
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {line[1:] for line in ignore if line.startswith("!")} == set(copied)
    assert all((ROOT / source).exists() for source in copied)
    assert "*" in ignore


def test_the_image_runs_as_nobody_in_particular() -> None:
    users = re.findall(r"^USER (\S+)", DOCKERFILE, re.M)
    assert users == ["10001:10001"]


@pytest.mark.parametrize("service", SERVICES)
def test_services_are_hardened_and_open_to_this_machine_only(service: str) -> None:
    settings = SERVICES[service]
    assert settings["security_opt"] == ["no-new-privileges:true"]
    assert settings["cap_drop"] == ["ALL"]
    assert settings["read_only"] is True
    assert all(port.startswith("127.0.0.1:") for port in settings.get("ports", ()))
    assert "privileged" not in settings


def test_volumes_are_the_images() -> None:
    mounted = {volume.partition(":")[2] for volume in SERVICES["server"]["volumes"]}
    assert mounted == set(re.findall(r'"(/var/[^"]+)"', re.search(r"^VOLUME (.*)$", DOCKERFILE, re.M)[1]))  # type: ignore[index]


def test_the_server_is_given_time_to_drain() -> None:
    from apt_serve.config import ApiConfig

    assert int(SERVICES["server"]["stop_grace_period"].removesuffix("s")) > ApiConfig().shutdown_grace_s


class TestRequirements:
    """What the image installs."""

    requirements = staticmethod(runpy.run_path(str(DEPLOY / "requirements.py"))["requirements"])
    constraints = staticmethod(runpy.run_path(str(DEPLOY / "requirements.py"))["constraints"])
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")

    @pytest.mark.parametrize(("device", "has_triton"), [("cpu", False), ("cuda", True)])
    def test_they_are_the_servers_but_for_triton_on_a_processor(self, device: str, has_triton: bool) -> None:
        project = tomllib.loads(self.pyproject)["project"]
        wanted = {
            Requirement(line).name for line in project["dependencies"] + project["optional-dependencies"]["serve"]
        }
        found = {Requirement(line).name for line in self.requirements(self.pyproject, device)}
        assert "torch" in found
        assert found == (wanted if has_triton else wanted - {"triton"})

    def test_torch_chooses_its_triton(self) -> None:
        pins = self.constraints((ROOT / "constraints" / "cpu.txt").read_text(encoding="utf-8"))
        assert any(line.startswith("torch==") for line in pins)
        assert not any(line.startswith("triton") for line in pins)
