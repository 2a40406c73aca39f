"""A program for tests: greedy tokens of vLLM with APT's settings, and whose attention computed them.

Its arguments are JSON, {"settings": of EngineConfig, "prompts": token ids, "max_tokens"}, and the file for its answer.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from apt_serve.engine.config import EngineConfig
from apt_serve.engine.vllm.settings import engine_args, environment, model_folder


def count_calls(worker: Any) -> list[str]:
    """In a worker: from now on count the calls of APT's op; returns whose classes its layers' attention is of."""
    from apt_kernels import ops

    attend = ops.paged_attention

    def counted(*args: Any, **kwargs: Any) -> Any:
        worker.num_apt_calls += 1
        return attend(*args, **kwargs)

    worker.num_apt_calls = 0
    ops.paged_attention = counted
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    return sorted({f"{type(layer.impl).__module__}.{type(layer.impl).__name__}" for layer in layers})


def calls(worker: Any) -> int:
    """In a worker: how many there were."""
    count: int = worker.num_apt_calls
    return count


def main() -> None:
    task = json.loads(sys.argv[1])
    config = EngineConfig(engine="vllm", **task["settings"])
    os.environ.update(environment(config), VLLM_ALLOW_INSECURE_SERIALIZATION="1")  # functions to the worker
    from vllm import LLM, SamplingParams

    llm = LLM(**engine_args(config, model_folder(config), is_cpu=True))
    [classes] = llm.collective_rpc(count_calls)
    sampling = SamplingParams(temperature=0, max_tokens=task["max_tokens"], logprobs=2, detokenize=False)
    prompts: list[Any] = [{"prompt_token_ids": ids} for ids in task["prompts"]]
    outputs = [output.outputs[0] for output in llm.generate(prompts, sampling, use_tqdm=False)]
    margins = []
    for output in outputs:
        tops = [sorted((p.logprob for p in step.values()), reverse=True) for step in output.logprobs or []]
        margins.append([top[0] - top[1] for top in tops])
    [num_calls] = llm.collective_rpc(calls)
    tokens = [list(output.token_ids) for output in outputs]
    answer = {"tokens": tokens, "margins": margins, "classes": classes, "num_calls": num_calls}
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
