"""One suite for both outboxes: `outbox_of` makes an empty one that holds so many messages."""

import itertools
import threading
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.messages import Envelope, Kind
from agent.mqtt import Outbox
from agent.outbox import LATE_S, Limits, MemoryOutbox
from agent.store import DurableOutbox

ORDER = (Kind.PARTIAL, Kind.TELEMETRY, Kind.EVENT, Kind.FINAL)


class Prompt(DurableOutbox):
    """Writes at once, in the caller's thread."""

    one_at_a_time = threading.Lock()

    def put(self, envelope):
        message_id = super().put(envelope)
        with self.one_at_a_time:
            self.commit()
        return message_id


@pytest.fixture(params=["in memory", "on disk"])
def outbox_of(request, tmp_path):
    made = []

    def make(capacity, **limits):
        limits = Limits(messages=capacity, **limits)
        clock = Clock()
        folder = tmp_path / str(len(made))
        made.append(
            MemoryOutbox(limits, clock=clock)
            if request.param == "in memory"
            else Prompt(folder, limits, pytest.fail, clock=clock)
        )
        made[-1].time = clock
        return made[-1]

    yield make
    for outbox in made:
        outbox.close()


class Clock:
    """Stands still until it is moved."""

    now_s = 1000.0

    def __call__(self):
        return self.now_s


def envelope(kind, n=0):
    return Envelope("topic", str(n).encode(), kind)


def fill(outbox, kinds):
    """One message a letter: Telemetry, Event, Final, numbered."""
    by_letter = {"p": Kind.PARTIAL, "t": Kind.TELEMETRY, "e": Kind.EVENT, "f": Kind.FINAL}
    return [outbox.put(envelope(by_letter[letter], n)) for n, letter in enumerate(kinds)]


def numbers(taken):
    return [int(message.payload) for _, message in taken]


def test_is_what_the_publisher_wants(outbox_of):
    outbox: Outbox = outbox_of(10)
    assert (outbox.depth, outbox.take(5), outbox.dropped()) == (0, [], {})


def test_order_is_kept_over_all_kinds(outbox_of):
    outbox = outbox_of(10)
    ids = fill(outbox, "ftefpt")
    assert ids == sorted(set(ids))
    assert numbers(outbox.take(4)) == [0, 1, 2, 3]
    assert numbers(outbox.take(4)) == [4, 5]


def test_what_is_taken_counts_until_it_is_acknowledged(outbox_of):
    outbox = outbox_of(10)
    fill(outbox, "fff")
    (first, _), (second, _) = outbox.take(2)
    assert outbox.depth == 3
    outbox.ack(second)
    outbox.ack(first)
    assert outbox.depth == 1
    assert outbox.stored() == {Kind.FINAL: 3}
    assert outbox.sent() == {Kind.FINAL: 2}


def test_discarded_messages_are_gone_and_counted(outbox_of):
    outbox = outbox_of(10)
    fill(outbox, "ef")
    outbox.discard(outbox.take(1)[0][0])
    outbox.requeue()
    assert numbers(outbox.take(9)) == [1]
    assert outbox.dropped() == {Kind.EVENT: 1}
    assert outbox.sent() == {}


def test_a_message_that_is_put_back_waits_in_its_place(outbox_of):
    outbox = outbox_of(10)
    fill(outbox, "fff")
    (first, _), (second, _) = outbox.take(2)
    outbox.put_back(second)
    outbox.put_back(first)
    assert numbers(outbox.take(9)) == [0, 1, 2]
    assert outbox.dropped() == {}


def test_requeued_messages_come_first_and_in_order(outbox_of):
    outbox = outbox_of(10)
    fill(outbox, "ftft")
    taken = outbox.take(3)
    outbox.ack(taken[1][0])
    outbox.put(envelope(Kind.EVENT, 9))
    outbox.requeue()
    assert numbers(outbox.take(9)) == [0, 2, 3, 9]


@pytest.mark.parametrize(
    ("before", "new", "left"),
    [
        ("ftet", "t", [0, 1, 2, 4]),  # every second telemetry
        ("ftef", "t", [0, 2, 3, 4]),  # ... and a single one
        ("ftet", "f", [0, 1, 2, 4]),
        ("fefe", "f", [0, 2, 3, 4]),  # then the oldest event
        ("fefe", "e", [0, 2, 3, 4]),
        ("ffff", "f", [1, 2, 3, 4]),  # finals last
        ("fefe", "t", [0, 1, 2, 3]),  # the new one is the least important
        ("ffff", "e", [0, 1, 2, 3]),
        ("tpft", "f", [0, 2, 3, 4]),  # a partial is worth nothing later
    ],
)
def test_policy_at_the_bound(outbox_of, before, new, left):
    outbox = outbox_of(4)
    ids = fill(outbox, before + new)
    assert (ids[-1] is None) == (4 not in left)
    assert outbox.depth == 4
    assert numbers(outbox.take(9)) == left
    assert sum(outbox.dropped().values()) == 1


def test_telemetry_is_thinned_over_the_whole_time(outbox_of):
    outbox = outbox_of(9)
    fill(outbox, "f" + "t" * 8 + "f")
    assert numbers(outbox.take(99)) == [0, 1, 3, 5, 7, 9]
    assert outbox.dropped() == {Kind.TELEMETRY: 4}


def test_bytes_are_bounded(outbox_of):
    outbox = outbox_of(100, bytes=1000)
    for n in range(20):
        outbox.put(Envelope("topic", b"x" * (100 + n), Kind.FINAL))
        assert outbox.bytes <= 1000
    assert outbox.depth == 4
    assert outbox.put(Envelope("topic", b"x" * 1000, Kind.FINAL)) is None  # and it made no room in vain
    assert outbox.dropped() == {Kind.FINAL: 17}


def test_what_is_too_old_goes_and_what_is_late_says_so(outbox_of):
    outbox = outbox_of(100, age_s=3600, telemetry_age_s=600)
    fill(outbox, "tft")
    assert [message.historical for _, message in outbox.take(1)] == [False]
    outbox.time.now_s += LATE_S + 1
    outbox.requeue()
    assert [message.historical for _, message in outbox.take(1)] == [True]
    outbox.time.now_s += 600
    assert numbers(outbox.take(9)) == [1]  # 0 is in flight: it may have arrived
    outbox.requeue()
    assert numbers(outbox.take(9)) == [1]
    assert outbox.dropped() == {Kind.TELEMETRY: 2}
    outbox.requeue()
    outbox.time.now_s += 3600
    assert outbox.take(9) == []


def test_what_is_in_flight_is_never_dropped(outbox_of):
    outbox = outbox_of(2)
    fill(outbox, "tt")
    taken = outbox.take(2)
    assert outbox.put(envelope(Kind.FINAL, 9)) is None
    assert outbox.dropped() == {Kind.FINAL: 1}
    outbox.ack(taken[0][0])
    assert outbox.put(envelope(Kind.FINAL, 9)) is not None
    outbox.requeue()
    assert numbers(outbox.take(9)) == [1, 9]


def test_several_threads_lose_nothing(outbox_of):
    outbox = outbox_of(10_000)
    producers = [threading.Thread(target=fill, args=(outbox, "f" * 100)) for _ in range(4)]
    for producer in producers:
        producer.start()
    arrived = 0
    while arrived < 400:
        for message_id, _ in outbox.take(7):
            outbox.ack(message_id)
            arrived += 1
    for producer in producers:
        producer.join()
    assert outbox.depth == 0
    assert outbox.sent() == outbox.stored() == {Kind.FINAL: 400}


class Model:
    """The same in a list: slow, and plain to see."""

    def __init__(self, capacity):
        self.capacity, self.waiting, self.in_flight = capacity, [], []
        self.dropped = Counter()

    def put(self, n, kind):
        self.waiting.append((n, kind))
        if len(self.waiting) + len(self.in_flight) > self.capacity:
            old = [(ORDER.index(k), i, k) for i, k in self.waiting if i != n and ORDER.index(k) <= ORDER.index(kind)]
            victims = [min(old, default=(None, n, kind))[1:]]  # the new one, if there is no other
            if victims[0][1] is Kind.TELEMETRY and victims[0][0] != n:
                reports = [(i, k) for _, i, k in sorted(old) if k is Kind.TELEMETRY]
                victims = reports[1::2] or reports
            for victim in victims:
                self.waiting.remove(victim)
                self.dropped[victim[1]] += 1

    def take(self, limit):
        taken, self.waiting = self.waiting[:limit], self.waiting[limit:]
        self.in_flight += taken
        return taken

    def requeue(self):
        self.waiting, self.in_flight = sorted(self.in_flight + self.waiting), []


ACTIONS = st.one_of(
    st.tuples(st.just("put"), st.sampled_from(ORDER)),
    st.tuples(st.just("take"), st.integers(0, 4)),
    st.tuples(st.sampled_from(["ack", "discard"]), st.integers(0, 3)),
    st.tuples(st.just("requeue"), st.none()),
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(capacity=st.integers(1, 6), actions=st.lists(ACTIONS, max_size=40))
def test_does_what_its_model_does(outbox_of, capacity, actions):
    outbox, model, fresh = outbox_of(capacity), Model(capacity), itertools.count()
    ids = {}  # by number
    for action, argument in actions:
        if action == "put":
            outbox.put(envelope(argument, n := next(fresh)))
            model.put(n, argument)
        elif action == "take":
            taken = outbox.take(argument)
            ids |= {int(message.payload): message_id for message_id, message in taken}
            assert [(int(message.payload), message.kind) for _, message in taken] == model.take(argument)
        elif action == "requeue":
            outbox.requeue()
            model.requeue()
        elif argument < len(model.in_flight):
            n, kind = model.in_flight.pop(argument)
            getattr(outbox, action)(ids[n])
            model.dropped[kind] += action == "discard"
        assert outbox.depth == len(model.waiting) + len(model.in_flight)
        assert Counter(outbox.dropped()) == model.dropped
