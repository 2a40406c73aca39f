"""vLLM as an engine. Installed separately: nothing here imports it before an engine starts."""

from apt_serve.engine.vllm.engine import VllmEngine

__all__ = ["VllmEngine"]
