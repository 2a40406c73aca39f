"""Settings of `apt-train quantize`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

from apt_core.errors import ConfigError

FORBID: dict[str, Any] = {"extra": "forbid"}
Scheme: TypeAlias = Literal["w8a8-dynamic", "w8a8-static", "w4a16", "fp8"]
Method: TypeAlias = Literal["rtn", "gptq"]


@dataclass(frozen=True)
class TextSettings:
    """A text, and how much of it is used."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID

    text: str | None = None
    """File of UTF-8 text; null takes the language reference that comes with Python (pydoc_data.topics)."""
    windows: int = 32
    """Pieces of the text, each a sequence of its own."""
    length: int = 512
    """Tokens of a window."""

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise ConfigError(f"must be at least 1, got {self.windows}", field="windows")
        if self.length < 2:
            raise ConfigError(f"must be at least 2, got {self.length}", field="length")


@dataclass(frozen=True)
class GPTQSettings:
    """GPTQ (arXiv 2210.17323)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID

    damping: float = 0.01
    """Added to the Hessian's diagonal, as a part of its mean."""
    act_order: bool = True
    """Round the inputs with the largest activations first. Groups stay runs of neighbours: the layout is the same."""
    block: int = 128
    """Inputs after which an error reaches all that are still to be rounded. The result hardly depends on it."""

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise ConfigError(f"must lie above 0 and be at most 1, got {self.damping}", field="damping")
        if self.block < 1:
            raise ConfigError(f"must be at least 1, got {self.block}", field="block")


@dataclass(frozen=True)
class QuantizeSettings:
    """How a checkpoint is quantized."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID

    scheme: Scheme = "w8a8-dynamic"
    """Weights and activations in int8, activations with a scale per token or one from calibration; weights in 4 bits;
    both in float8."""
    method: Method = "gptq"
    """How weights are rounded: by GPTQ, or to nearest."""
    group_size: int = 64
    """w4a16: inputs that share a scale, 32 or 64."""
    smoothing: bool | None = None
    """w8a8: scale channels so that activations are easier to round (SmoothQuant, arXiv 2211.10438), where that lessens
    the error; null does."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of what is not quantized: embedding, output head and norms."""
    calibration: TextSettings = field(default_factory=TextSettings)
    """What activations are measured on: windows from the first three quarters of the text."""
    evaluation: TextSettings = field(default_factory=TextSettings)
    """What the result is measured on: windows from the last quarter of the text."""
    gptq: GPTQSettings = field(default_factory=GPTQSettings)

    def __post_init__(self) -> None:
        if self.scheme not in ("w8a8-dynamic", "w8a8-static", "w4a16", "fp8"):
            known = "w8a8-dynamic, w8a8-static, w4a16, fp8"
            raise ConfigError(f"{self.scheme!r} is none of {known}", field="scheme")
        if self.smoothing and not self.has_int8_inputs:
            raise ConfigError(f"is for w8a8 schemes, not for {self.scheme}", field="smoothing")
        if self.group_size not in (32, 64):
            raise ConfigError(f"must be 32 or 64, got {self.group_size}", field="group_size")

    @property
    def has_int8_inputs(self) -> bool:
        """Whether activations are int8."""
        return self.scheme in ("w8a8-dynamic", "w8a8-static")

    @property
    def uses_gptq(self) -> bool:
        """Whether weights are rounded by GPTQ."""
        return self.method == "gptq"

    @property
    def uses_smoothing(self) -> bool:
        """Whether channels are scaled."""
        return self.has_int8_inputs and self.smoothing is not False
