"""The files that make up a Hugging Face tokenizer, and how they become an HFTokenizer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from apt_core.document import Document, read_document, read_optional_document, read_text
from apt_core.errors import CheckpointError
from apt_core.tokenizer.chat_template import ChatTemplate
from apt_core.tokenizer.hf_tokenizer import HFTokenizer

_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as read from disk, not yet built."""

    tokenizer_json: str
    file: str
    """Where tokenizer_json came from."""
    config: Document
    """tokenizer_config.json; empty where there is none."""
    chat_template: str | None
    chat_template_file: str


def read_tokenizer_files(path: Path) -> TokenizerFiles:
    """Read a folder that holds tokenizer.json, or that file itself with what lies beside it.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    folder = path if path.is_dir() else path.parent
    tokenizer_path = folder / "tokenizer.json" if path.is_dir() else path
    if not tokenizer_path.is_file():
        raise CheckpointError("there is no tokenizer.json; name one by `tokenizer:`", file=tokenizer_path)
    config_path = folder / "tokenizer_config.json"
    config = _with_special_tokens_map(
        read_optional_document(config_path) or Document({}, str(config_path)), folder / "special_tokens_map.json"
    )
    template, template_file = _read_chat_template(folder, config)
    return TokenizerFiles(read_text(tokenizer_path), str(tokenizer_path), config, template, template_file)


def build_tokenizer(files: TokenizerFiles) -> HFTokenizer:
    """Build the tokenizer.

    Raises:
        CheckpointError: tokenizer.json or the chat template is malformed.
    """
    try:
        tokenizer = RustTokenizer.from_str(files.tokenizer_json)
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"is not a tokenizer.json ({error})", file=files.file) from None
    _add_listed_tokens(tokenizer, files.config)
    template = None
    if files.chat_template is not None:
        template = ChatTemplate(
            files.chat_template, special_tokens=_special_tokens(files.config), file=files.chat_template_file
        )
    return HFTokenizer(tokenizer, chat_template=template, file=files.file)


def default_chat_template(config: Document) -> str | None:
    """The chat template in tokenizer_config.json: a text, or the one called "default" of several."""
    value = config.values.get("chat_template")
    if isinstance(value, list):
        templates = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = templates.get("default")
    if value is not None and not isinstance(value, str):
        raise config.error("chat_template", "expected a text or a list of named texts")
    return value


def _read_chat_template(folder: Path, config: Document) -> tuple[str | None, str]:
    """The template and the file it is in; a file of its own takes precedence over tokenizer_config.json."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return read_text(jinja), str(jinja)
    json_path = folder / "chat_template.json"
    if json_path.is_file():
        return default_chat_template(read_document(json_path)), str(json_path)
    return default_chat_template(config), config.file


def _with_special_tokens_map(config: Document, path: Path) -> Document:
    """Older checkpoints name bos_token and the like in a file of their own."""
    if not path.is_file():
        return config
    return dataclasses.replace(config, values=read_document(path).values | config.values)


def _special_tokens(config: Document) -> dict[str, str]:
    """``bos_token`` and the like by name."""
    contents = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in config.values.items()
        if name.endswith("_token")
    }
    return {name: content for name, content in contents.items() if isinstance(content, str)}


def _add_listed_tokens(tokenizer: RustTokenizer, config: Document) -> None:
    """Tokens that tokenizer_config.json lists under their ids and tokenizer.json lacks."""
    listed = config.child("added_tokens_decoder") or Document({}, config.file)
    if not all(key.isdecimal() for key in listed.values):
        raise config.error("added_tokens_decoder", "expected token ids as keys")
    for key in sorted(listed.values, key=int):
        token = _added_token(listed.child(key) or Document({}, config.file, f"{listed.prefix}{key}."))
        if tokenizer.token_to_id(token.content) is None:
            tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != int(key):
            raise listed.error(key, f"tokenizer.json gives {token.content!r} another id")


def _added_token(entry: Document) -> AddedToken:
    flags = {flag: entry.boolean(flag, False) for flag in _TOKEN_FLAGS if entry.has(flag)}
    return AddedToken(entry.text("content"), **flags)
