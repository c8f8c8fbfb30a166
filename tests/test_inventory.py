import platform

import msgspec
import pytest

from agent import inventory
from agent.config import Config, VadConfig


@pytest.fixture
def machine(tmp_path):
    """Writes the files of a machine; the folder stands for its root."""

    def write(**files):
        for name, text in files.items():
            path = tmp_path / {"board": inventory.MODELS[0], "box": inventory.MODELS[1]}.get(name, name)
            path = tmp_path / {"vendor": inventory.VENDOR, "id": "etc/machine-id"}.get(name, path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def test_the_id_is_not_the_machine_id_and_stays(machine):
    secret = "0123456789abcdef0123456789abcdef"
    found = inventory.machine_id(machine(id=secret + "\n"))
    assert found == inventory.machine_id(machine(id=secret))
    assert len(found) == 32
    assert found != secret
    assert found != inventory.machine_id(machine(id=secret[::-1]))


@pytest.mark.parametrize("text", ["", "uninitialized\n"])
def test_no_id_rather_than_one_that_others_have_too(machine, text):
    assert inventory.machine_id(machine(id=text)) is None


def test_a_board_is_known_by_its_device_tree(machine):
    assert inventory.model(machine(board="Raspberry Pi 5 Model B Rev 1.0\0")) == "Raspberry Pi 5 Model B Rev 1.0"


@pytest.mark.parametrize(
    ("vendor", "box", "known"),
    [
        ("LENOVO\n", "ThinkCentre M75q\n", "LENOVO ThinkCentre M75q"),
        ("ASUS", "System Product Name", "ASUS"),
        ("Default string", "", None),
    ],
)
def test_a_pc_is_known_by_its_firmware(machine, vendor, box, known):
    assert inventory.model(machine(vendor=vendor, box=box)) == known


def test_nothing_is_made_up(tmp_path):
    found = inventory.hardware(tmp_path)
    assert (found.id, found.model, found.memory_bytes) == (None, None, None)
    assert found.architecture == platform.machine()


def test_this_machine(monkeypatch):
    assert inventory.hardware().n_cpus >= 1
    assert inventory.hardware().memory_bytes > 1e6
    assert inventory.system().kernel == platform.release()


def test_configurations_that_differ_have_other_hashes():
    base = inventory.config_sha256(Config())
    assert base == inventory.config_sha256(Config())
    assert base != inventory.config_sha256(msgspec.structs.replace(Config(), vad=VadConfig(start_ms=140)))
