"""Bodies of /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from apt_core.tokenizer import Tokenizer
from apt_serve.api.formatting import Envelope, present
from apt_serve.api.generation import ChoiceDelta
from apt_serve.api.logprobs import CompletionLogprobsWriter, joined
from apt_serve.api.schemas.common import Usage
from apt_serve.api.schemas.completions import Completion, CompletionChoice, CompletionLogprobs
from apt_serve.engine.client import TokenLogprobs

PromptLogprobs = tuple[TokenLogprobs | None, ...]


@dataclass(frozen=True, slots=True)
class CompletionOptions:
    """What a client wants to see."""

    echo: bool
    num_logprobs: int | None
    skip_special_tokens: bool
    return_token_ids: bool


class CompletionFormatter:
    """Formats one request's answer. With echo each choice begins with its prompt."""

    def __init__(self, envelope: Envelope, tokenizer: Tokenizer, options: CompletionOptions) -> None:
        self._envelope = envelope
        self._tokenizer = tokenizer
        self._options = options
        self._writers: dict[int, CompletionLogprobsWriter] = {}
        self._started: set[int] = set()
        self._prompt_logprobs: dict[int, PromptLogprobs] = {}
        self._held: dict[int, list[ChoiceDelta]] = {}

    def start(self, weight_version: str) -> None:
        """See Formatter."""
        self._envelope = self._envelope.started(weight_version)

    def chunks(self, delta: ChoiceDelta, usage: Usage | None) -> list[Completion]:
        """One event per delta."""
        return [self._completion([self._choice(ready)], usage) for ready in self._ready(delta)]

    def usage_chunk(self, usage: Usage) -> Completion:
        """No choices, the whole usage."""
        return self._completion([], usage)

    def response(self, choices: Sequence[ChoiceDelta], usage: Usage) -> Completion:
        """All choices at once."""
        deltas = [ready for choice in choices for ready in self._ready(choice)]
        return self._completion([self._choice(delta) for delta in deltas], usage)

    def _completion(self, choices: list[CompletionChoice], usage: Usage | None) -> Completion:
        return Completion(**self._envelope.fields("text_completion"), choices=choices, **present(usage=usage))

    def _ready(self, delta: ChoiceDelta) -> list[ChoiceDelta]:
        """Deltas that can be written now. The engine scores a prompt once, with choice 0; the others wait for it."""
        if not self._options.echo or self._options.num_logprobs is None or delta.prompt in self._prompt_logprobs:
            return [delta]
        if delta.output.prompt_logprobs is None:
            self._held.setdefault(delta.prompt, []).append(delta)
            return []
        self._prompt_logprobs[delta.prompt] = delta.output.prompt_logprobs
        return [delta, *self._held.pop(delta.prompt, [])]

    def _choice(self, delta: ChoiceDelta) -> CompletionChoice:
        is_first = delta.choice not in self._started
        self._started.add(delta.choice)
        output, prompt = delta.output, self._envelope.job.prompts[delta.prompt]
        wants_ids = self._options.return_token_ids
        return CompletionChoice(
            index=delta.choice,
            text=(self._echo(delta) if is_first and self._options.echo else "") + output.text,
            logprobs=self._logprobs(delta, is_first),
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
            **present(
                prompt_token_ids=list(prompt.token_ids) if wants_ids and is_first else None,
                token_ids=list(output.token_ids) if wants_ids else None,
            ),
        )

    def _echo(self, delta: ChoiceDelta) -> str:
        prompt = self._envelope.job.prompts[delta.prompt]
        if prompt.text is not None:
            return prompt.text
        return self._tokenizer.decode(prompt.token_ids, skip_special_tokens=self._options.skip_special_tokens)

    def _logprobs(self, delta: ChoiceDelta, is_first: bool) -> CompletionLogprobs | None:
        num_top = self._options.num_logprobs
        if num_top is None:
            return None
        if is_first:
            skip = self._options.skip_special_tokens
            self._writers[delta.choice] = CompletionLogprobsWriter(self._tokenizer, num_top, skip_special_tokens=skip)
        writer = self._writers[delta.choice]
        if not (is_first and self._options.echo):
            return writer.output(delta.output.logprobs or ())
        scored = writer.prompt(self._envelope.job.prompts[delta.prompt].token_ids, self._prompt_logprobs[delta.prompt])
        return joined(scored, writer.output(delta.output.logprobs or ()))
