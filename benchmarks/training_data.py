"""How fast documents become micro-batches with nothing else to do: python -m benchmarks.training_data CONFIG."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace

from apt_core.config import add_flags, overrides_from
from apt_train.config import RunConfig, read_config
from apt_train.data import DataLoader
from apt_train.model import ModelSource


@dataclass(frozen=True, slots=True)
class DataRate:
    """Of one rank; with N ranks each makes all micro-batches and trains on an N-th."""

    num_tokens: int
    """That count for the loss: no padding."""
    seconds: float
    processor_seconds: float
    """Of all threads."""

    def __str__(self) -> str:
        whole, core = self.num_tokens / self.seconds / 1000, self.num_tokens / self.processor_seconds / 1000
        return f"{self.num_tokens:,} tokens: {whole:,.0f}k tokens/s, {core:,.0f}k tokens/s per busy core"


def measure(config: RunConfig) -> DataRate:
    """One epoch of the data."""
    source = ModelSource(config.model)
    data = replace(config.data, epochs=1)
    loader = DataLoader(data, source.tokenizer, vocab_size=source.config.vocab_size)
    begin, busy = time.perf_counter(), time.process_time()
    num_tokens = sum(batch.num_scored for batch in loader)
    return DataRate(num_tokens, time.perf_counter() - begin, time.process_time() - busy)


def main() -> None:
    """Print the rates. RAYON_NUM_THREADS limits the tokenizer's threads."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("config", help="such as configs/debug.toml")
    add_flags(parser, RunConfig)
    options = parser.parse_args()
    print(measure(read_config(options.config, overrides_from(options, RunConfig))))


if __name__ == "__main__":
    main()
