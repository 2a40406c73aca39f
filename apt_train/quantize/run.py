"""From a checkpoint to a quantized one, layer by layer.

Each layer is calibrated on what the quantized layers before it compute, so that it can make up for a part of their
errors. In memory are one layer in float32, the hidden states of the calibration windows, and what waits to be written.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from apt_core.checkpoint import Checkpoint, load_into, open_checkpoint
from apt_core.checkpoint.documents import folder_documents
from apt_core.checkpoint.folder_writer import FolderWriter, check_new, new_folder
from apt_core.checkpoint.formats.compressed_tensors_writer import WritableWeight, quantization_config, stored_parts
from apt_core.errors import ConfigError
from apt_core.models.channels import Junction, junctions
from apt_core.models.decoder import DecoderForCausalLM, DecoderLayer
from apt_core.perplexity import measure
from apt_core.registry import build_model
from apt_train.quantize.gptq import gptq
from apt_train.quantize.layers import LayerSource, Stream
from apt_train.quantize.report import NAME, LayerError, Quality, QuantizationReport, Size
from apt_train.quantize.rounding import Rounder
from apt_train.quantize.settings import QuantizeSettings
from apt_train.quantize.simulate import SimulatedLinear, simulate
from apt_train.quantize.smooth import output_error, smooth
from apt_train.quantize.statistics import InputStatistics, recorded
from apt_train.quantize.text import calibration_windows, evaluation_windows


def quantize(
    source: str, output: str, settings: QuantizeSettings, on_layer: Callable[[int, int], None] | None = None
) -> QuantizationReport:
    """Write a quantized checkpoint, and its report beside it (quantization_report.json and .md).

    The same settings give the same bytes. The folder appears whole or not at all.

    Args:
        source: a Hugging Face folder, a .gguf file, a hub id, or the embedded model's name.
        output: folder to write; it must not exist, or be empty.
        settings: how.
        on_layer: told after each layer how many are done, and of how many.

    Raises:
        ConfigError: a setting that cannot work; names it.
        CheckpointError: the source is missing, damaged or not supported.
    """
    folder_path = Path(output).expanduser()
    check_new(folder_path, field="output")
    checkpoint = open_checkpoint(source)
    if checkpoint.is_quantized:
        raise ConfigError(f"{source} is quantized already", field="source")
    _check(checkpoint, settings)
    calibration = calibration_windows(checkpoint.tokenizer, settings.calibration)
    evaluation = evaluation_windows(checkpoint.tokenizer, settings.evaluation)
    with new_folder(folder_path, field="output") as folder:
        size, errors = _Quantizer(checkpoint, settings, folder, on_layer).write(calibration)
        quality = _compare(checkpoint, open_checkpoint(str(folder.folder)), evaluation)
        report = QuantizationReport(source, settings, size, quality, tuple(errors))
        folder.document(f"{NAME}.json", report.to_json())
        folder.document(f"{NAME}.md", report.to_markdown())
    return report


def _check(checkpoint: Checkpoint, settings: QuantizeSettings) -> None:
    config = checkpoint.config
    inputs = {config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim}
    wrong = sorted(size for size in inputs if size % settings.group_size)
    if settings.scheme == "w4a16" and wrong:
        problem = f"{settings.group_size} does not divide the {wrong[0]} inputs of some layers"
        raise ConfigError(problem, field="group_size")
    for name, text in (("calibration", settings.calibration), ("evaluation", settings.evaluation)):
        if text.length > config.max_position_embeddings:
            problem = f"the model has {config.max_position_embeddings} positions, fewer than {text.length}"
            raise ConfigError(problem, field=f"{name}.length")


class _Quantizer:
    """Writes tensors in the order of the layers, and adds up what they take."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: QuantizeSettings,
        folder: FolderWriter,
        on_layer: Callable[[int, int], None] | None,
    ) -> None:
        self._checkpoint, self._settings, self._folder, self._on_layer = checkpoint, settings, folder, on_layer
        self._dtype: torch.dtype = getattr(torch, settings.dtype)
        self._rounder = Rounder(settings.scheme, settings.group_size)
        self._size = Size(0, 0, 0, 0)
        self._errors: list[LayerError] = []

    def write(self, windows: list[torch.Tensor]) -> tuple[Size, list[LayerError]]:
        """Everything but the report."""
        source, config = LayerSource(self._checkpoint), self._checkpoint.config
        embedding = source.get("model.embed_tokens.weight")
        stream = Stream(config, embedding, windows)
        self._keep("model.embed_tokens.weight", embedding)
        del embedding
        example: WritableWeight | None = None
        for index in range(config.num_layers):
            layer = source.layer(index)
            stored = self._quantize_layer(layer, stream, f"model.layers.{index}.")
            example = next(iter(stored.values()))
            self._write_layer(layer, stored, f"model.layers.{index}.")
            stream.advance(layer)
            if self._on_layer is not None:
                self._on_layer(index + 1, config.num_layers)
        self._keep("model.norm.weight", source.get("model.norm.weight"))
        if not config.tie_word_embeddings:
            self._keep("lm_head.weight", source.get("lm_head.weight"))
        assert example is not None
        self._write_documents(example)
        self._folder.close()
        return self._size, self._errors

    def _quantize_layer(self, layer: DecoderLayer, stream: Stream, prefix: str) -> dict[str, WritableWeight]:
        """The stored weights of a layer, by their names within it."""
        found = junctions(layer)
        stored: dict[str, WritableWeight] = {}
        with recorded(found, len(stream.hidden), has_hessian=self._settings.uses_gptq) as statistics:
            stream.look(layer)
        strengths = [0.0] * len(found)
        if self._settings.uses_smoothing:
            strengths = [
                smooth(junction, seen, self._rounder, self._dtype)
                for junction, seen in zip(found, statistics, strict=True)
            ]
        for junction, seen, strength in zip(found, statistics, strengths, strict=True):
            weights = self._quantize_readers(junction, seen)
            stored |= weights
            for name, weight in weights.items():
                self._errors.append(_layer_error(f"{prefix}{name}", junction, seen, weight, strength))
        return stored

    def _quantize_readers(self, junction: Junction, seen: InputStatistics) -> dict[str, WritableWeight]:
        readers = junction.readers
        if seen.hessian is None:
            return {name: self._rounder.nearest(reader.weight, seen.largest) for name, reader in readers.items()}
        together = torch.cat([reader.weight for reader in readers.values()])
        codes, scales = gptq(together, seen.hessian, self._rounder, self._settings.gptq)
        parts: dict[str, WritableWeight] = {}
        first = 0
        for name, reader in readers.items():
            rows = slice(first, first + reader.out_features)
            parts[name] = self._rounder.stored(codes[rows], scales[rows], seen.largest)
            first = rows.stop
        return parts

    def _write_layer(self, layer: DecoderLayer, stored: dict[str, WritableWeight], prefix: str) -> None:
        """Write a layer, and make it what was written."""
        for name, parameter in list(layer.named_parameters()):
            module, _, kind = name.rpartition(".")
            if module not in stored or kind != "weight":
                self._keep(f"{prefix}{name}", parameter.data)
                parameter.data = parameter.data.to(self._dtype).float()
                continue
            for part, tensor in stored_parts(stored[module]).items():
                self._folder.add(f"{prefix}{module}.{part}", tensor)
                self._count(linears=tensor.nbytes, total=tensor.nbytes)
            self._count(linears_bfloat16=2 * parameter.numel(), total_bfloat16=2 * parameter.numel())
        for module, weight in stored.items():
            linear = layer.get_submodule(module)
            assert isinstance(linear, torch.nn.Linear)
            layer.set_submodule(module, SimulatedLinear(weight, linear.bias))

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        """Write what is not quantized."""
        kept = tensor.to(self._dtype)
        self._folder.add(name, kept)
        self._count(total=kept.nbytes, total_bfloat16=2 * kept.numel())

    def _count(self, **more: int) -> None:
        self._size = replace(self._size, **{name: getattr(self._size, name) + n for name, n in more.items()})

    def _write_documents(self, example: WritableWeight) -> None:
        documents = folder_documents(self._checkpoint, self._dtype)
        config = json.loads(documents["config.json"]) | {"quantization_config": quantization_config(example)}
        for name, text in (documents | {"config.json": json.dumps(config, indent=1)}).items():
            self._folder.document(name, text)


def _layer_error(
    name: str, junction: Junction, seen: InputStatistics, weight: WritableWeight, strength: float
) -> LayerError:
    reader = next(reader for own_name, reader in junction.readers.items() if name.endswith(own_name))
    change = (weight.dequantize() - reader.weight).norm().item()
    return LayerError(
        name=name,
        weight_error=change / (reader.weight.norm().item() or 1.0),
        output_error=output_error(seen.samples, weight, seen.samples @ reader.weight.T),
        smoothing=strength,
    )


def _compare(source: Checkpoint, written: Checkpoint, windows: list[torch.Tensor]) -> Quality:
    """The written folder is read back as a server reads it."""
    exact = measure(_load(source), windows)
    found = measure(_load(written), windows)
    return Quality(
        num_tokens=len(exact.choices),
        perplexity_source=exact.perplexity,
        perplexity=found.perplexity,
        increase=found.over(exact),
        greedy_agreement=found.agreement(exact),
    )


def _load(checkpoint: Checkpoint) -> DecoderForCausalLM:
    model = build_model(checkpoint.config)
    keeps_quantized = checkpoint.is_quantized
    load_into(model, checkpoint, dtype=torch.float32, device=torch.device("cpu"), keeps_quantized=keeps_quantized)
    simulate(model)
    return model.eval().requires_grad_(False)
