"""How a launch of paged attention is divided among programs: tile sizes by class of shapes, segments by load."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from apt_kernels.triton.launch import num_processors
from apt_kernels.triton.tuning import Config, tuned

OP = "paged_attention"
MIN_ROWS, MAX_ROWS = 16, 128
"""Of a tile: a matrix product takes 16 at least, and the sums of more than 128 do not fit into registers."""
MAX_DECODE_ROWS = 32
"""Up to here a tile has so little to compute that only reading keys and values takes time."""
DECODE_ROWS_8BIT = 64
"""Of a decode over 8-bit keys and values, most of them empty. From here on a product takes these from shared memory;
below, each thread gathers its values byte by byte, which takes longer than reading them from the cache."""
MAX_SEGMENTS = 64
MIN_SEGMENT = 128
"""Keys; parts smaller than this cost more than they save."""
PROGRAMS_PER_PROCESSOR = 4
"""That keep memory busy in a decode. A program with large tiles fills a processor alone."""
EVEN_SEGMENT = 1024
EVEN_PROGRAMS = 16
"""Per processor. Long contexts of a decode are cut further than it takes to fill the device: with little more than one
program for each place, most of it would wait for the last ones, and with contexts of all lengths for the longest."""
WARP_GROUP_ROWS = 64
SHARED_BYTES = 227 * 1024
"""Of a processor, for all of its programs."""
PLACES_OF_DECODES = 2
"""Programs that a processor should have room for while it reads."""


@dataclass(frozen=True, slots=True)
class Layer:
    """What the kernel sees of a model's layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_dtype: torch.dtype
    cache_dtype: torch.dtype
    window: int | None

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True)
class Load:
    """The sequences that one launch serves, in numbers the host knows."""

    num_tokens: int
    num_seqs: int
    max_seqlen_q: int
    max_context_len: int


@dataclass(frozen=True, slots=True)
class Cut:
    """How a launch is divided among programs."""

    config: Config
    num_tiles: int
    """Bound on the query tiles of all sequences."""
    num_segments: int
    """Parts of every context, a power of two."""
    has_search: bool
    """Whether a sequence may have several tiles, so that a tile must search its sequence."""


def cut_launch(layer: Layer, load: Load, device: torch.device) -> Cut:
    """The best known tiles of the class, and segments where there are too few programs for the device."""
    config = tuned(OP, shape_class(layer, load.max_seqlen_q), device, default_config(layer, load.max_seqlen_q))
    tokens = config.blocks["ROWS"] // layer.group
    has_search = load.max_seqlen_q > tokens
    num_tiles = load.num_tokens // tokens + load.num_seqs if has_search else load.num_seqs

    num_keys = load.max_context_len if layer.window is None else min(load.max_context_len, layer.window + tokens)
    num_places, num_programs = num_processors(device), num_tiles * layer.num_kv_heads
    if _num_rows(layer, load.max_seqlen_q) <= MAX_DECODE_ROWS:
        num_parts = min(num_places * PROGRAMS_PER_PROCESSOR // num_programs, num_keys // MIN_SEGMENT)
        num_parts = max(num_parts, min(num_places * EVEN_PROGRAMS // num_programs, num_keys // EVEN_SEGMENT))
    else:
        num_parts = min(num_places // num_programs, num_keys // MIN_SEGMENT)
    num_parts = min(max(num_parts, 1), MAX_SEGMENTS)
    return Cut(config, num_tiles, 1 << (num_parts.bit_length() - 1), has_search)


def shape_class(layer: Layer, max_seqlen_q: int) -> str:
    """What the best tile sizes depend on: rows of a tile, head size, bits of queries and of keys, and a window."""
    bits = f"q{8 * layer.query_dtype.itemsize}-kv{8 * layer.cache_dtype.itemsize}"
    window = "" if layer.window is None else "-window"
    return f"rows{_num_rows(layer, max_seqlen_q)}-d{layer.head_dim}-{bits}{window}"


def default_config(layer: Layer, max_seqlen_q: int) -> Config:
    """For a class that nobody has measured: without spilled registers, on a Hopper GPU."""
    rows, is_wide = _num_rows(layer, max_seqlen_q), layer.head_dim > 128
    if layer.query_dtype == torch.float32:  # products on ordinary cores: it has to work only
        return Config({"ROWS": _num_rows(layer, 1), "TILE": 16})
    if rows <= MAX_DECODE_ROWS:
        height = DECODE_ROWS_8BIT if layer.cache_dtype.itemsize == 1 else rows
        return Config({"ROWS": height, "TILE": 32 if is_wide else 64}, num_stages=3)
    if is_wide:
        return Config({"ROWS": rows, "TILE": 32}, num_warps=8)
    if layer.window is not None:
        return Config({"ROWS": rows, "TILE": 64}, num_warps=rows // 16)
    return Config({"ROWS": rows, "TILE": rows}, num_warps=rows // 16)


def candidates(layer: Layer, max_seqlen_q: int) -> list[Config]:
    """Worth measuring for a class: what a Hopper GPU has registers and shared memory for, as far as one can tell."""
    rows, is_wide = _num_rows(layer, max_seqlen_q), layer.head_dim > 128
    if rows <= MAX_DECODE_ROWS:
        heights = {rows, DECODE_ROWS_8BIT if layer.cache_dtype.itemsize == 1 else rows}
        shapes = [
            (height, tile, warps)
            for height in sorted(heights)
            for tile in (32, 64, 128)
            for warps in ((2, 4) if height < DECODE_ROWS_8BIT else (4, 8))
            if tile <= 32 * warps
        ]
        shared_bytes = SHARED_BYTES // PLACES_OF_DECODES
    else:
        heights = {rows, max(rows // 2, _num_rows(layer, 1))}
        tiles = (32, 64) if is_wide else (64, 128)
        shapes = [(height, tile, max(height // 16, 4)) for height in sorted(heights) for tile in tiles]
        shared_bytes = SHARED_BYTES
    return [
        Config({"ROWS": height, "TILE": tile}, num_warps, num_stages)
        for height, tile, num_warps in shapes
        for num_stages in (2, 3, 4)
        if _shared_bytes(layer, height, tile, num_stages) <= shared_bytes
    ]


def _shared_bytes(layer: Layer, height: int, tile: int, num_stages: int) -> int:
    """What a program takes, about. Products by warp groups read every operand from there, also the queries."""
    dims = int(triton.next_power_of_2(layer.head_dim))
    tile_bytes = 2 * layer.cache_dtype.itemsize * dims * tile
    if height < WARP_GROUP_ROWS:
        return (num_stages - 1) * tile_bytes
    return num_stages * tile_bytes + height * dims * layer.query_dtype.itemsize


def _num_rows(layer: Layer, max_seqlen_q: int) -> int:
    """Of a tile that holds all queries of a sequence times the heads that share a kv head, as far as they fit."""
    wanted: int = triton.next_power_of_2(max_seqlen_q * layer.group)
    return min(max(wanted, MIN_ROWS), MAX_ROWS)
