"""A checkpoint's model as a folder in Hugging Face layout, which servers load."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed

from apt_core.checkpoint.documents import folder_documents
from apt_core.checkpoint.folder_writer import check_new, new_folder
from apt_core.config import parse
from apt_core.errors import CheckpointError
from apt_core.model_config import GenerationConfig, ModelConfig
from apt_train.checkpoint.manifest import Manifest
from apt_train.checkpoint.store import SETTINGS, own_faults
from apt_train.config import RunConfig
from apt_train.lora import merged_state
from apt_train.loss import ModelWithLoss
from apt_train.model import ModelSource
from apt_train.state import ModelState

ExportDtype = Literal["float32", "bfloat16", "float16"]

_MODEL_TYPES = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}
"""The architectures that `apt_train.model.new_config` makes."""


def export(checkpoint: Path, out: Path, *, dtype: ExportDtype = "float32", replaces: bool = False) -> None:
    """Write a checkpoint's model; the folder appears whole or not at all.

    One process does it, whichever number of ranks wrote the checkpoint. Adapters are added to the weights they adapt.

    Args:
        checkpoint: a folder ``step-...`` of a run.
        replaces: whether what stands at ``out`` makes way.

    Raises:
        CheckpointError: the checkpoint is damaged or missing; names the file.
        ConfigError: ``out`` holds something, or cannot be written.
    """
    if not replaces:
        check_new(out, field="out")
    Manifest.read(checkpoint).check(checkpoint)
    config = parse(RunConfig, json.loads((checkpoint / SETTINGS).read_text(encoding="utf-8")))
    source = ModelSource(config.model)
    kept = torch.float64 if config.run.precision == "float64" else torch.float32
    model = source.build(config.lora, dtype=kept, device=torch.device("cpu"), seed=config.run.seed)
    _load(ModelState(ModelWithLoss(model)), checkpoint)
    wanted: torch.dtype = getattr(torch, dtype)
    documents = folder_documents(source.checkpoint, wanted)
    if config.model.source is None:
        own = _model_document(source.config, source.checkpoint.generation, dtype)
        documents["config.json"] = json.dumps(own, indent=1)
    weights = {name: weight.to(wanted) for name, weight in merged_state(model).items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        made = Path(temporary) / out.name
        with new_folder(made, field="out") as folder:
            for name, text in documents.items():
                folder.document(name, text)
            for name, weight in weights.items():
                folder.add(name, weight)
        if out.exists():
            out.rename(Path(temporary) / "before") if replaces else out.rmdir()
        made.rename(out)


def _load(model: ModelState, checkpoint: Path) -> None:
    weights = {"model": model.state_dict()}
    try:
        with own_faults():
            load_distributed(weights, storage_reader=FileSystemReader(checkpoint), no_dist=True)
    except (RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(f"its model cannot be read: {error}", file=checkpoint) from error
    model.load_state_dict(weights["model"])


def _model_document(config: ModelConfig, generation: GenerationConfig, dtype: str) -> dict[str, Any]:
    """config.json of a new model, which `apt_core.checkpoint.hf_config.parse_model_config` reads back as it was."""
    return {
        "architectures": [config.architecture],
        "model_type": _MODEL_TYPES[config.architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": False,
        "bos_token_id": generation.bos_token_id,
        "eos_token_id": list(generation.eos_token_ids),
        "torch_dtype": dtype,
    }
