"""Cache of models whose weights have been quantized and packed: one safetensors file per checkpoint and precision.

An entry holds every weight of the model after all transforms, so that a start that finds one reads it in one go and
leaves the checkpoint's own weights on disk. It is valid while its header and the checksum of its contents are right,
and its checkpoint's files have the size and time of change that it was made from.

Only models with int8 or int4 weights are kept: packing others takes little longer than reading them would, and their
copy would be as large as the checkpoint. Entries are read into anonymous memory rather than mapped: reading and
checking 100 MB takes 40 ms, and weights stream faster from huge pages, which mapped files do not have.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import mmap
import zlib
from collections.abc import Iterator
from io import FileIO
from typing import Any

import torch
from torch import nn

from apt_core.checkpoint.cache_file import (
    Header,
    StoredTensor,
    header_bytes,
    identity,
    read_header,
    replacing,
)
from apt_core.checkpoint.checkpoint import Checkpoint
from apt_core.layers.linear import PackedLinear
from apt_core.models.decoder import DecoderForCausalLM, fuse_projections
from apt_core.quantization import QUANTIZATION_VERSION, WeightPrecision
from apt_core.registry import build_model
from apt_kernels import ops
from apt_kernels.cache import cache_folder

log = logging.getLogger(__name__)

_FORMAT = "1"
"""Raised whenever a file of this kind would be laid out in another way."""
_CHUNK_BYTES = 1 << 24
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "U8": torch.uint8}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_FORMATS: dict[str, Any] = {kind.__name__: kind for kind in ops.PORTABLE_FORMATS}


class PackedCache:
    """The packed form of one checkpoint: where it lies, and what it must have been made from."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        precision: WeightPrecision | None,
        head_precision: WeightPrecision | None,
    ) -> None:
        """Make one before the checkpoint's weights are read, so that a file that changes meanwhile is noticed.

        Args:
            dtype: of the parameters that are not packed.
            precision, head_precision: as ``pack_linears`` takes them.
        """
        self._config = checkpoint.config
        source = checkpoint.path.resolve()
        settings = [str(dtype), precision, head_precision]
        place = hashlib.sha256(json.dumps([str(source), settings]).encode()).hexdigest()[:16]
        name = f"{source.name.removesuffix('.gguf')}-{precision or 'auto'}-{place}.v{_FORMAT}.safetensors"
        self.path = cache_folder() / "packed" / name
        """One file per checkpoint and settings: a changed checkpoint replaces its own."""
        files = [file.path for file in checkpoint.weight_files]
        files += [path for path in [checkpoint.path / "config.json"] if path.exists()]
        self._made_from = json.dumps(
            {
                "files": [identity(path) for path in files],
                "settings": settings,
                "quantization": QUANTIZATION_VERSION,
                "layout": ops.PACKED_LAYOUT_VERSION,
            }
        )

    def read(self) -> DecoderForCausalLM | None:
        """The model, fused and packed, or None where there is no entry, or a stale or damaged one."""
        try:
            with self.path.open("rb", buffering=0) as file:
                header = read_header(file)
                if header.metadata["made_from"] != self._made_from:
                    log.info("%s was made from other files or by another version; it is made anew", self.path)
                    return None
                return self._model(header, _read_tensors(file, header))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, LookupError, AttributeError) as error:
            log.warning("%s cannot be used (%s); it is made anew", self.path, error)
            return None

    def write(self, model: DecoderForCausalLM) -> None:
        """Keep a fused and packed model, if it has quantized weights. A cache that cannot be written costs speed only.

        Concurrent writers each replace the other's equal file.
        """
        linears = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
        if not _is_worth_keeping(linears):
            return
        tensors = dict(_tensors(model, linears))
        # What the products stream comes first: its sizes are multiples of a cache line, so all of it is aligned.
        tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].dtype != torch.uint8, -item[1].itemsize)))
        checksum = 0
        for tensor in tensors.values():
            checksum = zlib.crc32(_bytes(tensor), checksum)
        metadata = {
            "made_from": self._made_from,
            "linears": json.dumps({name: _spelled(linear) for name, linear in linears.items()}),
            "crc32": str(checksum),
        }
        header = Header(metadata, {name: StoredTensor(_DTYPE_NAMES[x.dtype], x.shape) for name, x in tensors.items()})
        try:
            with replacing(self.path) as file:
                file.write(header_bytes(header))
                for tensor in tensors.values():
                    file.write(_bytes(tensor))
        except OSError as error:
            log.warning(
                "the packed weights cannot be kept for the next start in %s (%s); $APT_CACHE names another folder",
                self.path.parent,
                error.strerror or error,
            )

    def _model(self, header: Header, tensors: dict[str, torch.Tensor]) -> DecoderForCausalLM:
        model = build_model(self._config)
        model.eval().requires_grad_(False)
        fuse_projections(model)
        for name, spelled in json.loads(header.metadata["linears"]).items():
            _replace(model, name, _linear(name, spelled, tensors))
        for name, parameter in list(model.named_parameters()):
            if parameter.shape != tensors[name].shape:
                raise ValueError(f"{name} has shape {list(tensors[name].shape)}")
            _replace(model, name, nn.Parameter(tensors[name], requires_grad=False))
        return model


def _is_worth_keeping(linears: dict[str, PackedLinear]) -> bool:
    kinds = {type(linear.weight) for linear in linears.values()}
    return kinds <= set(ops.PORTABLE_FORMATS) and bool(kinds & set(ops.QUANTIZED_FORMATS))


def _tensors(model: DecoderForCausalLM, linears: dict[str, PackedLinear]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, linear in linears.items():
        for field, value in _fields(linear.weight).items():
            if isinstance(value, torch.Tensor):
                yield f"{name}.weight.{field}", value
        if linear.bias is not None:
            yield f"{name}.bias", linear.bias
    for name, parameter in model.named_parameters():
        yield name, parameter.detach()


def _spelled(linear: PackedLinear) -> dict[str, Any]:
    """A linear layer without its tensors."""
    sizes = {field: value for field, value in _fields(linear.weight).items() if isinstance(value, int)}
    out_dtype = None if linear.out_dtype is None else _DTYPE_NAMES[linear.out_dtype]
    return {"format": type(linear.weight).__name__, "sizes": sizes, "out_dtype": out_dtype}


def _linear(name: str, spelled: dict[str, Any], tensors: dict[str, torch.Tensor]) -> PackedLinear:
    kind = _FORMATS[spelled["format"]]
    names = [field.name for field in dataclasses.fields(kind)]
    data = {field: tensors[f"{name}.weight.{field}"] for field in names if field not in spelled["sizes"]}
    out_dtype = None if spelled["out_dtype"] is None else _DTYPES[spelled["out_dtype"]]
    return PackedLinear(kind(**data, **spelled["sizes"]), tensors.get(f"{name}.bias"), out_dtype)


def _fields(weight: Any) -> dict[str, Any]:
    return {field.name: getattr(weight, field.name) for field in dataclasses.fields(weight)}


def _replace(model: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, value)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data


def _read_tensors(file: FileIO, header: Header) -> dict[str, torch.Tensor]:
    """Every tensor, in memory of huge pages where the system has them.

    Raises:
        ValueError: the contents are not what was written.
    """
    memory = mmap.mmap(-1, header.num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    checksum = 0
    with memoryview(memory) as view:
        for begin in range(0, len(view), _CHUNK_BYTES):
            with view[begin : begin + _CHUNK_BYTES] as chunk:
                if file.readinto(chunk) != len(chunk):
                    raise ValueError("it is cut off")
                checksum = zlib.crc32(chunk, checksum)
    if str(checksum) != header.metadata["crc32"]:
        raise ValueError("its contents have changed")
    tensors, offset = {}, 0
    for name, tensor in header.tensors.items():
        count = tensor.num_bytes // _DTYPES[tensor.dtype].itemsize
        flat = torch.frombuffer(memory, dtype=_DTYPES[tensor.dtype], count=count, offset=offset)
        tensors[name] = flat.view(tensor.shape)
        offset += tensor.num_bytes
    return tensors
