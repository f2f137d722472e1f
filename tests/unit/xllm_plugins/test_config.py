"""One settings tree: what each source may say, who wins, and how a mistake is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from xllm_plugins.config import (
    Mode,
    Section,
    Settings,
    Source,
    option,
    parse_section,
    resolve,
    source_from_environment,
    source_from_text,
)
from xllm_plugins.errors import ConfigError


@dataclass(frozen=True)
class OvenSection(Section):
    heat: float = option(200.0, "degrees", above=0.0, at_most=300.0)
    trays: int = option(2, "trays", at_least=1)
    fan: bool = option(True, "fan")
    program: str = option("bread", "program")
    shelves: Mapping[str, Literal["top", "low"]] = option({"cake": "low"}, "shelves")


@dataclass(frozen=True)
class HobSection(Section):
    rings: int = option(4, "rings")


SECTIONS: dict[str, type[Section]] = {"oven": OvenSection, "hob": HobSection}


def resolved(*sources: Source) -> Settings:
    return resolve(SECTIONS, sources)


def oven(*sources: Source) -> OvenSection:
    section = resolved(*sources).sections["oven"]
    assert isinstance(section, OvenSection)
    return section


def flag(**values: Any) -> Source:
    return Source("the flag", {"oven": values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ovn": {}}, "ovn from the flag is not a section; the nearest is oven."),
        ({7: {}}, "7 from the flag is not a section; the nearest is oven."),
        (
            {"oven": {"heet": 1}},
            "oven.heet from the flag is not a setting; the nearest is oven.heat.",
        ),
        ({"oven": {3: 1}}, "oven.3 from the flag is not a setting; the nearest is oven.fan."),
        ({"oven": 5}, "oven from the flag is 5; allowed is a mapping of settings."),
        ({"oven": None}, "oven from the flag is None; allowed is a mapping of settings."),
        ({"oven": ["heat"]}, "oven from the flag is ['heat']; allowed is a mapping of settings."),
        (5, "the flag holds 5; allowed is a mapping of sections."),
    ],
)
def test_a_mistake_in_the_structure_is_one_sentence(values: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(Source("the flag", values))
    assert str(caught.value) == message


HEAT = "a number above 0 and at most 300"
TRAYS = "a whole number at least 1"
SHELVES = "a mapping of names to top or low"


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("heat", "hot", HEAT),
        ("heat", True, HEAT),
        ("heat", None, HEAT),
        ("heat", 0.0, HEAT),
        ("heat", -1, HEAT),
        ("heat", 300.1, HEAT),
        ("heat", float("nan"), HEAT),
        ("heat", float("inf"), HEAT),
        ("trays", 1.0, TRAYS),
        ("trays", False, TRAYS),
        ("trays", 0, TRAYS),
        ("fan", 1, "true or false"),
        ("fan", "yes", "true or false"),
        ("program", 3, "a text"),
        ("program", True, "a text"),
        ("shelves", "top", SHELVES),
        ("shelves", ["cake", "top"], SHELVES),
        ("shelves", {"cake": "middle"}, SHELVES),
        ("shelves", {"cake": ["top"]}, SHELVES),
        ("shelves", {7: "top"}, SHELVES),
        ("mode", "maybe", "auto, on, off"),
        ("mode", 1, "auto, on, off"),
        ("mode", None, "auto, on, off"),
        ("mode", ["on"], "auto, on, off"),
    ],
)
def test_a_bad_value_is_named_with_path_origin_and_what_is_allowed(
    key: str, value: Any, allowed: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(flag(**{key: value}))
    assert str(caught.value) == f"oven.{key} from the flag is {value!r}; allowed is {allowed}."


def test_a_bad_value_is_refused_even_where_a_stronger_source_overrides_it() -> None:
    with pytest.raises(ConfigError, match=r"oven\.trays from the file is 0"):
        resolved(flag(trays=3), Source("the file", {"oven": {"trays": 0}}))


@pytest.mark.parametrize(
    ("key", "value", "result"),
    [
        ("heat", 300, 300.0),
        ("trays", 1, 1),
        ("fan", False, False),
        ("program", "", ""),
        ("shelves", {"pie": "top"}, {"pie": "top"}),
        ("shelves", {}, {}),
        ("mode", "on", Mode.ON),
        ("mode", "off", Mode.OFF),
        # YAML 1.1 reads an unquoted on or off as a boolean.
        ("mode", True, Mode.ON),
        ("mode", False, Mode.OFF),
    ],
)
def test_a_good_value_arrives_with_the_type_of_its_field(
    key: str, value: Any, result: object
) -> None:
    found = getattr(oven(flag(**{key: value})), key)
    assert found == result
    assert type(found) is type(result)


def test_the_strongest_source_wins_key_by_key_and_each_value_knows_its_origin() -> None:
    settings = resolved(
        flag(heat=100.0),
        Source("the file", {"oven": {"heat": 110.0, "trays": 3}, "hob": {"rings": 2}}),
        Source("environment", {"oven": {"heat": 120.0, "trays": 4, "fan": False}}),
    )
    assert settings.sections["oven"] == OvenSection(heat=100.0, trays=3, fan=False)
    assert settings.sections["hob"] == HobSection(rings=2)
    assert settings.origins == {
        "oven.mode": "default",
        "oven.heat": "the flag",
        "oven.trays": "the file",
        "oven.fan": "environment",
        "oven.program": "default",
        "oven.shelves": "default",
        "hob.mode": "default",
        "hob.rings": "the file",
    }


def test_settings_survive_the_way_into_another_process() -> None:
    given = {"mode": "on", "heat": 99.5, "fan": False, "program": "pie", "shelves": {"pie": "top"}}
    settings = resolved(flag(**given))
    plain = settings.as_dict()["oven"]
    assert plain == given | {"trays": 2}
    assert parse_section(OvenSection, "oven", plain) == settings.sections["oven"]


def test_a_mapping_is_replaced_as_a_whole_and_shared_with_nobody() -> None:
    assert oven(flag(shelves={"pie": "top"})).shelves == {"pie": "top"}
    given = {"pie": "top"}
    taken = oven(flag(shelves=given)).shelves
    given["pie"] = "low"
    assert taken == {"pie": "top"}
    assert OvenSection().shelves is not OvenSection().shelves


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        OvenSection().heat = 1.0  # type: ignore[misc]


def test_a_file_may_be_yaml_or_json_and_inline_json_is_the_flag_itself(tmp_path: Path) -> None:
    json, yaml = tmp_path / "a.json", tmp_path / "a.yaml"
    json.write_text('{"oven": {"mode": "on", "heat": 50}}')
    yaml.write_text("oven:\n  mode: on\n  heat: 50\n")
    inline = '  {"oven": {"mode": "on", "heat": 50}}'
    sources = [source_from_text(text) for text in (str(json), str(yaml), inline)]
    assert [s.origin for s in sources] == [f"file {json}", f"file {yaml}", "--xllm-config"]
    for source in sources:
        assert oven(source) == OvenSection(mode=Mode.ON, heat=50.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"oven: [1", "--xllm-config file {path} is not valid YAML: while parsing a flow sequence"),
        (b"\xff\xfe\xff", "--xllm-config file {path} is not valid YAML: "),
        (b"- oven", "file {path} holds ['oven']; allowed is a mapping of sections."),
        (b"", "file {path} holds None; allowed is a mapping of sections."),
        (None, "--xllm-config is '{path}', which cannot be read (No such file or directory); "),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "settings.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        resolved(source_from_text(str(path)))
    assert str(caught.value).startswith(message.format(path=path))
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_a_folder_in_place_of_a_file_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)"):
        source_from_text(str(tmp_path))


def test_bad_inline_json_says_where_it_breaks() -> None:
    with pytest.raises(ConfigError) as caught:
        source_from_text('{"oven": }')
    assert str(caught.value) == (
        "--xllm-config is not valid JSON: Expecting value: line 1 column 10 (char 9)."
    )


@pytest.mark.parametrize(
    ("variable", "text", "key", "value"),
    [
        ("XLLM_OVEN_HEAT", "50", "heat", 50.0),
        ("XLLM_OVEN_HEAT", "50.5", "heat", 50.5),
        ("XLLM_OVEN_TRAYS", "3", "trays", 3),
        ("XLLM_OVEN_FAN", "false", "fan", False),
        ("XLLM_OVEN_PROGRAM", "pie", "program", "pie"),
        ("XLLM_OVEN_PROGRAM", "[pie", "program", "[pie"),
        ("XLLM_OVEN_PROGRAM", "314", "program", "314"),  # a text stays one
        ("XLLM_OVEN_SHELVES", '{"pie": "top"}', "shelves", {"pie": "top"}),
        ("XLLM_OVEN_MODE", "on", "mode", Mode.ON),
        ("XLLM_OVEN_MODE", "off", "mode", Mode.OFF),
        ("XLLM_OVEN_MODE", "auto", "mode", Mode.AUTO),
    ],
)
def test_an_environment_variable_sets_one_key(
    variable: str, text: str, key: str, value: object
) -> None:
    assert getattr(oven(source_from_environment(SECTIONS, {variable: text})), key) == value


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        (
            "XLLM_OVEN_HEET",
            "1",
            "oven.heet from environment is not a setting; the nearest is oven.heat.",
        ),
        ("XLLM_OVEN_HEAT", "", f"oven.heat from environment is ''; allowed is {HEAT}."),
        ("XLLM_OVEN_TRAYS", "many", f"oven.trays from environment is 'many'; allowed is {TRAYS}."),
        ("XLLM_OVEN_FAN", "[", "oven.fan from environment is '['; allowed is true or false."),
        (
            "XLLM_OVEN_SHELVES",
            "pie",
            f"oven.shelves from environment is 'pie'; allowed is {SHELVES}.",
        ),
    ],
)
def test_a_bad_variable_is_one_sentence(variable: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(source_from_environment(SECTIONS, {variable: text}))
    assert str(caught.value) == message


def test_variables_that_name_no_section_belong_to_others() -> None:
    environ = {"XLLM_PLUGINS": "xllm", "XLLM_CONFIG": "{}", "XLLM_LOG": "1", "OVEN_HEAT": "1"}
    assert source_from_environment(SECTIONS, environ).values == {}
