"""The durable outbox with its file or its disk at fault."""

import os
import sqlite3
import subprocess

import pytest
from brokers import wait_for
from outboxes import Boxes, die
from test_outbox import envelope, fill, numbers

from agent import store as stores
from agent.messages import Envelope, Kind
from agent.spool import KEEP_ASIDE, _crc
from agent.store import FILE, TELEMETRY_BATCH


def left_by_a_crash(boxes, kinds, **options):
    """Files of an outbox that was killed with these messages on disk."""
    outbox = boxes(**options)
    outbox._open()
    fill(outbox, kinds)
    outbox.commit()
    die(outbox)
    return boxes.folder / FILE


def taken(outbox, limit=99):
    """Numbers of what can be taken, once there is something."""
    return numbers(wait_for(lambda: outbox.take(limit)))


def cut(path):
    path.write_bytes(path.read_bytes()[:5000])


def empty_head(path):
    content = path.read_bytes()
    path.write_bytes(b"\0" * 200 + content[200:])


def noise(path):
    path.write_bytes(b"what is this? " * 5000)


def flip_a_payload(path):
    content = path.read_bytes()
    assert content.count(b"needle") == 1
    path.write_bytes(content.replace(b"needle", b"noodle"))


def other_version(path):
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()


def no_table(path):
    with sqlite3.connect(path) as database:
        database.execute("DROP TABLE messages")
    database.close()


def unknown_kind(path):
    """As a later version may have written it."""
    fields = ("gossip", "topic", 1, 0, 1.0, b"?")
    with sqlite3.connect(path) as database:
        update = "UPDATE messages SET kind = ?, topic = ?, qos = ?, retain = ?, born_s = ?, payload = ?, crc = ?"
        database.execute(f"{update} WHERE id = 5", (*fields, _crc(fields)))
    database.close()


@pytest.mark.parametrize(
    ("harm", "n_saved"),
    [
        (cut, None),
        (empty_head, 0),
        (noise, 0),
        (flip_a_payload, 60),
        (other_version, 61),
        (no_table, 0),
        (unknown_kind, 60),
    ],
)
def test_a_damaged_file_is_set_aside_and_reported(boxes, harm, n_saved):
    outbox = boxes.started(delete_after_s=60)
    for n in range(61):
        body = b"needle" if n == 30 else str(n).encode()
        outbox.put(Envelope("topic", body + b" " * 300, Kind.FINAL))
    outbox.close()  # everything is in the file itself
    harm(boxes.folder / FILE)
    outbox = boxes.started()
    (name, detail), *rest = boxes.events
    assert (name, rest) == ("outbox_damaged", [])
    (aside,) = boxes.folder.glob(f"{FILE}.corrupt-*Z")
    n = outbox.depth
    assert detail.endswith(f"; set aside as {aside.name}, {n} messages saved")
    assert n == n_saved if n_saved is not None else n < 61
    bodies = [message.payload.strip() for _, message in outbox.take(99)]
    assert len(bodies) == n
    assert set(bodies) <= {b"needle", *(str(n).encode() for n in range(61))}
    assert [int(body) for body in bodies if body != b"needle"] == sorted(int(b) for b in bodies if b != b"needle")
    outbox.requeue()
    fill(outbox, "f")
    assert outbox.flush(20)
    assert len(outbox.take(99)) == n + 1


def test_damaged_files_do_not_fill_the_disk(boxes):
    for _ in range(KEEP_ASIDE + 2):
        noise(left_by_a_crash(boxes, "f"))
    boxes.started()
    assert len(list(boxes.folder.glob("*.corrupt-*"))) <= 3 * KEEP_ASIDE
    bases = [path for path in boxes.folder.glob("*.corrupt-*") if not path.name.endswith(("-wal", "-shm"))]
    assert len(bases) == KEEP_ASIDE


def test_damage_while_at_work_costs_what_was_damaged(boxes):
    outbox = boxes.started()
    fill(outbox, "fefef")
    assert outbox.flush(20)
    with sqlite3.connect(boxes.folder / FILE) as database:
        database.execute("UPDATE messages SET payload = 'x' WHERE id = 3")
    database.close()
    arrived = []

    def deliver():
        for message_id, message in outbox.take(2):
            arrived.append(int(message.payload))
            outbox.ack(message_id)
        return outbox.depth == 0

    wait_for(deliver, 20)
    assert arrived == [0, 1, 3, 4]
    assert outbox.dropped() == {Kind.FINAL: 1}
    assert boxes.names == ["outbox_damaged"]


def test_a_file_that_was_taken_away_is_made_again(boxes):
    outbox = boxes.started()
    fill(outbox, "fff")
    assert outbox.flush(20)
    outbox.take(1)
    for path in boxes.folder.glob(f"{FILE}*"):
        path.unlink()
    outbox.put(envelope(Kind.FINAL, 3))
    assert outbox.flush(20)
    outbox.close()
    assert boxes.events == [("outbox_damaged", "the file is not the same any more; 2 messages lost")]
    assert outbox.dropped() == {Kind.FINAL: 2}
    assert taken(boxes.started()) == [0, 3]  # the first was in flight, so in memory too


def test_what_is_in_flight_is_not_lost_with_the_file(boxes):
    outbox = boxes()
    outbox._open()
    fill(outbox, "t" * TELEMETRY_BATCH)
    assert len(outbox.take(2)) == 2
    assert outbox.commit()
    for path in boxes.folder.glob(f"{FILE}*"):
        path.unlink()
    assert outbox.commit()
    outbox.requeue()
    assert numbers(outbox.take(99)) == [0, 1]
    assert outbox.dropped() == {Kind.TELEMETRY: TELEMETRY_BATCH - 2}


def test_without_a_folder_it_works_in_memory_until_there_is_one(boxes):
    elsewhere = Boxes(boxes.folder.with_name("elsewhere"))
    left_by_a_crash(elsewhere, "fe")
    boxes.folder.write_text("this is no folder")
    outbox = boxes.started()
    assert boxes.names == ["outbox_not_stored"]
    for n in (2, 3):
        outbox.put(envelope(Kind.FINAL, n))
    ((first, message),) = outbox.take(1)
    assert int(message.payload) == 2
    boxes.folder.unlink()
    elsewhere.folder.rename(boxes.folder)
    wait_for(lambda: "outbox_stored_again" in boxes.names)
    outbox.ack(first)
    assert taken(outbox) == [0, 1, 3]  # what an earlier run left is older
    outbox.close()
    assert taken(boxes.started()) == [0, 1, 3]


@pytest.fixture
def small_disk(boxes):
    """A file system of 1 MB at the outbox's folder."""
    boxes.folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(boxes.folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this user cannot mount a small file system")
    yield boxes.folder
    boxes.close()
    subprocess.run(["umount", str(boxes.folder)], check=True)


def fill_disk(folder):
    with (folder / "ballast").open("wb", buffering=0) as ballast:
        while True:
            try:
                ballast.write(b"\0" * 4096)
            except OSError:
                return


@pytest.mark.parametrize("when", ["before the start", "later"])
def test_a_full_disk_is_survived_and_left_behind(small_disk, boxes, when):
    if when == "before the start":
        left_by_a_crash(boxes, "fff")
        fill_disk(small_disk)
        outbox = boxes.started()
    else:
        outbox = boxes.started()
        fill(outbox, "fff")
        assert outbox.flush(20)
        fill_disk(small_disk)
    n = 3
    while not outbox.trouble:
        outbox.put(envelope(Kind.FINAL, n))
        n += 1
        outbox.flush(0.2)
    for _ in range(10):
        outbox.put(envelope(Kind.FINAL, n))
        n += 1
    assert not outbox.flush(0.2)
    assert boxes.names == ["outbox_not_stored"]
    first = outbox.take(5)
    assert len(first) == 5, "it must go on sending"
    for message_id, _ in first:
        outbox.ack(message_id)
    (small_disk / "ballast").unlink()
    assert outbox.flush(20)
    wait_for(lambda: boxes.names == ["outbox_not_stored", "outbox_stored_again"])
    rest = taken(outbox)
    assert sorted(numbers(first) + rest) == list(range(n))
    assert rest == sorted(rest)
    assert outbox.dropped() == {}


def test_without_a_disk_memory_is_bounded(boxes, monkeypatch):
    monkeypatch.setattr(stores, "MEMORY_BYTES", 1000)
    boxes.folder.write_text("this is no folder")
    outbox = boxes.started()
    fill(outbox, "tttf" * 20)
    assert outbox._pending.bytes == outbox.bytes <= 1000
    assert outbox.dropped()[Kind.TELEMETRY] == 60
    assert numbers(outbox.take(99)) == [4 * n + 3 for n in range(20 - outbox.depth, 20)]
