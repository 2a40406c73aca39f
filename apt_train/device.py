"""The device of a process."""

from __future__ import annotations

import os

import torch

from apt_core.errors import ConfigError
from apt_kernels import ops


def open_device(name: str) -> torch.device:
    """cpu, cuda, or auto for cuda where there is one. With cuda a process takes the one of its local rank.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"must be auto, cpu or cuda, got {name}", field="run.device") from None
    if device.type == "cpu":
        # The C++ ops have threads of their own; torch's number is what torchrun and OMP_NUM_THREADS have set.
        ops.set_num_threads(torch.get_num_threads())
        return torch.device("cpu")
    if device.type != "cuda":
        raise ConfigError(f"must be auto, cpu or cuda, got {name}", field="run.device")
    index = device.index if ":" in name else int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise ConfigError(f"there are {torch.cuda.device_count()} CUDA devices here", field="run.device")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
