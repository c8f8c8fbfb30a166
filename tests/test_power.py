"""Sources of energy, on trees of files as devices have them."""

import pytest

from agent.config import PowerConfig
from agent.power import Model, Rapl, Sampled, battery, hwmon, pmic_watts, power_source, rpi_pmic
from agent.sysfs import number, vcgencmd

PMIC = """
     3V7_WL_SW_A current(0)=0.10000000A
       3V3_SYS_A current(1)=0.20000000A
      VDD_CORE_A current(7)=1.50000000A
     3V7_WL_SW_V volt(8)=3.70000000V
       3V3_SYS_V volt(9)=3.30000000V
      VDD_CORE_V volt(15)=0.80000000V
         EXT5V_V volt(24)=5.15000000V
          BATT_V volt(25)=0.00000000V
"""
PMIC_WATTS = 0.37 + 0.66 + 1.2


def tree(root, **files):
    """A folder with files; `a__b` stands for a/b."""
    for name, value in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
    return root


def zone(root, directory, name, energy_uj, range_uj=1_000_000):
    tree(root / directory, name=name, energy_uj=energy_uj, max_energy_range_uj=range_uj)


def test_energy_of_all_packages_and_of_nothing_twice(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 100)
    zone(tmp_path, "intel-rapl:1", "package-1", 100)
    for directory, name in (("intel-rapl:0:0", "core"), ("intel-rapl:2", "psys"), ("intel-rapl-mmio:0", "package-0")):
        zone(tmp_path, directory, name, 0)
    source = Rapl.found(tmp_path)
    for directory in ("intel-rapl:0:0", "intel-rapl:2", "intel-rapl-mmio:0"):
        (tmp_path / directory / "energy_uj").write_text("77000")
    zone(tmp_path, "intel-rapl:0", "package-0", 500_100)
    zone(tmp_path, "intel-rapl:1", "package-1", 250_100)
    assert source.spent(0.0) == 0.75
    assert source.spent(0.0) == 0.0
    assert (source.name, source.quality) == ("rapl", "measured_package")


def test_energy_counter_wraps_around(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    source = Rapl.found(tmp_path)
    zone(tmp_path, "intel-rapl:0", "package-0", 100_000)
    assert source.spent(0.0) == pytest.approx(0.2)
    zone(tmp_path, "intel-rapl:0", "package-0", 5, range_uj="")
    unknown_range = Rapl.found(tmp_path)
    zone(tmp_path, "intel-rapl:0", "package-0", 0, range_uj="")
    assert unknown_range.spent(0.0) is None


def test_a_counter_that_could_not_be_read_leaves_a_gap(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    zone(tmp_path, "intel-rapl:1", "package-1", 0)
    source = Rapl.found(tmp_path)
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()  # as good as unreadable, which root never sees
    assert source.spent(0.0) is None
    assert Rapl.found(tmp_path) is None
    zone(tmp_path, "intel-rapl:1", "package-1", 0)
    assert source.spent(0.0) is None  # since when?
    assert source.spent(0.0) == 0.0


def test_watts_become_joules():
    watts = iter([2.0, 4.0, 4.0, None, 4.0, 4.0, 4.0])
    source = Sampled("hwmon", "measured_rail", lambda: next(watts))
    spent = [source.spent(now_s) for now_s in (10.0, 12.0, 13.0, 14.0, 15.0, 16.0, 100.0)]
    assert spent == [None, 6.0, 4.0, None, None, 4.0, None]


def test_a_shunt_monitor_with_a_single_channel(tmp_path):
    tree(tmp_path, hwmon0__name="ina219", hwmon0__power1_input=2_500_000, hwmon0__in1_input=5000)
    tree(tmp_path, hwmon1__name="amdgpu", hwmon1__power1_average=90_000_000)
    tree(tmp_path, hwmon2__name="nvme", hwmon2__temp1_input=40_000)
    source = hwmon(tmp_path, None)
    assert (source.name, source.quality) == ("hwmon", "measured_rail")
    assert [source.spent(0.0), source.spent(2.0)] == [None, 5.0]


def test_volts_times_amperes_where_there_are_no_watts(tmp_path):
    tree(tmp_path, hwmon0__name="ina3221", hwmon0__in1_label="VDD_IN", hwmon0__in2_label="VDD_CPU_GPU_CV")
    for n, (millivolts, milliamperes) in enumerate([(5000, 800), (5000, 300)], 1):
        tree(tmp_path / "hwmon0", **{f"in{n}_input": millivolts, f"curr{n}_input": milliamperes})
    source = hwmon(tmp_path, None)
    assert source.quality == "measured_board"
    assert [source.spent(0.0), source.spent(1.0)] == [None, 4.0]
    rail = hwmon(tmp_path, "ina3221/VDD_CPU_GPU_CV")
    assert rail.quality == "measured_rail"
    assert [rail.spent(0.0), rail.spent(1.0)] == [None, 1.5]
    assert hwmon(tmp_path, "ina3221/VDD_SOC") is None


def test_one_of_several_rails_would_be_a_guess(tmp_path, caplog):
    for n in (1, 2):
        tree(tmp_path / "hwmon0", name="ina3221", **{f"power{n}_input": 1000, f"power{n}_label": f"RAIL{n}"})
    assert hwmon(tmp_path, None) is None
    assert "set one of ina3221/RAIL1, ina3221/RAIL2" in caplog.text


def test_another_chip_has_to_be_chosen(tmp_path):
    tree(tmp_path, hwmon0__name="amdgpu", hwmon0__power1_average=9_000_000, hwmon0__power1_label="PPT")
    assert hwmon(tmp_path, None) is None
    assert hwmon(tmp_path, "amdgpu/PPT").quality == "measured_rail"


def test_acpis_meter_is_of_the_whole_machine(tmp_path):
    tree(tmp_path, hwmon3__name="power_meter", hwmon3__power1_average=120_000_000)
    source = hwmon(tmp_path, None)
    assert source.quality == "measured_board"
    assert [source.spent(0.0), source.spent(0.5)] == [None, 60.0]


def test_rails_of_a_raspberry_pi_5():
    assert pmic_watts(PMIC) == pytest.approx(PMIC_WATTS)
    source = rpi_pmic({"pmic_read_adc": PMIC}.get)
    assert (source.name, source.quality) == ("rpi_pmic", "measured_rail")
    assert [source.spent(0.0), source.spent(2.0)] == [None, pytest.approx(2 * PMIC_WATTS)]


@pytest.mark.parametrize("answer", ["", 'error=2 error_msg="Invalid command"', PMIC.replace("VDD_CORE_V", "VDD_X_V")])
def test_a_firmware_that_does_not_tell_all_is_not_believed(answer):
    assert pmic_watts(answer) is None
    assert rpi_pmic(lambda _command: answer) is None


@pytest.mark.parametrize(
    ("files", "watts"),
    [
        ({"power_now": 6_000_000}, 6.0),
        ({"power_now": -6_000_000}, 6.0),
        ({"current_now": 1_200_000, "voltage_now": 11_000_000}, 13.2),
        ({"current_now": -1_200_000, "voltage_now": 11_000_000}, 13.2),
    ],
)
def test_a_battery_tells_what_the_device_uses(tmp_path, files, watts):
    pack = tree(tmp_path / "BAT0", type="Battery", status="Discharging", **files)
    tree(tmp_path / "AC", type="Mains", online=0)
    source = battery(tmp_path)
    assert (source.name, source.quality) == ("battery", "measured_board")
    assert [source.spent(0.0), source.spent(2.0)] == [None, pytest.approx(2 * watts)]
    tree(pack, status="Charging")  # then it says what goes in, and the mains feed the device
    assert source.spent(4.0) is None
    tree(pack, status="Discharging")
    assert [source.spent(6.0), source.spent(8.0)] == [None, pytest.approx(2 * watts)]


def test_a_battery_that_tells_only_what_is_left(tmp_path):
    pack = tree(tmp_path / "BAT0", type="Battery", status="Discharging", energy_now=50_000_000)
    source = battery(tmp_path)
    tree(pack, energy_now=49_990_000)  # 10 mWh less
    assert source.spent(0.0) == pytest.approx(36.0)
    tree(pack, energy_now=49_995_000)  # it was charged in between
    assert source.spent(0.0) is None
    tree(pack, status="Full")
    assert source.spent(0.0) is None


def test_two_batteries_of_which_one_rests(tmp_path):
    tree(tmp_path / "BAT0", type="Battery", status="Discharging", power_now=5_000_000)
    second = tree(tmp_path / "BAT1", type="Battery", status="Not charging", power_now=0)
    source = battery(tmp_path)
    assert [source.spent(0.0), source.spent(1.0)] == [None, 5.0]
    tree(second, status="Charging")
    assert source.spent(2.0) is None


def test_the_battery_of_a_mouse_feeds_no_device(tmp_path):
    tree(tmp_path / "hidpp_battery_0", type="Battery", scope="Device", status="Discharging", power_now=1)
    assert battery(tmp_path) is None


def devices(root):
    """Every kind of meter, below one sysfs."""
    tree(root / "class/hwmon/hwmon0", name="ina226", power1_input=1_000_000)
    zone(root / "class/powercap", "intel-rapl:0", "package-0", 0)
    tree(root / "class/power_supply/BAT0", type="Battery", status="Discharging", power_now=1)
    return root


def names_by_preference(root, firmware, core_watts=None):
    """What is taken as one after the other goes away."""
    for kind in ("hwmon", "powercap", "power_supply", "none"):
        source = power_source(PowerConfig(sysfs_dir=str(root), core_watts=core_watts), lambda: 0.0, firmware)
        yield source.name if source else None
        if (root / "class" / kind).exists():
            (root / "class" / kind).rename(root / f"away {kind}")


def test_what_measures_most_is_preferred_and_an_estimate_comes_last(tmp_path):
    assert list(names_by_preference(devices(tmp_path / "a"), lambda _: "", 3.0)) == [
        "hwmon",
        "rapl",
        "battery",
        "model",
    ]
    found = list(names_by_preference(devices(tmp_path / "b"), {"pmic_read_adc": PMIC}.get))
    assert found == ["hwmon", "rpi_pmic", "rpi_pmic", "rpi_pmic"]


def test_energy_is_never_guessed(tmp_path, caplog):
    caplog.set_level("INFO")
    assert power_source(PowerConfig(sysfs_dir=str(tmp_path)), lambda: 1.0, lambda _: "") is None
    assert "energy is not reported" in caplog.text


def test_the_configured_source_or_none(tmp_path):
    root = devices(tmp_path)

    def chosen(source, **config):
        found = power_source(PowerConfig(source=source, sysfs_dir=str(root), **config), lambda: 2.0, lambda _: "")
        return found.name if found else None

    assert [chosen(name) for name in ("rapl", "battery", "rpi_pmic", "none")] == ["rapl", "battery", None, None]
    assert chosen("model", core_watts=3.0) == "model"


def test_the_estimate_says_so():
    core_s = iter([2.0, 0.5])
    source = Model(lambda: next(core_s), 4.0)
    assert (source.spent(0.0), source.spent(0.0), source.quality) == (8.0, 2.0, "estimated")


def test_a_file_without_a_number(tmp_path):
    for contents in (b"", b"n/a", b"\xff\xfe", b"1.5"):
        (tmp_path / "file").write_bytes(contents)
        assert number(tmp_path / "file") is None
    (tmp_path / "file").write_text("-12\n")
    assert number(tmp_path / "file") == -12
    assert number(tmp_path) is None


@pytest.mark.parametrize(
    ("script", "answer"),
    [
        ("echo throttled=0x0; exit 0", "throttled=0x0"),
        ("echo no; exit 1", ""),
        ("printf '\\377'", ""),
        ("sleep 60", ""),
    ],
)
def test_the_firmwares_program(tmp_path, monkeypatch, script, answer):
    program = tmp_path / "vcgencmd"
    program.write_text(f"#!/bin/sh\n[ $1 = get_throttled ] || exit 9\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("agent.sysfs.TIMEOUT_S", 0.3 if "sleep" in script else 20.0)
    assert vcgencmd("get_throttled") == answer


def test_without_the_firmwares_program(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert vcgencmd("get_throttled") == ""
