"""What quantizing a checkpoint cost and saved, as it is written beside the result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from apt_train.quantize.settings import QuantizeSettings

NAME = "quantization_report"


@dataclass(frozen=True)
class LayerError:
    """Of one linear layer, on inputs that come from layers that are quantized already."""

    name: str
    weight_error: float
    """Norm of the change of the weights over that of the weights, both after smoothing."""
    output_error: float
    """Of a token's output, relative, root mean square over tokens of the calibration; inputs rounded as servers do."""
    smoothing: float
    """SmoothQuant's strength; 0 where channels are as they were."""


@dataclass(frozen=True)
class Size:
    """Bytes of tensors."""

    linears: int
    """Of the quantized layers, scales included."""
    linears_bfloat16: int
    """Of the same layers in bfloat16."""
    total: int
    """Of all tensors."""
    total_bfloat16: int

    @property
    def linears_ratio(self) -> float:
        """Of what the layers take in bfloat16."""
        return self.linears / self.linears_bfloat16

    @property
    def total_ratio(self) -> float:
        """Of what the whole takes in bfloat16."""
        return self.total / self.total_bfloat16


@dataclass(frozen=True)
class Quality:
    """The written checkpoint against its source, both computed in float32, inputs rounded as a server rounds them."""

    num_tokens: int
    """That were predicted."""
    perplexity_source: float
    perplexity: float
    increase: float
    """perplexity / perplexity_source - 1."""
    greedy_agreement: float
    """Share of the tokens for which both choose the same."""


@dataclass(frozen=True)
class QuantizationReport:
    """All of it."""

    source: str
    settings: QuantizeSettings
    size: Size
    quality: Quality
    layers: tuple[LayerError, ...]

    def to_json(self) -> str:
        """As a document."""
        document: dict[str, Any] = asdict(self)
        document["size"] |= {"linears_ratio": self.size.linears_ratio, "total_ratio": self.size.total_ratio}
        return json.dumps(document, indent=1) + "\n"

    def summary(self) -> list[tuple[str, str]]:
        """What matters most: names and values."""
        size, quality = self.size, self.quality
        return [
            ("linear layers", f"{size.linears:,} bytes, {size.linears_ratio:.3f} of bfloat16"),
            ("all tensors", f"{size.total:,} bytes, {size.total_ratio:.3f} of bfloat16"),
            ("perplexity of the source", f"{quality.perplexity_source:.3f}"),
            ("perplexity", f"{quality.perplexity:.3f} ({quality.increase:+.2%})"),
            ("greedy agreement", f"{quality.greedy_agreement:.1%} of {quality.num_tokens:,} tokens"),
        ]

    def to_markdown(self) -> str:
        """For readers."""
        layers = [
            (error.name, f"{error.weight_error:.4f}", f"{error.output_error:.4f}", f"{error.smoothing:g}")
            for error in self.layers
        ]
        method = "GPTQ" if self.settings.uses_gptq else "round to nearest"
        return "\n".join(
            [
                f"# {self.source} in {self.settings.scheme}, {method}\n",
                *_table(("", ""), self.summary()),
                "\n## Layers\n\nRelative errors; outputs as a server computes them, on tokens of the calibration.\n",
                *_table(("layer", "weight error", "output error", "smoothing"), layers),
                "",
            ]
        )


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = [header, ("---",) * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
