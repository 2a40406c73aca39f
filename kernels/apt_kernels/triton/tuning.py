"""Tile sizes by device, op and shape class: looked up at a launch, measured beforehand.

Nothing is ever tuned while serving: `python -m benchmarks.kernels.tune` measures an op's candidates on this machine's
GPU and writes tuned/<device>.json. A device or class without an entry takes the op's default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

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


def tuned(op: str, shape_class: str, device: torch.device, default: Config) -> Config:
    """The configuration measured best for this op and class of shapes on this kind of device, or the default."""
    if device.type != "cuda":
        return default
    return _table(device_name(device)).get(f"{op}/{shape_class}", default)


@cache
def device_name(device: torch.device) -> str:
    """A short name of a kind of GPU, as its file is called: `h200`."""
    name = torch.cuda.get_device_name(device).lower()
    return name.removeprefix("nvidia ").split("-")[0].replace(" ", "-")


def save(name: str, configs: Mapping[str, Config]) -> Path:
    """Write a device's table: configurations by "op/shape class"."""
    path = FOLDER / f"{name}.json"
    rows = {key: asdict(config) for key, config in sorted(configs.items())}
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    _table.cache_clear()
    return path


@cache
def _table(name: str) -> dict[str, Config]:
    path = FOLDER / f"{name}.json"
    if not path.exists():
        return {}
    return {key: Config(**row) for key, row in json.loads(path.read_text(encoding="utf-8")).items()}
