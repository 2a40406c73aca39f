"""Chat templates: the Jinja program of a checkpoint that renders messages as its prompt format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from apt_core.errors import CheckpointError, InvalidRequestError


class ChatTemplate:
    """A chat template, compiled once.

    Rendering follows transformers (utils/chat_template_utils.py): the same sandbox, whitespace rules, filters and
    globals, so that a template gives the same text here as there.

    Args:
        source: the Jinja text.
        special_tokens: names such as ``bos_token`` and their text, offered to the template as variables.
        file: where the template came from, for errors.

    Raises:
        CheckpointError: the source is not valid Jinja.
    """

    def __init__(self, source: str, *, special_tokens: Mapping[str, str], file: str) -> None:
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateSyntaxError, RecursionError) as error:
            raise CheckpointError(f"the template is malformed: {error}", file=file, field="chat_template") from None

    def render(self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        """The prompt text of messages.

        Raises:
            InvalidRequestError: the template refuses these messages, or cannot work with them.
        """
        variables: dict[str, Any] = {
            **self._special_tokens,
            "messages": list(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(variables)
        except Exception as error:
            # Jinja lets any exception of the expressions it evaluates through; all of them are this request's fault.
            raise InvalidRequestError(
                f"the model's chat template refused the messages: {error}", param="messages"
            ) from error


class _GenerationBlock(Extension):
    """``{% generation %} ... {% endgeneration %}``, which marks assistant text for training and renders as its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance variable

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; Jinja's own filter would escape HTML characters."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
