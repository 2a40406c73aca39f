"""A batch's input, line by line: {"custom_id", "method", "url", "body"}, as OpenAI has it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json

MAX_LINE_BYTES = 4 * 1024 * 1024
MAX_CUSTOM_ID_LENGTH = 512
MAX_PROBLEMS = 100
"""Complaints about one file; further ones would tell nothing new."""
_FIELDS = frozenset({"custom_id", "method", "url", "body"})


@dataclass(frozen=True, slots=True)
class Line:
    """One request of a batch."""

    number: int
    """From 0; lines without anything on them do not count."""
    custom_id: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a file is no input of a batch, as OpenAI lists it."""

    code: str
    message: str
    param: str | None
    line: int | None
    """In the file, from 1."""


class LineError(ValueError):
    """A line is none of a batch's."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


def read_lines(path: Path, endpoint: str) -> Iterator[Line]:
    """The lines of a file that has been found sound."""
    for number, (_, data) in enumerate(_raw_lines(path)):
        yield parse_line(number, data, endpoint)


def find_problems(path: Path, endpoint: str, max_lines: int) -> tuple[int, list[dict[str, Any]]]:
    """How many lines a file has, and what is wrong with them: Problems as plain values."""
    problems: list[Problem] = []
    seen: set[str] = set()
    total = 0
    for place, data in _raw_lines(path):
        total += 1
        if total > max_lines:
            problems.append(Problem("too_many_lines", f"A batch may have {max_lines} lines.", None, place))
            break
        try:
            line = parse_line(total - 1, data, endpoint)
            if line.custom_id in seen:
                raise LineError("duplicate_custom_id", "An earlier line has this custom_id.", "custom_id")
            seen.add(line.custom_id)
        except LineError as error:
            problems.append(Problem(error.code, str(error), error.param, place))
            if len(problems) == MAX_PROBLEMS:
                break
    if not total:
        problems.append(Problem("empty_file", "The input file has no lines.", None, None))
    return total, [asdict(problem) for problem in problems]


def parse_line(number: int, data: bytes, endpoint: str) -> Line:
    """A line that a batch for this endpoint may have.

    Raises:
        LineError: it may not.
    """
    if len(data) > MAX_LINE_BYTES:
        raise LineError("line_too_long", f"A line may have {MAX_LINE_BYTES} bytes.")
    try:
        value = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise LineError("invalid_json_line", f"This line is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise LineError("invalid_json_line", "This line is not a JSON object.")
    for name in _FIELDS - value.keys():
        raise LineError("missing_required_parameter", f"{name}: this field is required", name)
    custom_id, body = value["custom_id"], value["body"]
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID_LENGTH or "\0" in custom_id:
        raise LineError("invalid_custom_id", f"custom_id: 1 to {MAX_CUSTOM_ID_LENGTH} characters", "custom_id")
    if value["method"] != "POST":
        raise LineError("invalid_method", "method: must be POST", "method")
    if value["url"] != endpoint:
        raise LineError("mismatched_endpoint", f"url: must be the batch's endpoint, {endpoint}", "url")
    if not isinstance(body, dict):
        raise LineError("invalid_body", "body: must be an object", "body")
    return Line(number, custom_id, body)


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that have something on them, with their place from 1; of an over-long one only its beginning."""
    with path.open("rb") as file:
        place = 0
        while data := file.readline(MAX_LINE_BYTES + 1):
            place += 1
            rest = data
            while not rest.endswith(b"\n") and (rest := file.readline(MAX_LINE_BYTES)):
                pass
            if data.strip():
                yield place, data
