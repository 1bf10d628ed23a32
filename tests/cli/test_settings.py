import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from bdh.cli.settings import given_settings, parse_settings, to_yaml, verbatim
from bdh.validation import Faults, Settings


@dataclass
class Oven(Settings):
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
    trays: list[float] = field(default_factory=list)
    """Depths in use, in centimetres."""
    note: str | None = None
    """What hangs on it."""
    label: str | None = verbatim(None)
    """What is written on it."""

    def collect_faults(self, faults: Faults) -> None:
        faults.require(0 < self.heat <= 300, "heat", self.heat, "above 0, up to 300")
        faults.require(self.minutes is None or self.minutes > 0, "minutes", self.minutes, "above 0")


@dataclass(kw_only=True)
class Kitchen(Settings):
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
        (["--oven.racks", "top", "--oven.racks=middle"], Oven(racks=["top", "middle"])),
        (["--oven.racks", "The "], Oven(racks=["The "])),
        (["--oven.weights", "{flour: 1e3}"], Oven(weights={"flour": 1000.0})),
        (["--oven.door", "1e-3"], Oven(door="1e-3")),
        (["--oven.door", "left", "--oven.door", "right"], Oven(door=["left", "right"])),
        (["--oven.trays", "[1, 2]"], Oven(trays=[1.0, 2.0])),
        (["--oven.trays", "1", "--oven.trays", "2e0"], Oven(trays=[1.0, 2.0])),
    ],
)
def test_values_take_the_type_of_their_setting(argv, expected):
    assert parse("cake", *argv).oven == expected


def test_numbers_in_scientific_notation_work_in_files_too(tmp_path):
    """YAML 1.1 reads 1e2 as text, for want of a dot."""
    assert parse("cake", "--config", written(tmp_path, "a.yaml", "oven: {heat: 1e2}")).oven.heat == 100.0


@pytest.mark.parametrize(
    "text", ["# x", "~", "1e3", "[INST", "[END]", "{a: 1}", "true", "", "a: b", "- a", "'a'", "&a"]
)
@pytest.mark.parametrize("setting", ["note", "label", "door", "racks"])
def test_text_on_the_command_line_is_no_yaml(setting, text):
    """It was read as YAML: a prompt of `# x` was None, and a stop string `[END]` the list of END."""
    given = getattr(parse("cake", f"--oven.{setting}", text).oven, setting)
    assert given == ([text] if setting == "racks" else text)
    assert parse("--", text).dish == text


def test_null_is_none_on_the_command_line_but_for_prompts_and_lists():
    oven = parse("null", "--oven.note=null", "--oven.label=null", "--oven.racks=null").oven
    assert (oven.note, oven.label, oven.racks) == (None, "null", ["null"])


def test_text_in_files_is_what_yaml_says_and_no_yaml_once_more(tmp_path):
    path = written(tmp_path, "a.yaml", "oven: {note: null, label: '# x', racks: ['null', '~'], door: '[a, b]'}\n")
    oven = parse("cake", "--config", path).oven
    assert (oven.note, oven.label, oven.racks, oven.door) == (None, "# x", ["null", "~"], "[a, b]")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--guests", "3", "--guests", "4"], "guests is given twice, as '3' and '4': give it once"),
        (["--oven.mode=air", "--oven.mode=grill"], "oven.mode is given twice, as 'air' and 'grill'"),
        (["--dish", "pie"], "dish is given twice, as 'pie' and 'cake'"),
        (["--light", "--light=false"], "light is given twice, as 'true' and 'false'"),
    ],
)
def test_two_values_of_what_takes_one_are_a_fault(argv, message):
    with pytest.raises(ValueError, match=message):
        parse("cake", *argv)


def test_flags_of_a_list_replace_that_of_a_file(tmp_path):
    path = written(tmp_path, "a.yaml", "oven: {racks: [top]}\n")
    assert parse("cake", "--config", path, "--oven.racks=a", "--oven.racks=b").oven.racks == ["a", "b"]


def test_what_is_given_can_be_asked_before_all_is_checked(tmp_path):
    path = written(tmp_path, "a.yaml", "guests: 5\nlight: true\noven: {heet: 3}\n")
    argv = ["cake", "--guests", "7", "--config", path, "--nothing", "--oven.minutes=many"]
    assert given_settings(Kitchen, argv) == {"guests": 7, "light": True}


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


@pytest.mark.parametrize("text", ["_h", "__help", "__print_config"])
def test_what_begins_with_an_underscore_is_no_flag(text):
    assert parse(text).dish == text


def test_dashes_and_underscores_are_one():
    @dataclass
    class Errand(Settings):
        run_dir: str = "a"

    assert parse_settings(Errand, ["--run-dir", "b"], prog="p", description="d").run_dir == "b"


def test_a_list_takes_the_remaining_places():
    @dataclass
    class Errand(Settings):
        first: str = ""
        others: list[str] = field(default_factory=list)

    settings = parse_settings(Errand, ["a", "b", "c"], prog="p", description="d", positionals=("first", "others"))
    assert (settings.first, settings.others) == ("a", ["b", "c"])


def test_all_faults_are_reported_together(tmp_path):
    path = written(tmp_path, "a.yaml", "oven: {heet: 100, mode: steam}\nguests: -1\nlight: 3\nfrobnicate: 1\n")
    with pytest.raises(ValueError, match="settings are wrong") as caught:
        parse("--config", path, "--oven.minutes", "-4", "--gests", "4", "--oven.racks")
    message = str(caught.value)
    for part in (
        f"oven.heet is not a setting: did you mean oven.heat? ({path}, line 1)",
        "oven.mode is 'steam': must be one of air, grill",
        f"light is 3: must be true or false ({path}, line 3)",
        f"frobnicate is not a setting; --help lists them ({path}, line 4)",
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
        ("oven: 7\n", "oven is 7: must be a section"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, message):
    path = written(tmp_path, "broken.yaml", text)
    with pytest.raises(ValueError, match=message) as caught:
        parse("cake", "--config", path)
    assert path in str(caught.value)


def faults_of(*argv: str, settings_class=Kitchen, **more) -> list[str]:
    with pytest.raises(ValueError, match=r"\S") as caught:
        parse_settings(settings_class, argv, prog="p", description="d", positionals=("dish",), **more)
    first, *others = str(caught.value).splitlines()
    return [line.strip() for line in others] or [first]


def test_all_that_is_wrong_in_a_file_is_reported_together(tmp_path):
    """The first of two sections was dropped; a name without a value was None, whatever its setting may hold."""
    path = written(
        tmp_path,
        "a.yaml",
        "dish: pie\noven:\n  heat:\n  mode: air\n  minutes: 010\noven:\n  mode: steam\n  heet: 1\n  note: None\n"
        "light: null\nguests:\n",
    )
    assert faults_of("--config", path, "--oven.trays", "[1, 010]") == [
        f"oven is given twice: give it once ({path}, lines 2 and 6)",
        f"oven.heat has no value: give it one, or null where that is allowed, or leave it out ({path}, line 3)",
        f"oven.mode is given twice: give it once ({path}, lines 4 and 7)",
        f"oven.minutes is 010, which YAML may read as octal: leave out the leading zeros, or put it in quotes "
        f"({path}, line 5)",
        f"oven.note is None, which YAML reads as text: write null for no value, or 'None' if it is one ({path}, line 9)",
        f"guests has no value: give it one, or null where that is allowed, or leave it out ({path}, line 11)",
        f"oven.heet is not a setting: did you mean oven.heat? ({path}, line 8)",
        "oven.trays[1] is 010, which YAML may read as octal: leave out the leading zeros, or put it in quotes",
        f"oven.mode is 'steam': must be one of air, grill ({path}, line 7)",
        f"light is null: must be true or false ({path}, line 10)",
    ]


def names_and_types():
    return [pytest.param(name, id=name) for name in ("oven", *(f"oven.{field}" for field in Oven.__dataclass_fields__))]


@pytest.mark.parametrize("name", names_and_types())
def test_no_setting_and_no_section_takes_a_blank(tmp_path, name):
    text = "oven:\n" if name == "oven" else f"oven:\n  {name.removeprefix('oven.')}:\n"
    (fault,) = faults_of("cake", "--config", written(tmp_path, "a.yaml", text))
    assert fault.startswith(f"{name} has no value: ")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("heat", "a number"),
        ("mode", "one of air, grill"),
        ("racks", "a list of texts"),
        ("weights", "a mapping, as {name: value}, from text to a number"),
        ("door", "text, or a list of texts"),
        ("trays", "a list, as [a, b]"),
        ("minutes", None),
        ("note", None),
        ("label", None),
    ],
)
def test_null_is_for_settings_that_may_have_no_value(tmp_path, name, words):
    """jsonargparse took it for every setting: the schedule of a run was None."""
    path = written(tmp_path, "a.yaml", f"oven:\n  {name}: null\n")
    if words is None:
        assert getattr(parse("cake", "--config", path).oven, name) is None
    else:
        (fault,) = faults_of("cake", "--config", path)
        assert fault.startswith(f"oven.{name} is null: must be {words}")
        assert fault.endswith(f"({path}, line 2)")


def test_a_section_is_not_null(tmp_path):
    path = written(tmp_path, "a.yaml", "oven: null\n")
    assert faults_of("cake", "--config", path) == [
        f"oven is null: must be a section, with settings under it ({path}, line 1)"
    ]


def test_none_is_not_taken_for_a_text_where_null_is_meant():
    assert faults_of("cake", "--oven.note", "None") == ["oven.note is 'None': write null for no value"]
    assert parse("cake", "--oven.label", "None", "--oven.door", "None").oven == Oven(label="None", door="None")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("010", "octal"),
        ("1:30", "base 60"),
        ("1__0", "two digits"),
        ("9" * 400, "must be a number"),
        ("9" * 5000, "5000 characters"),
        ("no", "must be a number"),
    ],
)
def test_a_number_is_not_misread(tmp_path, value, reason):
    """As a flag 010 was 10, and in a file 8; 400 digits were an unexpected error."""
    (flag,) = faults_of("cake", f"--oven.heat={value}")
    (line,) = faults_of("cake", "--config", written(tmp_path, "a.yaml", f"oven: {{heat: {value}}}\n"))
    assert reason in flag
    assert reason in line


def test_true_is_no_text(tmp_path):
    path = written(tmp_path, "a.yaml", "oven: {note: off, racks: [top, no], label: 1.5}\n")
    assert [
        fault.split(": must be text")[0].split(": must be a list of texts")[0]
        for fault in faults_of("cake", "--config", path)
    ] == [
        "oven.racks is ['top', False]",
        "oven.note is off",
        "oven.label is 1.5",
    ]


@pytest.mark.parametrize("text", ["{no: 1}", "{1: 1}", "{a: 1, a: 2}", "{a: }", "{a: null}", "{a: 010}"])
def test_a_mapping_is_as_strict(tmp_path, text):
    (flag,) = faults_of("cake", f"--oven.weights={text}")
    (line,) = faults_of("cake", "--config", written(tmp_path, "a.yaml", f"oven:\n  weights: {text}\n"))
    assert flag.startswith("oven.weights")
    assert line.startswith("oven.weights")


@pytest.mark.parametrize("text", ["{true: 1}", "{1.5: 1}", "{a: 1}", "{1: 1, '1': 2}", "{1: 1, 1: 2}"])
def test_whole_numbers_that_name_something_are_not_made_of_others(text):
    """A bias for `true` was one for token 1, and of two for one token the first was dropped."""

    @dataclass
    class Biases(Settings):
        bias: dict[int, float] = field(default_factory=dict)
        dish: str = ""

    assert len(faults_of(f"--bias={text}", settings_class=Biases)) == 1
    settings = parse_settings(Biases, ["--bias={1: -1, '2': 1e3}"], prog="p", description="d")
    assert settings.bias == {1: -1.0, 2: 1000.0}


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e999", "-1e999", "1.0e+999"])
@pytest.mark.parametrize("name", ["heat", "weights", "trays"])
def test_numbers_are_finite(tmp_path, name, value):
    """An infinite learning rate was above 0, and trained."""
    value = {"weights": f"{{a: {value}}}", "trays": f"[1, {value}]"}.get(name, value)
    (flag,) = faults_of("cake", f"--oven.{name}={value}")
    assert flag == faults_of("cake", "--config", written(tmp_path, "a.yaml", f"oven:\n  {name}: {value}\n"))[0]
    assert flag.startswith(f"oven.{name} is ")
    assert flag.endswith("must be a finite number" if name == "heat" else "must be of finite numbers only")


def test_merge_keys_work_in_settings(tmp_path):
    path = written(tmp_path, "a.yaml", "oven: &oven {heat: 100, minutes: 3}\nguests: 4\n")
    again = written(tmp_path, "b.yaml", "oven:\n  <<: {heat: 90, mode: grill}\n  heat: 1e2\n")
    assert parse("cake", "--config", path, "--config", again).oven == Oven(heat=100.0, mode="grill", minutes=3)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no configuration file .*nowhere.yaml"):
        parse("cake", "--config", str(tmp_path / "nowhere.yaml"))


def test_a_surplus_argument_is_refused():
    with pytest.raises(ValueError, match="'pie' is not expected here"):
        parse("cake", "pie")
    with pytest.raises(ValueError, match=r"'a\.yaml' is not expected here: did you mean --config a\.yaml"):
        parse("cake", "a.yaml")


def test_initials_negated_switches_and_sections_are_understood_in_suggestions(tmp_path):
    from bdh.train.config import RunSettings

    for argv, hint in (
        (["--train.lr", "1"], "did you mean train.learning_rate?"),
        (["--no-resume"], "write --resume false"),
        (["--config", written(tmp_path, "a.yaml", "modell: {n_layer: 3}\n")], "did you mean the section model?"),
    ):
        with pytest.raises(ValueError, match=re.escape(hint)):
            parse_settings(RunSettings, argv, prog="bdh train", description="")


def test_help_shows_docstrings_types_and_defaults(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert "Temperature, in degrees Celsius; 5 % more does no harm. (a number; default: 180.0)" in shown
    assert "--oven.mode" in shown
    assert "one of air, grill; default: air" in shown
    assert "--light [true|false] Whether the light is on. (default: false)" in shown


def test_print_config_is_read_back_as_it_was(tmp_path, capsys):
    argv = (
        "cake",
        "--oven.heat",
        "1e-5",
        "--oven.racks=top",
        "--oven.racks=a: b",
        "--oven.racks=None",
        "--oven.racks=010",
        "--oven.racks=08",
        "--oven.note=1e3",
        "--light",
        "--oven.minutes=4",
    )
    with pytest.raises(SystemExit) as caught:
        parse(*argv, "--print_config")
    path = written(tmp_path, "printed.yaml", capsys.readouterr().out)
    assert caught.value.code == 0
    assert parse("--config", path) == parse(*argv)


def test_to_yaml_is_plain_yaml():
    settings = parse("cake")
    assert yaml.safe_load(to_yaml(settings)) == {
        "dish": "cake",
        "oven": {
            "heat": 180.0,
            "mode": "air",
            "racks": ["middle"],
            "minutes": None,
            "weights": {},
            "door": "left",
            "trays": [],
            "note": None,
            "label": None,
        },
        "light": False,
        "guests": 2,
    }


def test_sections_within_sections_are_printed_and_read_back(tmp_path, capsys):
    @dataclass
    class Grill(Settings):
        bars: int = 4
        """Bars."""

    @dataclass
    class Stove(Settings):
        heat: int = 1
        """Heat."""
        grill: Grill = field(default_factory=Grill)
        door: str = "left"
        """Where it opens."""

    @dataclass
    class House(Settings):
        stove: Stove = field(default_factory=Stove)
        cellar: Grill = field(default_factory=Grill)
        rooms: int = 3
        """Rooms."""

    settings = House(Stove(2, Grill(5), "right"), Grill(6), 7)
    for with_help in (False, True):
        path = written(tmp_path, "printed.yaml", to_yaml(settings, with_help=with_help))
        assert parse_settings(House, ["--config", path], prog="p", description="d") == settings


@dataclass
class Shelf(Settings):
    books: int = 0
    """Books."""
    pages: list[int] = field(default_factory=list)
    """Pages."""


@dataclass
class Room(Settings):
    shelf: Shelf = field(default_factory=lambda: Shelf(books=3, pages=[7]))
    lamps: int = 1
    """Lamps."""


@dataclass
class Flat(Settings):
    room: Room = field(default_factory=lambda: Room(lamps=2))
    cellar: Shelf = field(default_factory=Shelf)


def test_the_defaults_of_a_section_are_those_that_its_field_makes(tmp_path, capsys):
    """They were those of the section's class: `bdh serve` ran without the cache of prefixes that its field asks for."""

    def parsed(*argv: str) -> Flat:
        return parse_settings(Flat, argv, prog="p", description="d")

    assert parsed() == Flat()
    assert parsed() == Flat(Room(Shelf(3, [7]), 2), Shelf(0, []))
    assert parsed("--room.shelf.books", "5") == Flat(Room(Shelf(5, [7]), 2))
    assert parsed("--room.lamps=9").room == Room(Shelf(3, [7]), 9)
    for arguments in ((), ("--config", written(tmp_path, "a.yaml", to_yaml(Flat())))):
        with pytest.raises(SystemExit):
            parsed(*arguments, "--print_config")
        assert yaml.safe_load(capsys.readouterr().out) == asdict(Flat())
    with pytest.raises(SystemExit):
        parsed("--help")
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("Books. (a whole number; default: 3)", "default: [7])", "Lamps. (a whole number; default: 2)"):
        assert text in shown


def test_no_two_results_share_what_a_default_holds():
    first, second = (parse_settings(Flat, [], prog="p", description="d") for _ in range(2))
    first.room.shelf.pages.append(8)
    assert second == Flat()


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("oven.heat: 10\noven:\n  heat: 20\n", "lines 1 and 3"),
        ("oven:\n  heat: 20\n\noven.heat: 10\n", "lines 2 and 4"),
        ("oven: {heat: 20}\noven.heat: 20\n", "lines 1 and 2"),
        ("oven.weights: {a: 1}\noven:\n  weights: {b: 2}\n", "lines 1 and 3"),
    ],
)
def test_a_setting_is_given_once_with_its_section_and_with_a_dot(tmp_path, text, lines):
    """The last one counted without a word."""
    path = written(tmp_path, "a.yaml", text)
    name = "oven.weights" if "weights" in text else "oven.heat"
    assert faults_of("cake", "--config", path) == [f"{name} is given twice: give it once ({path}, {lines})"]


def test_a_section_may_be_given_in_both_ways(tmp_path):
    path = written(tmp_path, "a.yaml", "oven.heat: 10\noven: {mode: grill}\n")
    assert parse("cake", "--config", path).oven == Oven(heat=10, mode="grill")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("note: no", "note is no: must be text, or null; put it in quotes if it is text: 'no'"),
        ("door: 0x10", "door is 0x10: must be text, or a list of texts: a flag for each, or [a, b] in a file; "
         "put it in quotes if it is text: '0x10'"),
        ("racks: [top, off]", "racks is ['top', False]: must be a list of texts: a flag for each, or [a, b] in a file; "
         "put it in quotes if it is text: 'off'"),
        ("heat: yes", "heat is yes: must be a number"),
        ("minutes: 1.50", "minutes is 1.50: must be a whole number, or null"),
    ],
)  # fmt: skip
def test_a_value_is_shown_as_it_is_written(tmp_path, text, fault):
    """`no` was shown as False."""
    path = written(tmp_path, "a.yaml", f"oven:\n  {text}\n")
    assert faults_of("cake", "--config", path) == [f"oven.{fault} ({path}, line 2)"]


def test_a_section_that_contains_itself_is_a_fault(tmp_path):
    """It was a RecursionError."""
    path = written(tmp_path, "a.yaml", "oven: &a\n  weights: {a: *a}\n  racks: [*a]\n")
    assert faults_of("cake", "--config", path) == [
        f"oven contains itself, as oven.weights.a: write out what is meant ({path}, lines 1 and 2)",
        f"oven contains itself, as oven.racks[0]: write out what is meant ({path}, line 1)",
    ]


@pytest.mark.parametrize("value", ["[" * 60 + "]" * 60, "[" * 10_000, "&a [*a]"])
def test_a_flag_that_is_nested_without_end_is_a_fault(value):
    (fault,) = faults_of("cake", "--oven.trays", value)
    assert fault.startswith("oven.trays")
