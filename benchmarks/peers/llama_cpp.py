"""llama.cpp, built for this machine from the sources that llama-cpp-python carries, and its own benchmark program."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.engine import Variant, Weights
from benchmarks.peers.process import Command, Line
from benchmarks.peers.setup import Setup, SetupError
from benchmarks.peers.workload import MAX_BATCHED_TOKENS, Observed, Sample, Workload

NAME = "llama.cpp"
SOURCES = "llama-cpp-python==0.3.36"
"""The package that carries them."""
_TARGETS = ("llama-batched-bench", "llama-bench", "llama-quantize")
_CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_OPENSSL=OFF",
)
_CONTEXT_STEP = 256
"""llama.cpp rounds each sequence's share of the context up to a multiple of this."""


class LlamaCpp:
    """llama.cpp in one folder: sources, build and converted weights."""

    def __init__(self, folder: Path) -> None:
        self._setup = Setup(NAME, folder)
        self._source = folder / "source" / "vendor" / "llama.cpp"
        self._build = folder / "build"

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Its best kernels for this machine at each size."""
        return (Variant(NAME, "bf16", 16), Variant(NAME, "q8_0", 8), Variant(NAME, "q4_1", 4))

    def install(self) -> None:
        """Download and build."""
        self._setup.once("sources", SOURCES, self._download)
        self._setup.once("build", " ".join((SOURCES, *_CMAKE_OPTIONS, *_TARGETS)), self._compile)

    def convert(self, variant: Variant, weights: Weights) -> None:
        """Convert and quantize with its own tools."""
        wanted = self._gguf(variant, weights)
        if wanted.is_file():
            return
        unquantized = self._converted("bf16", weights)
        if not unquantized.is_file():
            script = str(self._source / "convert_hf_to_gguf.py")
            self._write(unquantized, [sys.executable, script, str(weights.hf_folder), "--outtype=bf16", "--outfile"])
        if not wanted.is_file():
            self._write(wanted, [self._program("llama-quantize"), str(unquantized)], variant.weights)

    def command(self, variant: Variant, weights: Weights, workload: Workload, num_threads: int) -> Command:
        """All repeats in one process, each with every batch in turn."""
        per_sequence = -(-workload.max_len // _CONTEXT_STEP) * _CONTEXT_STEP
        options = {
            "-m": self._gguf(variant, weights),
            "-t": num_threads,
            "-c": per_sequence * max(workload.batches),
            "-b": MAX_BATCHED_TOKENS,
            "-ub": 512,
            "-npp": workload.prompt_len,
            "-ntg": workload.output_len - 1,
            "-npl": ",".join(map(str, workload.batches * workload.repeats)),
            "--output-format": "jsonl",
        }
        arguments = [str(part) for option in options.items() for part in option]
        return Command((self._program("llama-batched-bench"), *arguments))

    def observed(self, lines: Sequence[Line]) -> Observed:
        """llama-batched-bench's report."""
        return parse_batched_bench(lines)

    def _download(self) -> None:
        """Fetch the source distribution and unpack it."""
        downloads, source = self._setup.folder / "downloads", self._setup.folder / "source"
        shutil.rmtree(downloads, ignore_errors=True)
        shutil.rmtree(source, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
        self._setup.run(
            f"downloading the sources ({SOURCES})",
            [*pip, "--no-binary", "llama-cpp-python", "--dest", str(downloads), SOURCES],
        )
        (archive,) = downloads.glob("*.tar.gz")
        with tarfile.open(archive) as files:
            files.extractall(downloads, filter="data")
        next(path for path in downloads.iterdir() if path.is_dir()).rename(source)
        shutil.rmtree(downloads)

    def _compile(self) -> None:
        for tool in ("cmake", "c++"):
            if shutil.which(tool) is None:
                raise SetupError(f"building it needs {tool}, which is not installed")
        self._setup.run("configuring", ["cmake", "-S", str(self._source), "-B", str(self._build), *_CMAKE_OPTIONS])
        jobs = str(len(os.sched_getaffinity(0)))
        self._setup.run("building", ["cmake", "--build", str(self._build), "-j", jobs, "--target", *_TARGETS])

    def _write(self, path: Path, command: Sequence[str], *last: str) -> None:
        """Make a file by a command that takes its name, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.gguf")
        try:
            offline = {"HF_HUB_OFFLINE": "1"}
            self._setup.run(f"converting the weights ({path.name})", [*command, str(temporary), *last], offline)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _gguf(self, variant: Variant, weights: Weights) -> Path:
        """The model's own file where it is of this precision, else a converted one."""
        if weights.gguf is not None and variant.weights in weights.gguf.stem.lower():
            return weights.gguf
        return self._converted(variant.weights, weights)

    def _converted(self, precision: str, weights: Weights) -> Path:
        return self._setup.folder / "models" / weights.name / f"{precision}.gguf"

    def _program(self, name: str) -> str:
        return str(self._build / "bin" / name)


def parse_batched_bench(lines: Sequence[Line]) -> Observed:
    """Results of llama-batched-bench in its jsonl format.

    A prompt's last logits are its first token, so the first line comes one prompt and its decoding after the start.

    Raises:
        ValueError: there are none.
    """
    results = [(line.at_s, json.loads(line.text)) for line in lines if line.text.startswith("{")]
    if not results:
        raise ValueError("llama-batched-bench printed no results")
    at_s, first = results[0]
    return Observed(
        startup_s=at_s - first["t_tg"],
        samples=tuple(Sample(result["pl"], result["t_pp"], result["t_tg"]) for _, result in results),
    )
