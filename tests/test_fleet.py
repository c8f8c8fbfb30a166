"""Many devices on one broker, scaled down; `make soak SOAK=fleet` has a thousand."""

from brokers import needs_mosquitto
from soak import fleet


@needs_mosquitto
def test_no_final_of_a_fleet_is_lost(tmp_path):
    found = fleet.measure(tmp_path, n=20, n_processes=2, minutes=3, minute_s=0.5)
    assert fleet.failures(found) == []
    assert found["finals_repeated"] == 0
    assert found["messages"] + found["partials_dropped"] >= 20 * 3 * (1 + fleet.PARTIALS + fleet.REPORTS)
    assert found["bytes_per_device_hour"] > 60 * len(fleet.SENTENCE)


def test_a_loss_is_a_failure():
    assert fleet.failures({"finals_lost": 2}) == ["2 finals were lost"]
