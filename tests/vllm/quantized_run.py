"""A program for tests: greedy tokens of vLLM on folders, one after the other, without anything of APT.

Its arguments are JSON, {"folders": dtypes by folder, "prompts": token ids, "max_tokens"}, and the file for its answer:
by folder, a list of tokens for each prompt.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any


def generate(folder: str, dtype: str, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Start, answer, and leave nothing behind."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(folder, dtype=dtype, enforce_eager=True, max_model_len=64, max_num_seqs=4, enable_prefix_caching=False)
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    inputs: list[Any] = [{"prompt_token_ids": ids} for ids in prompts]
    tokens = [list(answer.outputs[0].token_ids) for answer in llm.generate(inputs, sampling, use_tqdm=False)]
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return tokens


def main() -> None:
    task = json.loads(sys.argv[1])
    prompts, max_tokens = task["prompts"], task["max_tokens"]
    answers = {folder: generate(folder, dtype, prompts, max_tokens) for folder, dtype in task["folders"].items()}
    Path(sys.argv[2]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
