"""The soak's first kills; `make soak` has a hundred."""

from brokers import needs_mosquitto
from soak import outbox


@needs_mosquitto
def test_nothing_stored_is_lost_when_the_agent_is_killed(tmp_path):
    result = outbox.run(tmp_path, n_finals=200, n_kills=5, n_restarts=2)
    assert outbox.failures(result) == []
    assert (result["kills"], result["broker_restarts"]) == (5, 2)
    assert result["finals_stored"] >= 150
    assert result["finals_stored"] + result["in_flight_at_a_kill"] == result["finals_put"] == 200
