"""The retained status over a real Mosquitto: what it says follows the agent, and never waits in the outbox."""

import pytest
from brokers import Subscriber, needs_mosquitto, wait_for
from test_mqtt import INFO

from agent.config import MqttConfig
from agent.mqtt import Publisher
from agent.outbox import Limits, MemoryOutbox
from agent.payloads import Condition

pytestmark = needs_mosquitto
LISTENING = Condition(microphone="listening", muted=False, hop_ms=300.0, outbox_messages=0)
LOST = Condition(microphone="lost", muted=True, hop_ms=None, outbox_messages=7)


class Agent:
    """A publisher, the condition it is to tell, and the promises it made."""

    def __init__(self, port):
        self.condition, self.promises_s = LISTENING, []
        self.outbox = MemoryOutbox(Limits(messages=100))
        config = MqttConfig(url=f"mqtt://127.0.0.1:{port}", device="dev", reconnect_min_s=0.1, reconnect_max_s=1.0)
        self.publisher = Publisher(
            config,
            self.outbox,
            INFO,
            lambda *_: None,
            condition=lambda: self.condition,
            beat=self.promises_s.append,
            rng=lambda: 0.0,
        )
        self.publisher.start()


@pytest.fixture
def agent(broker):
    agent = Agent(broker.port)
    yield agent
    agent.publisher.stop(0.5)


def conditions(subscriber):
    return [status["condition"] and status["condition"]["microphone"] for status in subscriber.on("status")]


def test_the_status_is_written_again_when_it_changes(broker, agent):
    with Subscriber(broker.port) as subscriber:
        wait_for(lambda: conditions(subscriber) == ["listening"])
        agent.condition = LOST
        agent.publisher.renew_status()
        wait_for(lambda: conditions(subscriber) == ["listening", "lost"])
        agent.publisher.stop(0.5)
        wait_for(lambda: conditions(subscriber) == ["listening", "lost", None])
    assert subscriber.on("status")[1]["condition"] == {
        "microphone": "lost",
        "muted": True,
        "hop_ms": None,
        "outbox_messages": 7,
    }


def test_news_while_the_broker_is_away_does_not_wait_in_the_outbox(broker, agent):
    wait_for(lambda: agent.publisher.is_connected)
    broker.kill()
    wait_for(lambda: not agent.publisher.is_connected)
    for condition in (LISTENING, LOST):
        agent.condition = condition
        agent.publisher.renew_status()
    assert agent.outbox.depth == 0
    broker.start()
    with Subscriber(broker.port) as subscriber:
        wait_for(lambda: conditions(subscriber)[-1:] == ["lost"])


def test_a_publisher_without_a_broker_says_that_it_lives(broker, agent):
    wait_for(lambda: agent.publisher.is_connected)
    broker.kill()
    wait_for(lambda: not agent.publisher.is_connected)
    n_promises = len(agent.promises_s)
    wait_for(lambda: len(agent.promises_s) > n_promises + 6)
    assert max(agent.promises_s) < 120
