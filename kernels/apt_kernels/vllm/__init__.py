"""APT's paged attention inside vLLM: a plug-in of its group `vllm.general_plugins`, by the name `apt`.

On a GPU it is the backend CUSTOM, and serves whoever asks vLLM for that one. On a processor vLLM has a single backend,
which APT's replaces, but only where APT_VLLM_ATTENTION=1 asks for it: that APT is installed changes no other vLLM.
"""

from __future__ import annotations

import os
from importlib.metadata import entry_points

GROUP = "vllm.general_plugins"
NAME = "apt"
SWITCH = "APT_VLLM_ATTENTION"
ALLOWED = "VLLM_PLUGINS"
"""vLLM's own: the names of the plug-ins it may load, with commas; without it all of them."""


def register() -> None:
    """Tell vLLM of the backends. vLLM calls it in each of its processes, maybe more than once."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, "apt_kernels.vllm.cuda.CudaAttentionBackend")
    if os.environ.get(SWITCH) == "1":
        register_backend(AttentionBackendEnum.CPU_ATTN, "apt_kernels.vllm.cpu.CpuAttentionBackend")


def is_installed() -> bool:
    """Whether vLLM's processes find the plug-in: by the metadata of the installed package, not on PYTHONPATH alone."""
    return bool(entry_points(group=GROUP, name=NAME))


def switched_on() -> dict[str, str]:
    """Variables for vLLM's processes that make APT's attention serve on a processor, and let it be found on a GPU."""
    allowed = os.environ.get(ALLOWED)
    if allowed is None or NAME in allowed.split(","):
        return {SWITCH: "1"}
    return {SWITCH: "1", ALLOWED: f"{allowed},{NAME}".lstrip(",")}
