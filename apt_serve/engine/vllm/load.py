"""From settings to a running vLLM with a model."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apt_core.checkpoint.hf_config import parse_generation_config
from apt_core.document import read_document, read_optional_document
from apt_core.errors import AptError, ConfigError
from apt_core.manifest import version_of
from apt_core.tokenizer import build_tokenizer, read_tokenizer_files
from apt_serve.engine.client import GenerationRequest, ModelInfo
from apt_serve.engine.config import EngineConfig
from apt_serve.engine.output_processor import OutputProcessor
from apt_serve.engine.requests import make_sequences
from apt_serve.engine.sampling_params import SamplingParams
from apt_serve.engine.sequence import Sequence
from apt_serve.engine.vllm.recorder import VllmRecorder
from apt_serve.engine.vllm.settings import (
    OWN_SPIN_COUNT,
    check_device,
    check_vllm_args,
    engine_args,
    environment,
    model_folder,
)
from apt_serve.engine.vllm.translation import sampling_arguments

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

log = logging.getLogger(__name__)

SHUTDOWN_S = 3.0
"""vLLM's processes are killed if they have not ended by themselves after this long."""


class EngineStartError(AptError):
    """vLLM could not be started."""


@dataclass(frozen=True)
class LoadedVllm:
    """vLLM with a model, ready to generate."""

    llm: AsyncLLM
    info: ModelInfo
    outputs: OutputProcessor
    """Makes text of its tokens and finds stop strings."""
    num_kv_blocks: int
    uses_priority: bool

    def request(self, seq: Sequence) -> AsyncGenerator[RequestOutput, None]:
        """Deltas of one choice from vLLM; closing it aborts."""
        from vllm import SamplingParams as VllmSamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        arguments = sampling_arguments(seq, self.info.eos_token_ids)
        deltas: AsyncGenerator[RequestOutput, None] = self.llm.generate(
            tokens_input(list(seq.token_ids), cache_salt="".join(seq.extra_keys) or None),
            VllmSamplingParams(**arguments, output_kind=RequestOutputKind.DELTA),
            request_id=seq.seq_id,
            priority=seq.priority if self.uses_priority else 0,
        )
        return deltas

    async def warm_up(self) -> None:
        """Let vLLM compile what it would compile at the first requests that need it: 20 s on a processor.

        That is random sampling and log-probabilities, anew for batches of one and of two, and then once for all others.

        Raises:
            EngineStartError: vLLM did not survive it.
        """
        sampling = SamplingParams(max_tokens=2, logprobs=1, prompt_logprobs=1)
        try:
            for n in (1, 2, 3):
                request = GenerationRequest("warm-up", (0, 0), replace(sampling, n=n))
                await asyncio.gather(*(self._finish(seq) for seq in make_sequences(request, self.info, -n)))
        except Exception as error:  # what cannot be warmed up may still serve other requests
            if self.llm.errored:
                raise EngineStartError("vLLM died at its first request; its log says why") from error
            log.warning("vLLM failed at a first request", exc_info=True)

    def close(self) -> None:
        """Stop vLLM's processes, whatever they are doing. It takes a while: not on the event loop."""
        if self.llm.output_handler is not None:  # else it logs that the engine has died
            self.llm.output_handler.get_loop().call_soon_threadsafe(self.llm.output_handler.cancel)
        self.llm.shutdown(timeout=SHUTDOWN_S)

    async def _finish(self, seq: Sequence) -> None:
        async for _ in self.request(seq):
            pass


def load(config: EngineConfig, recorder: VllmRecorder) -> LoadedVllm:
    """Start vLLM. It takes a while: not on the event loop.

    Raises:
        CheckpointError: the checkpoint is damaged, or cannot be had.
        ConfigError: a setting that does not go with vLLM, the checkpoint or the machine.
        EngineStartError: vLLM failed.
    """
    started = time.perf_counter()
    os.environ.update(environment(config))
    if os.environ.get("GOMP_SPINCOUNT") == OWN_SPIN_COUNT:  # vLLM's threads are to wait as they do without APT
        del os.environ["GOMP_SPINCOUNT"]
    folder = model_folder(config)
    vllm_config = _vllm_config(config, folder)
    info = _model_info(config, folder, vllm_config)
    llm = _start(vllm_config, recorder)
    num_kv_blocks = vllm_config.cache_config.num_gpu_blocks or 0
    log.info(
        "%s ready in %.1f s on vLLM: %s, %d KV blocks of %d tokens, contexts up to %d",
        info.name,
        time.perf_counter() - started,
        str(vllm_config.model_config.dtype).removeprefix("torch."),
        num_kv_blocks,
        vllm_config.cache_config.block_size,
        info.max_model_len,
    )
    outputs = OutputProcessor(info.tokenizer, info.eos_token_ids)
    return LoadedVllm(llm, info, outputs, num_kv_blocks, uses_priority=config.policy == "priority")


def _vllm_config(config: EngineConfig, folder: Path) -> VllmConfig:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    is_cpu = current_platform.is_cpu()
    check_device(config, is_cpu=is_cpu)
    check_vllm_args(config, {field.name for field in dataclasses.fields(AsyncEngineArgs)})
    try:
        return AsyncEngineArgs(**engine_args(config, folder, is_cpu=is_cpu)).create_engine_config()
    except Exception as error:  # pydantic's, transformers' and vLLM's own
        raise ConfigError(f"vLLM refuses this model or these settings: {error}", field="engine") from error


def _start(vllm_config: VllmConfig, recorder: VllmRecorder) -> AsyncLLM:
    from vllm.v1.engine.async_llm import AsyncLLM

    # A StatLoggerBase in all but name: inheriting it would import vLLM with the recorder's module.
    loggers: Any = [lambda config, index: recorder]
    try:
        with _deaf_to_interrupts():
            return AsyncLLM.from_vllm_config(vllm_config, disable_log_stats=True, stat_loggers=loggers)
    except Exception as error:
        raise EngineStartError(f"vLLM did not start ({error}); its log says why") from error


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Block SIGINT for the processes that this thread starts, which inherit its mask.

    Ctrl-C in a terminal reaches every process of the server; vLLM's are to end when they are told to, after the last
    request.
    """
    resource_tracker.ensure_running()  # here: where it starts it unblocks SIGINT, whatever the mask was before
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _model_info(config: EngineConfig, folder: Path, vllm_config: VllmConfig) -> ModelInfo:
    tokenizer_path = folder if config.tokenizer is None else Path(config.tokenizer).expanduser()
    generation = parse_generation_config(
        read_optional_document(folder / "generation_config.json"), read_document(folder / "config.json")
    )
    return ModelInfo(
        name=config.served_name,
        created=int(time.time()),
        max_model_len=vllm_config.model_config.max_model_len,
        max_num_choices=config.max_num_seqs + config.max_waiting_requests,
        vocab_size=vllm_config.model_config.get_vocab_size(),
        tokenizer=build_tokenizer(read_tokenizer_files(tokenizer_path)),
        eos_token_ids=frozenset(generation.eos_token_ids),
        default_sampling=generation.sampling_defaults,
        weight_version=version_of(folder),
    )
