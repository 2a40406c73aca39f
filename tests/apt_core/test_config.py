from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_core.config import add_flags, apply_overrides, load_yaml, overrides_from, parse, settings
from apt_core.errors import ConfigError


@dataclass(frozen=True)
class Engine:
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    max_num_seqs: int = 64
    """Most sequences
    in one step."""
    policy: Literal["fcfs", "priority"] = "fcfs"
    timeout_s: float = 60.0
    name: str | None = None
    origins: tuple[str, ...] = ()
    """Origins; 100 % of them."""
    is_fast: bool = True

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ConfigError("must be above 0", field="max_num_seqs")
        if self.timeout_s < 0:
            raise ConfigError("must be at least 0", field="model.timeout_s")


@dataclass(frozen=True)
class Server:
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    model: Engine = field(default_factory=Engine)
    replicas: int = 1
    """Copies."""
    others: tuple[Engine, ...] = ()
    draft: Engine | None = None


def refusal(data: Any, cls: type[Any] = Server, where: str = "") -> str:
    with pytest.raises(ConfigError) as caught:
        parse(cls, data, where=where)
    message = str(caught.value)
    assert message.startswith(f"{caught.value.field}: ")
    return message


def test_defaults_and_values() -> None:
    assert parse(Server, {}) == Server()
    assert parse(Server, None) == Server()
    assert parse(Server, {"model": {"max_num_seqs": 8, "origins": ["a", "b"]}, "replicas": 2}) == Server(
        model=Engine(max_num_seqs=8, origins=("a", "b")), replicas=2
    )


def test_a_section_whose_lines_are_all_commented_out_is_its_default() -> None:
    assert parse(Server, {"model": None}) == Server()


def test_whole_numbers_do_for_floats() -> None:
    assert parse(Engine, {"timeout_s": 5}).timeout_s == 5.0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"model": {"max_num_seqs": "8"}}, 'model.max_num_seqs: must be a valid integer, got "8"'),
        ({"model": {"max_num_seqs": 8.0}}, "model.max_num_seqs: must be a valid integer, got 8.0"),
        ({"model": {"max_num_seqs": True}}, "model.max_num_seqs: must be a valid integer, got true"),
        ({"model": {"is_fast": "yes"}}, 'model.is_fast: must be a valid boolean, got "yes"'),
        ({"model": {"policy": "lifo"}}, "model.policy: must be 'fcfs' or 'priority', got \"lifo\""),
        ({"model": {"origins": "a"}}, 'model.origins: must be a valid array, got "a"'),
        ({"model": {"origins": ["a", 1]}}, "model.origins.1: must be a valid string, got 1"),
        ({"model": 3}, "model: must be an object, got 3"),
        ([1], "settings: must be an object, got [1]"),
    ],
)
def test_types_are_strict(data: Any, message: str) -> None:
    assert refusal(data) == message


def test_not_a_number_is_refused() -> None:
    assert refusal({"model": {"timeout_s": float("nan")}}).startswith("settings: ")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"model": {"max_num_seq": 8}}, "model.max_num_seq: unknown setting; did you mean max_num_seqs?"),
        ({"modell": {}}, "modell: unknown setting; did you mean model?"),
        ({"zzz": 1}, "zzz: unknown setting; known: model, replicas, others, draft"),
        ({"others": [{}, {"polcy": 1}]}, "others.1.polcy: unknown setting; did you mean policy?"),
        ({"draft": {"polcy": 1}}, "draft.polcy: unknown setting; did you mean policy?"),
    ],
)
def test_an_unknown_key_is_named_with_the_closest_known_one(data: Any, message: str) -> None:
    assert refusal(data) == message


def test_a_sections_own_checks_keep_their_field() -> None:
    assert refusal({"model": {"max_num_seqs": 0}}) == "model.max_num_seqs: must be above 0"
    assert refusal({"model": {"timeout_s": -1}}) == "model.timeout_s: must be at least 0"
    assert refusal({"others": [{"max_num_seqs": 0}]}) == "others.0.max_num_seqs: must be above 0"


def test_where_prefixes_the_field() -> None:
    assert refusal({"max_num_seqs": 0}, Engine, "args.model") == "args.model.max_num_seqs: must be above 0"
    assert refusal({"x": 0}, Engine, "model").startswith("model.x: unknown setting")
    assert refusal([], Engine, "model").startswith("model: must be an object")


def test_yaml(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("model:\n  max_num_seqs: 8\n")
    assert load_yaml(path) == {"model": {"max_num_seqs": 8}}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("model: {", "while parsing"),
        ("- 1", "must hold a mapping, found list"),
        ("", "must hold a mapping, found NoneType"),
        ("model:\n  a: 1\n  a: 2\n", "key 'a' appears twice"),
    ],
)
def test_bad_yaml_is_named(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=problem) as caught:
        load_yaml(path)
    assert caught.value.field == str(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_yaml(tmp_path / "absent.yaml")


def test_settings_are_the_leaves_with_their_docs() -> None:
    found = {s.name: s for s in settings(Server)}
    assert list(found)[:2] == ["model.max_num_seqs", "model.policy"]
    assert found["model.max_num_seqs"].doc == "Most sequences in one step."
    assert found["model.max_num_seqs"].help == "Most sequences in one step. (default: 64)"
    assert found["model.policy"].doc == ""
    assert [found[f"model.{n}"].type_name for n in ("policy", "name", "origins", "is_fast")] == [
        "fcfs|priority",
        "str|null",
        "str,...",
        "bool",
    ]


def flags(*argv: str) -> Server:
    parser = argparse.ArgumentParser()
    add_flags(parser, Server)
    return parse(Server, apply_overrides(Server, {"replicas": 3}, overrides_from(parser.parse_args(argv), Server)))


def test_flags_override_what_a_file_says() -> None:
    assert flags() == Server(replicas=3)
    assert flags("--replicas=5", "--model.max_num_seqs", "8") == Server(model=Engine(max_num_seqs=8), replicas=5)
    assert flags("--model.name", "7", "--model.is_fast=false").model == Engine(name="7", is_fast=False)
    assert flags("--model.name=null", "--model.origins=a, b").model == Engine(origins=("a", "b"))
    assert flags("--model.policy=priority").model.policy == "priority"


@pytest.mark.parametrize("text", ["3e-3", "3E-3", "3.e-3", "0.3e-2", "+30e-4"])
def test_powers_of_ten_are_numbers(text: str, tmp_path: Path) -> None:
    assert flags("--model.timeout_s", text).model.timeout_s == 0.003
    path = tmp_path / "config.yaml"
    path.write_text(f"timeout_s: {text}")
    assert load_yaml(path) == {"timeout_s": 0.003}


def test_a_flags_bad_value_is_named() -> None:
    with pytest.raises(ConfigError, match=r'^model\.max_num_seqs: must be a valid integer, got "many"$'):
        flags("--model.max_num_seqs=many")
    with pytest.raises(ConfigError, match=r"^replicas: must be a valid integer"):
        flags("--replicas=[")


def test_help_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        flags("--help")
    text = " ".join(capsys.readouterr().out.split())
    for setting in settings(Server):
        assert f"--{setting.name}" in text
        assert setting.doc in text


def test_overrides_do_not_change_their_input() -> None:
    data = {"model": {"max_num_seqs": 8}}
    assert apply_overrides(Server, data, {"model.max_num_seqs": "9"}) == {"model": {"max_num_seqs": 9}}
    assert data == {"model": {"max_num_seqs": 8}}


def test_an_override_may_fill_an_empty_section() -> None:
    assert apply_overrides(Server, {"model": None}, {"model.max_num_seqs": "9"}) == {"model": {"max_num_seqs": 9}}


def test_an_unknown_override_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^model\.max_num_seq: unknown setting; did you mean model\.max_num_seqs\?"):
        apply_overrides(Server, {}, {"model.max_num_seq": "1"})


@given(
    st.builds(
        Engine,
        max_num_seqs=st.integers(1, 2**40),
        timeout_s=st.floats(0, 1e9),
        name=st.none() | st.text(),
        origins=st.lists(st.text()).map(tuple),
        is_fast=st.booleans(),
    )
)
def test_what_is_written_is_read_back(engine: Engine) -> None:
    assert parse(Server, json.loads(json.dumps({"model": asdict(engine)}))).model == engine
