import re
import tomllib
from pathlib import Path

import msgspec
import pytest

from agent.config import Config, load
from whisperlet.errors import ConfigError

DOCUMENTED = Path(__file__).parent.parent / "firmware_config/agent.toml"
SECTIONS = {name: msgspec.structs.asdict(section) for name, section in msgspec.structs.asdict(Config()).items()}
KEYS = [(section, key) for section, keys in SECTIONS.items() for key in keys]


def documented():
    """Section -> key -> (value as text, comment), from the file's commented lines."""
    sections = {}
    for line in DOCUMENTED.read_text().splitlines():
        if heading := re.fullmatch(r"\[(\w+)\]", line):
            keys = sections[heading[1]] = {}
        elif entry := re.fullmatch(r"# (\w+) = ([^#]*)# (.+)", line):
            assert entry[1] not in keys, f"{entry[1]} is documented twice"
            keys[entry[1]] = entry[2].strip(), entry[3]
    return sections


def limits(section, key):
    field = next(f for f in msgspec.structs.fields(type(getattr(Config(), section))) if f.name == key)
    bounds = re.findall(r"\b(?:gt|ge|lt|le)=(-?[\d.e+]+)", repr(msgspec.inspect.type_info(field.type)))
    return {f"{float(bound):g}" for bound in bounds}


def test_every_key_is_documented_in_the_order_of_the_code():
    assert [(section, key) for section, keys in documented().items() for key in keys] == KEYS


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_documented_defaults_are_the_defaults(section, key):
    value, comment = documented()[section][key]
    expected = SECTIONS[section][key]
    if expected is None:
        assert value == ""
    else:
        assert tomllib.loads(f"value = {value}")["value"] == expected
        assert type(tomllib.loads(f"value = {value}")["value"]) is type(expected)
    assert len(comment) > 20


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_documented_range_and_unit(section, key):
    _, comment = documented()[section][key]
    numbers = {f"{float(number):g}" for number in re.findall(r"-?\d+(?:\.\d+)?", comment)}
    assert limits(section, key) <= numbers
    if unit := re.search(r"_(ms|s)$", key):
        assert comment.startswith(f"{unit[1]}, ")


def test_the_documented_file_is_the_default_configuration():
    assert load(DOCUMENTED) == load(None) == Config()


def test_uncommented_it_is_still_the_default_configuration(tmp_path):
    path = tmp_path / "agent.toml"
    lines = [re.sub(r"^# (?=\w+ = [^# ])", "", line) for line in DOCUMENTED.read_text().splitlines()]
    path.write_text("\n".join(lines))
    assert sum(map(len, tomllib.loads(path.read_text()).values())) == sum(
        value is not None for keys in SECTIONS.values() for value in keys.values()
    )
    assert load(path) == Config()


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        ("[vad]\nagressiveness = 2", "vad.agressiveness", "unknown key"),
        ("[voice]\n", "voice", "unknown key"),
        ("top = 1", "top", "unknown key"),
        ("vad = 3", "vad", "Expected `object`, got `int`"),
        ('[vad]\nstart_ms = "soon"', "vad.start_ms", "Expected `int`, got `str`"),
        ("[vad]\nstart_ms = 120.5", "vad.start_ms", "Expected `int`, got `float`"),
        ("[recogniser]\npartials = 1", "recogniser.partials", "Expected `bool`, got `int`"),
        ("[source]\ndevice = 1.5", "source.device", "got `float`"),
        ("[vad]\naggressiveness = 4", "vad.aggressiveness", "<= 3"),
        ("[vad]\nmax_segment_s = 30", "vad.max_segment_s", "<= 28"),
        ("[recogniser]\nlogprob_threshold = 0.5", "recogniser.logprob_threshold", "<= 0"),
        ("[telemetry]\ninterval_s = 0", "telemetry.interval_s", ">= 1"),
        ("[telemetry]\ninterval_s = nan", "telemetry.interval_s", ">= 1"),
        ('[mqtt]\nversion = "4"', "mqtt.version", "Invalid enum value '4'"),
        ('[mqtt]\nurl = "127.0.0.1"', "mqtt.url", "is not mqtt://HOST[:PORT]"),
        ('[mqtt]\nurl = "http://broker"', "mqtt.url", "is not mqtt://HOST[:PORT]"),
        ('[mqtt]\nurl = "mqtt://"', "mqtt.url", "is not mqtt://HOST[:PORT]"),
        ('[mqtt]\nurl = "mqtt://broker:port"', "mqtt.url", "is not mqtt://HOST[:PORT]"),
        ('[mqtt]\nurl = "mqtt://broker:99999"', "mqtt.url", "is not mqtt://HOST[:PORT]"),
        ('[mqtt]\nurl = "mqtt://broker:0"', "mqtt.url", "is not mqtt://HOST[:PORT]"),
        ('[mqtt]\nurl = "mqtt://[::1"', "mqtt.url", "is not mqtt://HOST[:PORT]"),
        ('[mqtt]\ndevice = ""', "mqtt.device", "is empty"),
        ('[mqtt]\ndevice = "a/b"', "mqtt.device", "contains one of"),
        ("[vad]\nmax_segment_s = 5\ncut_window_s = 5", "vad.cut_window_s", "must be less than"),
        ("[vad\n", None, "is not TOML"),
        ("[vad]\nstart_ms = 1\nstart_ms = 2", None, "is not TOML"),
        ("\xff", None, "is not TOML"),
    ],
)
def test_refused_in_one_sentence(tmp_path, text, key, reason):
    path = tmp_path / "agent.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as refused:
        load(path)
    message = str(refused.value)
    assert message.startswith(f"{path}: {key}: " if key else f"{path}: ")
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize(("name", "reason"), [("missing.toml", "No such file"), ("", "Is a directory")])
def test_unreadable(tmp_path, name, reason):
    with pytest.raises(ConfigError, match=f"^{tmp_path / name}: cannot be read: {reason}"):
        load(tmp_path / name)


def test_flags_override_the_file(tmp_path):
    path = tmp_path / "agent.toml"
    path.write_text('[mqtt]\nurl = "mqtt://file"\nkeepalive_s = 60\n[recogniser]\nbundle = "file.tflite"')
    config = load(path, {"mqtt.url": "mqtt://flag:1884", "recogniser.bundle": None, "recogniser.partials": False})
    assert config.mqtt.url == "mqtt://flag:1884"
    assert config.mqtt.keepalive_s == 60
    assert config.recogniser.bundle == "file.tflite"
    assert not config.recogniser.partials


def test_a_wrong_flag_names_the_command_line():
    with pytest.raises(ConfigError, match=r"^the command line: mqtt\.url: 'broker' is not"):
        load(None, {"mqtt.url": "broker"})


def test_configuration_is_frozen():
    with pytest.raises(AttributeError):
        Config().vad.start_ms = 1
