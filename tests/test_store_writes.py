"""The durable outbox when nothing is wrong: what it keeps, for whom, in which order, and what it writes."""

import os
import stat
import threading
import time

import pytest
from brokers import wait_for
from outboxes import die
from test_outbox import Clock, envelope, fill, numbers

from agent import store as stores
from agent.messages import Envelope, Kind
from agent.outbox import Limits
from agent.spool import Spool
from agent.store import FILE
from whisperlet.errors import ConfigError

BATCH = 3  # of telemetry


@pytest.fixture(autouse=True)
def small_batch(monkeypatch):
    monkeypatch.setattr(stores, "TELEMETRY_BATCH", BATCH)


@pytest.fixture
def commits(monkeypatch):
    """What each commit wrote and deleted, as two numbers."""
    made = []

    def commit(self, inserts, deletes, plain=Spool.commit):
        inserts, deletes = list(inserts), list(deletes)
        plain(self, inserts, deletes)
        made.append((len(inserts), len(deletes)))

    monkeypatch.setattr(Spool, "commit", commit)
    return made


def test_files_are_for_nobody_else(boxes):
    boxes.folder.mkdir()
    (boxes.folder / FILE).touch(0o644)  # made by somebody less careful
    outbox = boxes.started()
    fill(outbox, "f")
    assert outbox.flush(20)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in boxes.folder.iterdir()}
    assert modes == dict.fromkeys((FILE, f"{FILE}-wal", f"{FILE}-shm", "outbox.lock"), 0o600)


def test_a_new_folder_is_for_nobody_else(boxes):
    boxes.started(folder=boxes.folder / "new")
    assert stat.S_IMODE((boxes.folder / "new").stat().st_mode) == 0o700


def test_a_second_agent_is_told_who_is_there(boxes):
    first = boxes.started()
    with pytest.raises(ConfigError) as refused:
        boxes.started()
    assert str(refused.value) == (
        f"outbox.dir: {boxes.folder}: another agent, process {os.getpid()}, keeps its messages there"
    )
    first.close()
    boxes.started()


def test_messages_outlive_the_agent_and_say_that_they_are_late(boxes):
    first = boxes.started()
    fill(first, "fet")
    first.close()
    second = boxes.started()
    second.put(envelope(Kind.FINAL, 3))
    assert second.flush(20)
    found = [(int(message.payload), message.kind, message.historical) for _, message in second.take(9)]
    assert found == [
        (0, Kind.FINAL, True),
        (1, Kind.EVENT, True),
        (2, Kind.TELEMETRY, True),
        (3, Kind.FINAL, False),
    ]
    assert second.restored() == {Kind.FINAL: 1, Kind.EVENT: 1, Kind.TELEMETRY: 1}
    assert second.stored() == {Kind.FINAL: 1}


def test_a_message_is_sent_only_once_it_is_on_disk(boxes, monkeypatch):
    may_write, writes = threading.Event(), threading.Event()

    def commit(self, *args, plain=Spool.commit):
        writes.set()
        may_write.wait(20)
        plain(self, *args)

    monkeypatch.setattr(Spool, "commit", commit)
    outbox = boxes.started()
    woken = threading.Event()
    outbox.put(envelope(Kind.TELEMETRY, 0))
    began = time.monotonic()
    outbox.put(envelope(Kind.FINAL, 1))
    assert writes.wait(20)
    outbox.watch(woken.set)
    outbox.put(envelope(Kind.TELEMETRY, 2))
    assert numbers(outbox.take(9)) == [0]  # nothing overtakes the final
    assert not outbox.flush(0.01)
    assert time.monotonic() - began < 15, "somebody waited for the disk"
    woken.clear()
    may_write.set()
    assert outbox.flush(20)
    assert woken.wait(20)
    assert numbers(outbox.take(9)) == [1, 2]


def test_what_is_sent_at_once_costs_no_write(boxes, commits):
    outbox = boxes.started(delete_after_s=60)
    for _ in range(2 * BATCH):
        fill(outbox, "t")
        outbox.ack(outbox.take(1)[0][0])
    assert commits == []
    fill(outbox, "t" * BATCH)
    wait_for(lambda: commits == [(BATCH, 0)])


def test_deletes_are_grouped(boxes, commits):
    outbox = boxes.started(delete_after_s=60)
    for n in range(5):
        outbox.put(envelope(Kind.FINAL, n))
        assert outbox.flush(20)
        outbox.ack(outbox.take(1)[0][0])
    assert commits == [(1, 0), (1, 1), (1, 1), (1, 1), (1, 1)]  # each delete came with the next final
    outbox.close()
    assert commits[5:] == [(0, 1)]


def test_what_is_delivered_while_it_is_written_does_not_come_back(boxes, monkeypatch):
    outbox = boxes()
    outbox._open()
    fill(outbox, "t" * BATCH)
    taken = outbox.take(BATCH)

    def commit(self, *args, plain=Spool.commit):
        plain(self, *args)
        while taken:
            outbox.ack(taken.pop()[0])

    monkeypatch.setattr(Spool, "commit", commit)
    assert outbox.commit()
    assert outbox.commit()
    die(outbox)
    assert boxes.started().restored() == {}


def test_deletes_do_not_wait_for_ever(boxes, commits):
    outbox = boxes.started(delete_after_s=0.01)
    fill(outbox, "f")
    assert outbox.flush(20)
    outbox.ack(outbox.take(1)[0][0])
    wait_for(lambda: commits == [(1, 0), (0, 1)])


@pytest.mark.parametrize("boot_s", [0.0, 1e9])
def test_ages_outlive_a_restart_and_a_clock_that_was_set(boxes, monkeypatch, boot_s):
    clock = Clock()
    limits = Limits(messages=99, age_s=3600)
    first = boxes.started(limits, clock=clock)
    first.put(envelope(Kind.FINAL, 0))
    clock.now_s += 3000
    first.put(envelope(Kind.FINAL, 1))
    first.close()
    monkeypatch.setattr(time, "time", lambda: 4e9)  # the time is set to 2096
    clock.now_s = boot_s  # and the machine was started anew
    second = boxes.started(limits, clock=clock)
    assert numbers(second.take(9)) == [0, 1]
    second.requeue()
    clock.now_s += 601
    assert numbers(second.take(9)) == [1]
    assert second.dropped() == {Kind.FINAL: 1}


def test_clock_of_the_machine_is_not_the_time_of_day():
    assert abs(stores.uptime_s() - time.time()) > 1e6


def test_many_messages_cost_little_memory_each(boxes):
    outbox = boxes.started()
    fill(outbox, "f" * 200)
    assert outbox.flush(20)
    waiting = [entry for queue in outbox._waiting.values() for entry in queue]
    assert len(waiting) == 200
    assert all(entry.envelope is None for entry in waiting)


def test_the_file_stays_near_its_bound(boxes):
    outbox = boxes.started(Limits(messages=10_000, bytes=300_000))
    for n in range(40):
        for _ in range(50):
            outbox.put(Envelope("topic", b"x" * 700, Kind.FINAL))
        assert outbox.flush(20), n
    outbox.close()
    assert (boxes.folder / FILE).stat().st_size < 1.33 * 300_000 + 100_000
    assert outbox.dropped()[Kind.FINAL] > 1600
