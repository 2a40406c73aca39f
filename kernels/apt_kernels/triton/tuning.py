"""Tile sizes by device, op and shape class: looked up at a launch, measured beforehand.

Nothing is ever tuned while serving: `python -m benchmarks.kernels.tune` measures an op's candidates on this machine's
GPU and writes tuned/<device>.json. A device or class without an entry takes the op's default.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "tuned"


@dataclass(frozen=True, slots=True)
class Config:
    """How a kernel is cut for the hardware."""

    blocks: Mapping[str, int]
    """Its tile sizes, by the names of its constexpr parameters."""
    num_warps: int = 4
    num_stages: int = 2

    def options(self) -> dict[str, int]:
        """As a launch takes them."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


Choose = Callable[[str, Config], Config]
"""From "op/shape class" and the op's default to what a launch takes."""


class _Trial:
    """What chooses in place of the tables, if anything does, and how often that has changed."""

    choose: Choose | None = None
    version = 0


def tuned(op: str, shape_class: str, device: torch.device, default: Config) -> Config:
    """The configuration measured best for this op and class of shapes on this kind of device, or the default.

    Raises:
        ValueError: the device's table is damaged; names the file.
    """
    key = f"{op}/{shape_class}"
    if _Trial.choose is not None:
        return _Trial.choose(key, default)
    if device.type != "cuda":
        return default
    return stored(device_name(device)).get(key, default)


@contextmanager
def trying(choose: Choose) -> Iterator[None]:
    """Let a function choose configurations inside the block, on any device. For one thread."""
    before, _Trial.choose, _Trial.version = _Trial.choose, choose, _Trial.version + 1
    try:
        yield
    finally:
        _Trial.choose, _Trial.version = before, _Trial.version + 1


def version() -> int:
    """Another one whenever `tuned` may answer differently: for those who keep its answers."""
    return _Trial.version


@cache
def device_name(device: torch.device) -> str:
    """A short name of a kind of GPU, as its file is called: `h200`."""
    name = torch.cuda.get_device_name(device).lower()
    return name.removeprefix("nvidia ").split("-")[0].replace(" ", "-")


def save(name: str, configs: Mapping[str, Config]) -> Path:
    """Write a device's table: configurations by "op/shape class"."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    rows = {key: asdict(config) for key, config in sorted(configs.items())}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    stored.cache_clear()
    _Trial.version += 1
    return path


@cache
def stored(name: str) -> Mapping[str, Config]:
    """A device's table; empty if there is none.

    Raises:
        ValueError: it is damaged; names the file.
    """
    path = FOLDER / f"{name}.json"
    if not path.exists():
        return {}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return {key: _config(row) for key, row in rows.items()}
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{path} is no table of configurations: {error}") from error


def _config(row: Mapping[str, Any]) -> Config:
    config = Config(**row)
    numbers: list[Any] = [*config.options().values()]
    if not all(isinstance(number, int) and number > 0 for number in numbers):
        raise ValueError(f"{row} must hold positive whole numbers")
    return config
