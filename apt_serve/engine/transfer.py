"""Copies between host and device that nobody waits for: what a step launches must not stop for the steps before it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch


def to_device(array: npt.NDArray[np.generic] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host array on the device; on a processor it is shared, not copied.

    By way of pinned memory, of which torch keeps what is still being read: a copy from pageable memory would first wait
    for everything the device was given before.
    """
    tensor = array if isinstance(array, torch.Tensor) else torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def select_rows(tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Some rows of a tensor, given in ascending order; all of them are not copied."""
    if len(rows) == tensor.shape[0]:
        return tensor
    return tensor.index_select(0, to_device(torch.tensor(rows, dtype=torch.int64), tensor.device))


class HostCopy:
    """Tensors on their way to the host, to be read once."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._tensors = tensors
        self._arrival: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensor in tensors):
            self._tensors = tuple(tensor.to("cpu", non_blocking=True) for tensor in tensors)
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def read(self) -> tuple[torch.Tensor, ...]:
        """Wait for the tensors."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._tensors
