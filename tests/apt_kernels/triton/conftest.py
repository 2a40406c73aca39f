"""Triton kernels run interpreted on any machine, and compiled on a GPU by `make test-gpu`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from triton.runtime import interpreter

from apt_kernels.triton.launch import INTERPRETED

HAS_GPU = torch.cuda.is_available() and not INTERPRETED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device and TRITON_INTERPRET=0"))


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `torch.empty` returns is full of NaN.

    Torch's own way refuses cuBLAS and sums along a row on a GPU, of which the twins are made.
    """
    if HAS_GPU:
        monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
        monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
        yield
        return
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def poisoned(empty: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A function that makes a tensor, which is then filled with NaN, or with the largest integer."""

    def fill(*args: Any, **options: Any) -> torch.Tensor:
        tensor = empty(*args, **options)
        if tensor.dtype == torch.float8_e4m3fn:
            tensor.view(torch.uint8).fill_(0x7F)
        elif tensor.dtype.is_floating_point:
            tensor.fill_(float("nan"))
        elif tensor.dtype != torch.bool:
            tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    return fill


@pytest.fixture(scope="session", autouse=True)
def one_patch_for_each_launch() -> Iterator[None]:
    """The interpreter replaces the language's functions at a launch, and again at every call that a kernel makes.

    To find that they are replaced already takes it a third of all its time: here only the first such call of a launch
    that comes from a module like its own looks.
    """
    if not INTERPRETED:
        yield
        return
    patch_lang, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    languages = (interpreter.tl, interpreter.tl.core)
    patched: set[tuple[bool, ...]] = set()

    def patch_once(function: Any) -> Any:
        visible = [value for value in function.__globals__.values() if isinstance(value, ModuleType)]
        seen = tuple(language in visible for language in languages)
        if seen in patched:
            return interpreter._LangPatchScope()
        patched.add(seen)
        return patch_lang(function)

    def launch_anew(*args: Any, **options: Any) -> None:
        patched.clear()
        launch(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_once)
        patch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        yield


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")
