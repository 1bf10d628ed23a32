from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from bdh.cli.settings import parse_settings, to_yaml
from bdh.validation import Faults


@dataclass
class Oven:
    heat: float = 180.0
    """Temperature, in degrees Celsius; 5 % more does no harm."""
    mode: Literal["air", "grill"] = "air"
    """How it heats."""
    racks: list[str] = field(default_factory=lambda: ["middle"])
    """Racks in use."""
    minutes: int | None = None
    """Minutes; null for until it is done."""
    weights: dict[str, float] = field(default_factory=dict)
    """Grams of each thing."""
    door: str | list[str] = "left"
    """Where it opens."""

    def collect_faults(self, faults: Faults) -> None:
        faults.require(0 < self.heat <= 300, "heat", self.heat, "above 0, up to 300")
        faults.require(self.minutes is None or self.minutes > 0, "minutes", self.minutes, "above 0")


@dataclass(kw_only=True)
class Kitchen:
    dish: str
    """What is made."""
    oven: Oven = field(default_factory=Oven)
    light: bool = False
    """Whether the light is on."""
    guests: int = 2
    """People to feed."""

    def collect_faults(self, faults: Faults) -> None:
        faults.require(self.guests >= 1, "guests", self.guests, "at least 1")


def parse(*argv: str, **more) -> Kitchen:
    return parse_settings(Kitchen, argv, prog="bdh cook", description="Cook a dish.", positionals=("dish",), **more)


def written(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_defaults_then_base_then_files_in_order_then_flags(tmp_path):
    first = written(tmp_path, "a.yaml", "oven: {heat: 100, mode: grill}\nguests: 5\n")
    second = written(tmp_path, "b.yaml", "oven:\n  heat: 120\n")
    base = {"oven": {"heat": 90, "minutes": 7}, "light": True}
    settings = parse("cake", "--guests", "9", "--config", first, "--config", second, base=base)
    assert settings.oven == Oven(heat=120.0, mode="grill", minutes=7)
    assert (settings.dish, settings.light, settings.guests) == ("cake", True, 9)


def test_a_flag_before_the_file_still_overrides_it(tmp_path):
    path = written(tmp_path, "a.yaml", "guests: 5\n")
    assert parse("cake", "--guests=3", f"--config={path}").guests == 3


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--oven.heat", "1e2"], Oven(heat=100.0)),
        (["--oven.heat=2.5e+2"], Oven(heat=250.0)),
        (["--oven.minutes", "null"], Oven(minutes=None)),
        (["--oven.minutes", "3"], Oven(minutes=3)),
        (["--oven.racks", "top"], Oven(racks=["top"])),
        (["--oven.racks", "[top, middle]"], Oven(racks=["top", "middle"])),
        (["--oven.racks", "The "], Oven(racks=["The "])),
        (["--oven.weights", "{flour: 1e3}"], Oven(weights={"flour": 1000.0})),
        (["--oven.door", "1e-3"], Oven(door="1e-3")),
        (["--oven.door", "[left, right]"], Oven(door=["left", "right"])),
    ],
)
def test_values_take_the_type_of_their_setting(argv, expected):
    assert parse("cake", *argv).oven == expected


def test_numbers_in_scientific_notation_work_in_files_too(tmp_path):
    """YAML 1.1 reads 1e2 as text, for want of a dot."""
    assert parse("cake", "--config", written(tmp_path, "a.yaml", "oven: {heat: 1e2}")).oven.heat == 100.0


@pytest.mark.parametrize(
    ("argv", "light"),
    [
        ([], False),
        (["--light"], True),
        (["--light", "false"], False),
        (["--light=true"], True),
        (["--light", "--guests", "3"], True),
    ],
)
def test_a_switch_needs_no_value(argv, light):
    assert parse("cake", *argv).light is light


def test_a_switch_does_not_swallow_what_stands_behind_it():
    settings = parse("--light", "cake")
    assert (settings.light, settings.dish) == (True, "cake")


def test_dashes_and_underscores_are_one():
    @dataclass
    class Settings:
        run_dir: str = "a"

    assert parse_settings(Settings, ["--run-dir", "b"], prog="p", description="d").run_dir == "b"


def test_a_list_takes_the_remaining_places():
    @dataclass
    class Settings:
        first: str = ""
        others: list[str] = field(default_factory=list)

    settings = parse_settings(Settings, ["a", "b", "c"], prog="p", description="d", positionals=("first", "others"))
    assert (settings.first, settings.others) == ("a", ["b", "c"])


def test_all_faults_are_reported_together(tmp_path):
    path = written(tmp_path, "a.yaml", "oven: {heet: 100, mode: steam}\nguests: -1\nlight: 3\nfrobnicate: 1\n")
    with pytest.raises(ValueError, match="settings are wrong") as caught:
        parse("--config", path, "--oven.minutes", "-4", "--gests", "4", "--oven.racks")
    message = str(caught.value)
    for part in (
        f"oven.heet in {path} is not a setting: did you mean oven.heat?",
        "oven.mode is 'steam': must be one of air, grill",
        "light is 3: must be true or false",
        f"frobnicate in {path} is not a setting; --help lists them",
        "--gests is not a setting: did you mean guests?",
        "--oven.racks is given without a value",
        "oven.minutes is -4: must be above 0",
        "dish is missing: What is made.",
    ):
        assert part in message


def test_top_level_ranges_are_checked_too():
    with pytest.raises(ValueError, match=r"^guests is -1: must be at least 1$"):
        parse("cake", "--guests", "-1")


@pytest.mark.parametrize(
    ("flag", "meant"), [("--heat", "oven.heat"), ("--oven.mod", "oven.mode"), ("--minuts", "oven.minutes")]
)
def test_the_nearest_setting_is_suggested(flag, meant):
    with pytest.raises(ValueError, match=f"{flag} is not a setting: did you mean {meant}"):
        parse("cake", flag, "1")


@pytest.mark.parametrize(
    ("value", "setting"),
    [("2.5", "guests"), ("1e3", "guests"), ("true", "guests"), ("many", "guests"), ("hot", "oven.heat")],
)
def test_a_wrong_type_names_value_and_what_is_allowed(value, setting):
    with pytest.raises(ValueError, match=f"{setting} is '{value}': must be a"):
        parse("cake", f"--{setting}", value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("- a\n- b\n", "holds a list"),
        ("guests: 1\n  oven: 3: 4\n", "line 2 is not YAML"),
        ("oven: 7\n", "oven is 7 in .*: must be a section"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, message):
    path = written(tmp_path, "broken.yaml", text)
    with pytest.raises(ValueError, match=message) as caught:
        parse("cake", "--config", path)
    assert path in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no configuration file .*nowhere.yaml"):
        parse("cake", "--config", str(tmp_path / "nowhere.yaml"))


def test_a_surplus_argument_is_refused():
    with pytest.raises(ValueError, match="'pie' is not expected here"):
        parse("cake", "pie")


def test_help_shows_docstrings_types_and_defaults(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert "Temperature, in degrees Celsius; 5 % more does no harm. (a number; default: 180.0)" in shown
    assert "--oven.mode" in shown
    assert "one of air, grill; default: air" in shown


def test_print_config_is_read_back_as_it_was(tmp_path, capsys):
    argv = ("cake", "--oven.heat", "1e-5", "--oven.racks", "[top, 'a: b']", "--light", "--oven.minutes=4")
    with pytest.raises(SystemExit) as caught:
        parse(*argv, "--print_config")
    path = written(tmp_path, "printed.yaml", capsys.readouterr().out)
    assert caught.value.code == 0
    assert parse("--config", path) == parse(*argv)


def test_to_yaml_is_plain_yaml():
    settings = parse("cake")
    assert yaml.safe_load(to_yaml(settings)) == {
        "dish": "cake",
        "oven": {"heat": 180.0, "mode": "air", "racks": ["middle"], "minutes": None, "weights": {}, "door": "left"},
        "light": False,
        "guests": 2,
    }


def test_sections_within_sections_are_printed_and_read_back(tmp_path, capsys):
    @dataclass
    class Grill:
        bars: int = 4
        """Bars."""

    @dataclass
    class Stove:
        heat: int = 1
        """Heat."""
        grill: Grill = field(default_factory=Grill)
        door: str = "left"
        """Where it opens."""

    @dataclass
    class House:
        stove: Stove = field(default_factory=Stove)
        cellar: Grill = field(default_factory=Grill)
        rooms: int = 3
        """Rooms."""

    settings = House(Stove(2, Grill(5), "right"), Grill(6), 7)
    for with_help in (False, True):
        path = written(tmp_path, "printed.yaml", to_yaml(settings, with_help=with_help))
        assert parse_settings(House, ["--config", path], prog="p", description="d") == settings
