"""docs/telemetry.md against the code."""

import re
from pathlib import Path
from typing import get_args

import msgspec

from agent.config import ThermalConfig
from agent.energy import LONGEST_TALK_S, N_IDLE, N_IDLE_MIN
from agent.measurements import Energy, Heat, Level, Meters, Otel, Quality
from agent.payloads import TelemetryPayload
from agent.power import MAX_GAP_S

PAGE = (Path(__file__).parents[1] / "docs" / "telemetry.md").read_text()
WORDS = {2: "two", 5: "five"}


def table(first):
    """Cells of the table whose first heading is `first`."""
    lines = PAGE[PAGE.index(f"| `{first}` |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def names(structure):
    return [field.encode_name for field in msgspec.structs.fields(structure)]


def test_every_name_of_opentelemetry_is_in_the_table_with_its_unit():
    schema = msgspec.json.schema(Otel)["$defs"]["Otel"]["properties"]
    rows = table("otel")
    assert [row[0].strip("`") for row in rows] == names(Otel)
    units = {"J": "joules", "W": "watts", "Cel": "Cel", "s": "s,", "By": "By,"}
    for name, unit, _, _ in rows:
        assert units[unit] in str(schema[name.strip("`")])


def test_the_other_name_is_a_field():
    fields = {"": TelemetryPayload, "energy.": Energy}
    for *_, other in table("otel"):
        prefix, _, name = re.match(r"`((\w+\.)?(\w+))`", other)[1].rpartition(".")
        assert name in names(fields[prefix and prefix + "."])


def test_every_source_quality_and_level_is_told():
    sources = [row[0].strip("`") for row in table("energy.source")]
    assert sorted(sources) == sorted(get_args(Meters))
    assert set(re.findall(r"measured_\w+|estimated", "".join(row[1] for row in table("energy.source")))) == set(
        get_args(Quality)
    )
    assert [row[0].strip("`") for row in table("heat.thrift")] == list(get_args(Level))


def test_every_field_of_energy_and_heat_is_told():
    for name in names(Energy) + names(Heat):
        assert name in PAGE, name


def test_settings_and_constants_are_those_of_the_code():
    assert set(re.findall(r"thermal\.(\w+)", PAGE)) | {"enabled"} == set(names(ThermalConfig))
    assert f"latest {N_IDLE} stretches" in PAGE
    assert f"It takes {WORDS[N_IDLE_MIN]} of them" in PAGE
    assert f"every {WORDS[LONGEST_TALK_S / 60]} minutes" in PAGE
    assert f"more than {MAX_GAP_S:g} s late" in PAGE
