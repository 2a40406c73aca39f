"""`python -m benchmarks.serve.handover`: what streams notice when weights are published while they run.

Streams run without a pause, one request after the other. First nothing else happens, then versions are published one by
one. A gap is the time between two tokens of one stream.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles

import aiohttp
import torch
from safetensors.torch import load_file, save_file

from apt_core.checkpoint import exported, locate
from apt_train.publish import TOKEN_VARIABLE, PublishSettings, publish
from benchmarks.machine import describe
from benchmarks.serve.launch import server
from benchmarks.table import print_table

VOCAB_SIZE = 49152


@dataclass(slots=True)
class Observed:
    """What the streams of one phase saw."""

    gaps_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_requests: int = 0
    """That ended as they should."""
    lost: list[str] = field(default_factory=list)
    """Why others did not."""
    num_mixed: int = 0
    """With tokens of two versions."""
    versions: set[str] = field(default_factory=set)
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Load:
    """What runs all the time."""

    url: str
    num_streams: int
    prompt_len: int
    output_len: int


def main() -> None:
    """Measure and print."""
    args = _parse()
    os.environ[TOKEN_VARIABLE] = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder:
        folders = _versions(Path(folder), args.source, args.versions)
        flags = [str(folders[0]), "--model.name=model", f"--admin.weight_folders={folder}"]
        flags += [f"--model.dtype={args.dtype}", f"--model.weight_precision={args.precision}"]
        with server("uvicorn", flags) as url:
            load = Load(url, args.streams, args.prompt_len, args.output_len)
            asyncio.run(_under_load(load, Observed(), asyncio.sleep(2)))
            before = Observed()
            asyncio.run(_under_load(load, before, asyncio.sleep(args.seconds)))
            during = Observed()
            lines: list[str] = []
            asyncio.run(_under_load(load, during, asyncio.to_thread(_publish_all, url, folders[1:], args.pause, lines)))
    print(describe())
    print(f"model     {args.source}, {args.dtype}, weights {args.precision}, {args.versions} versions published")
    print(f"shapes    {args.streams} streams, prompt {args.prompt_len}, output {args.output_len}\n")
    rows = [("undisturbed", *_cells(before)), ("versions published", *_cells(during))]
    heads = ("", "s", "requests", "lost", "mixed", "versions", "tok/s", "gap p50 ms", "p99", "p99.9", "longest")
    print_table(heads, rows)
    print("\n" + "\n".join(lines))
    for reason in dict.fromkeys(during.lost):
        print(f"lost: {reason}")


def _versions(folder: Path, source: str, count: int) -> list[Path]:
    """The model, and as many copies with slightly other weights."""
    base = exported(locate(source), torch.bfloat16, folder)
    tensors = load_file(base / "model.safetensors")
    folders = [base]
    for step in range(1, count + 1):
        copy = shutil.copytree(base, folder / f"step-{step}")
        changed = {name: tensor * (1 + 0.002 * step) for name, tensor in tensors.items()}
        save_file(changed, copy / "model.safetensors", metadata={"format": "pt"})
        publish(PublishSettings(str(copy), step=step), print)
        folders.append(copy)
    return folders


def _publish_all(url: str, folders: list[Path], pause_s: float, lines: list[str]) -> None:
    for folder in folders:
        time.sleep(pause_s)
        said: list[str] = []
        # The manifest with its probe is there: what is computed here would slow the server down.
        publish(PublishSettings(str(folder), server=url, probe=False), said.append)
        lines.append(f"{folder.name}: {said[-1]}")
    time.sleep(pause_s)


async def _under_load(load: Load, observed: Observed, what: asyncio.Future[None] | object) -> None:
    """Run the streams until something is over, and let them finish then."""
    is_over = asyncio.Event()
    began = time.perf_counter()
    timeout, connector = aiohttp.ClientTimeout(total=None), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(load.url, timeout=timeout, connector=connector) as session:
        streams = [asyncio.create_task(_stream(session, load, observed, is_over, i)) for i in range(load.num_streams)]
        await what  # type: ignore[misc]
        is_over.set()
        await asyncio.gather(*streams)
    observed.seconds = time.perf_counter() - began


async def _stream(session: aiohttp.ClientSession, load: Load, seen: Observed, is_over: asyncio.Event, i: int) -> None:
    rng = random.Random(f"{i} {time.time_ns()}")
    while not is_over.is_set():
        body = {
            "prompt": [rng.randrange(VOCAB_SIZE) for _ in range(load.prompt_len)],
            "max_tokens": load.output_len,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        num_tokens, versions, last, is_done = 0, set(), 0.0, False
        async with session.post("/v1/completions", json=body) as response:
            async for line in response.content:
                is_done |= line.startswith(b"data: [DONE]")
                if not line.startswith(b'data: {"id"'):
                    continue
                chunk, now = json.loads(line[6:]), time.perf_counter()
                versions.add(chunk["weight_version"])
                if last:
                    seen.gaps_s.append(now - last)
                last = now
                num_tokens += sum(len(choice["token_ids"]) for choice in chunk["choices"])
            if not is_done or num_tokens != load.output_len:
                seen.lost.append(f"{response.status} after {num_tokens} tokens")
        seen.num_requests += is_done
        seen.num_mixed += len(versions) > 1
        seen.versions |= versions
        seen.num_tokens += num_tokens


def _cells(observed: Observed) -> Iterable[str]:
    cuts = quantiles(observed.gaps_s, n=1000)
    return (
        f"{observed.seconds:.1f}",
        f"{observed.num_requests}",
        f"{len(observed.lost)}",
        f"{observed.num_mixed}",
        f"{len(observed.versions)}",
        f"{observed.num_tokens / observed.seconds:.1f}",
        *(f"{gap * 1000:.1f}" for gap in (cuts[499], cuts[989], cuts[998], max(observed.gaps_s))),
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve.handover", description=__doc__)
    parser.add_argument("--source", default="smollm2-135m-instruct", help="the embedded model, or a .gguf file")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16", "int8", "int4"])
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--versions", type=int, default=3)
    parser.add_argument("--prompt-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=30.0, help="of the undisturbed phase")
    parser.add_argument("--pause", type=float, default=3.0, help="seconds before, between and after publications")
    return parser.parse_args()


if __name__ == "__main__":
    main()
