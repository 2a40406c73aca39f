"""Records understood: the text of a document, in segments that count for the loss or do not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from apt_core.errors import AptError, InvalidRequestError
from apt_core.tokenizer import Tokenizer
from apt_train.data.config import DataConfig
from apt_train.data.records import MAX_LINE_BYTES, Record

_BYTE_ORDER_MARK = "\ufeff"
"""What some editors begin a file with; json.loads knows it."""


class BadRecordError(AptError, ValueError):
    """A record that holds no document."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Text that is tokenized by itself."""

    text: str
    is_scored: bool


Sample = tuple[Segment, ...]
"""The segments of one document."""


def read_sample(record: Record, config: DataConfig, tokenizer: Tokenizer) -> Sample:
    """The document a record holds.

    Raises:
        BadRecordError: it holds none.
    """
    value = _value(record, config)
    try:
        sample = render_messages(value, config, tokenizer) if config.content == "messages" else _text(value)
        for segment in sample:
            segment.text.encode()
    except UnicodeEncodeError:
        raise BadRecordError("the text is not valid Unicode: it has a lone surrogate") from None
    except InvalidRequestError as error:
        raise BadRecordError(str(error)) from None
    return sample


def render_messages(messages: Any, config: DataConfig, tokenizer: Tokenizer) -> Sample:
    """Messages as the chat template spells them.

    With ``loss_on: assistant`` each turn of the assistant is a scored segment. What comes before is tokenized apart,
    just as a server tokenizes the prompt whose answer the turn is.

    Raises:
        BadRecordError: these are no messages, none is the assistant's, or the template changes earlier turns.
        InvalidRequestError: the template refuses them.
    """
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages) or not messages:
        raise BadRecordError("expected a list of messages with a role each")
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    if config.loss_on == "all":
        return (Segment(whole, True),)
    segments, done = [], 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(messages[:index], add_generation_prompt=True)
        turn = tokenizer.apply_chat_template(messages[: index + 1], add_generation_prompt=False)
        if not (whole.startswith(turn) and turn.startswith(prompt)) or len(prompt) < done:
            raise BadRecordError(f"the chat template does not keep the text before message {index} as it was")
        segments += [Segment(whole[done : len(prompt)], False), Segment(whole[len(prompt) : len(turn)], True)]
        done = len(turn)
    if not segments:
        raise BadRecordError("no message has the role assistant")
    return tuple(segment for segment in segments if segment.text)


def _text(value: Any) -> Sample:
    if not isinstance(value, str) or not value:
        raise BadRecordError(f"expected a text, found {'an empty one' if value == '' else type(value).__name__}")
    return (Segment(value, True),)


def _value(record: Record, config: DataConfig) -> Any:
    try:
        if record.file.format == "parquet":
            return record.data.as_py()
        if record.file.format == "text":
            return record.data.decode(config.encoding).removeprefix("" if record.begin else _BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise BadRecordError(f"is not {error.encoding}: {error.reason}") from None
    if not record.data:
        raise BadRecordError(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        document = json.loads(record.data)
    except (ValueError, RecursionError) as error:
        raise BadRecordError(f"is not JSON: {error}") from None
    if not isinstance(document, dict) or config.column not in document:
        raise BadRecordError(f"has no field {config.column!r} (data.column)")
    return document[config.column]
