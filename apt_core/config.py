"""Settings: frozen dataclasses read from mappings, YAML files and flags.

A setting is declared once, as a dataclass field with its docstring beneath. A nested dataclass is a section.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from apt_core.errors import ConfigError

T = TypeVar("T")


def parse(cls: type[T], data: Mapping[str, Any] | None, *, where: str = "") -> T:
    """Make an instance of a dataclass from a mapping. Types are strict: "8" is no integer.

    Args:
        cls: a dataclass; its nested dataclasses are sections.
        data: field names to values, as YAML or JSON give them; None is an empty mapping.
        where: dotted name of the section ``data`` is, for messages.

    Raises:
        ConfigError: an unknown key, a wrong type or a value out of range; ``field`` is its dotted name.
    """
    adapter: TypeAdapter[T] = TypeAdapter(cls)
    try:
        # As JSON, since strict mode takes lists for tuples and mappings for dataclasses only there.
        document = json.dumps(_without_empty_sections(cls, data), default=str, allow_nan=False)
        return adapter.validate_json(document, strict=True)
    except ValidationError as error:
        raise _config_error(cls, error.errors()[0], where) from None
    except ValueError as error:
        raise ConfigError(str(error), field=where or "settings") from None


def load_yaml(path: Path | str) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping.

    Raises:
        ConfigError: the file is missing, is no YAML, repeats a key, or holds something else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        data = yaml.load(text, Loader=_StrictLoader)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", field=str(path)) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(" ".join(str(error).split()), field=str(path)) from None
    if not isinstance(data, dict):
        raise ConfigError(f"must hold a mapping, found {type(data).__name__}", field=str(path))
    return data


@dataclass(frozen=True)
class Setting:
    """One leaf of a tree of settings."""

    name: str
    """Dotted, such as model.max_num_seqs."""
    type: Any
    default: Any
    doc: str
    """The docstring beneath the field; empty where there is none."""

    @property
    def type_name(self) -> str:
        """The type as a reader would write it."""
        return _type_name(self.type)

    @property
    def help(self) -> str:
        """One paragraph for --help."""
        return f"{self.doc} (default: {_show(self.default)})".strip()

    def read(self, text: str) -> Any:
        """The value that a flag's text stands for; ``parse`` checks it."""
        options = () if get_origin(self.type) is dict else get_args(self.type)
        if text in ("null", "None") and type(None) in options:
            return None
        if self.type is str or str in options or any(isinstance(option, str) for option in options):
            return _read_strings(text) if get_origin(self.type) is tuple else text
        try:
            return yaml.load(text, Loader=_StrictLoader)
        except yaml.YAMLError:
            return text


def settings(cls: type[Any], prefix: str = "") -> tuple[Setting, ...]:
    """Every setting of a dataclass and of its sections, in order of declaration."""
    return tuple(_walk(cls, prefix))


def apply_overrides(cls: type[Any], data: Mapping[str, Any], overrides: Mapping[str, str]) -> dict[str, Any]:
    """A copy of nested ``data`` with dotted settings replaced by what their texts stand for.

    Raises:
        ConfigError: no such setting.
    """
    known = {setting.name: setting for setting in settings(cls)}
    result = _copy(data)
    for name, text in overrides.items():
        if name not in known:
            raise _unknown(name, name, known)
        *sections, leaf = name.split(".")
        section = result
        for key in sections:
            if not isinstance(section.get(key), dict):
                section[key] = {}
            section = section[key]
        section[leaf] = known[name].read(text)
    return result


def add_flags(parser: argparse.ArgumentParser, cls: type[Any]) -> None:
    """Give a parser one flag for each setting, such as ``--model.max_num_seqs 8``, with its docstring as help."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for setting in settings(cls):
        section = setting.name.rpartition(".")[0]
        group = groups.setdefault(section, parser.add_argument_group(f"{section or 'other'} settings"))
        group.add_argument(
            f"--{setting.name}",
            metavar=setting.type_name.upper().replace(" ", ""),
            default=argparse.SUPPRESS,
            help=setting.help.replace("%", "%%"),
        )


def overrides_from(namespace: argparse.Namespace, cls: type[Any]) -> dict[str, str]:
    """What the flags made by ``add_flags`` were given, for ``apply_overrides``."""
    given = vars(namespace)
    return {setting.name: given[setting.name] for setting in settings(cls) if setting.name in given}


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a mapping which names a key twice, where YAML would silently take the last.

    To it 3e-4 is a number, as in YAML 1.2 and everywhere else; YAML 1.1 wants 3.0e-4.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _without_empty_sections(cls: type[Any], data: Any) -> Any:
    """Data without sections that are null, as YAML has them when every line beneath is commented out."""
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        return data
    hints = get_type_hints(cls)
    sections = {key: hints[key] for key in data if is_dataclass(hints.get(key))}
    return {k: _without_empty_sections(sections[k], v) if k in sections else v for k, v in data.items()}


def _config_error(cls: type[Any], error: ErrorDetails, where: str) -> ConfigError:
    location = [str(part) for part in error["loc"]]
    dotted = _join(where, *location)
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        message = str(cause).removeprefix(f"{cause.field}: ")
        return ConfigError(message, field=_prefixed(cause.field, location, where))
    if error["type"] == "unexpected_keyword_argument":
        section = _section(cls, location[:-1])
        return _unknown(dotted, location[-1], [f.name for f in fields(section)])
    message = error["msg"].replace("Input should", "must")
    return ConfigError(f"{message}, got {_show(error['input'])}", field=dotted or "settings")


def _prefixed(field: str, location: list[str], where: str) -> str:
    """Field named by a section's own check; a section may or may not have put its own name before it."""
    section = ".".join(location)
    return _join(where, field if not section or field.startswith(f"{section}.") else f"{section}.{field}")


def _unknown(dotted: str, name: str, known: Mapping[str, Any] | list[str]) -> ConfigError:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
    return ConfigError(f"unknown setting; {hint}", field=dotted)


def _section(annotation: Any, location: list[str]) -> Any:
    """The dataclass at a place within another, through lists, mappings and optional sections."""
    for name in location:
        if is_dataclass(annotation):
            annotation = get_type_hints(annotation)[name]
        else:
            annotation = get_args(annotation)[1 if get_origin(annotation) is dict else 0]
        if get_origin(annotation) in (Union, UnionType):
            annotation = next(a for a in get_args(annotation) if a is not type(None))
    return annotation


def _walk(cls: type[Any], prefix: str) -> Iterator[Setting]:
    hints, docs = get_type_hints(cls), _attribute_docs(cls)
    for field in fields(cls):
        name = _join(prefix, field.name)
        if is_dataclass(hints[field.name]):
            yield from _walk(hints[field.name], name)
        else:
            yield Setting(name, hints[field.name], _default(field), docs.get(field.name, ""))


def _attribute_docs(cls: type[Any]) -> dict[str, str]:
    """Strings beneath a class's annotated fields, each as one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for statement, after in zip(definition.body, definition.body[1:], strict=False):
        match statement, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                docs[name] = " ".join(doc.split())
    return docs


def _default(field: Field[Any]) -> Any:
    if field.default is not MISSING:
        return field.default
    factory: Callable[[], Any] | Any = field.default_factory
    return None if factory is MISSING else factory()


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, type) and not get_args(annotation):
        return "null" if annotation is type(None) else annotation.__name__
    if get_origin(annotation) is tuple:
        return f"{_type_name(get_args(annotation)[0])},..."
    if get_origin(annotation) is dict:
        return "mapping"
    return "|".join(str(a) if isinstance(a, str | int) else _type_name(a) for a in get_args(annotation))


def _read_strings(text: str) -> list[str]:
    return [part.strip() for part in text.strip("[]").split(",") if part.strip()]


def _show(value: Any) -> str:
    return json.dumps(value, default=str)


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _copy(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in data.items()}
