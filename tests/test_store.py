"""The durable outbox against a model, with crashes, full disks, damaged files and time between any two steps."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from outboxes import die
from test_outbox import ORDER, Clock, Model, envelope

from agent import store as stores
from agent.messages import Kind
from agent.outbox import Limits
from agent.store import FILE, DurableOutbox

DURABLE = (Kind.EVENT, Kind.FINAL)
BATCH = 3  # of telemetry
MEMORY = Path("/dev/shm")  # where there is nothing to wait for


@pytest.fixture(autouse=True)
def small_batch(monkeypatch):
    monkeypatch.setattr(stores, "TELEMETRY_BATCH", BATCH)


class DiskModel(Model):
    """What the outbox promises over restarts, in lists."""

    def __init__(self, capacity):
        super().__init__(capacity)
        self.disk = []  # (n, kind), acknowledged ones too until that is committed
        self.born_s, self.now_s = {}, 0.0
        self.max_age_s = {kind: 50.0 if kind is Kind.TELEMETRY else 100.0 for kind in ORDER}

    def put(self, n, kind):
        self.expire()
        self.born_s[n] = self.now_s
        super().put(n, kind)

    def expire(self):
        old = [(n, kind) for n, kind in self.waiting if self.now_s - self.born_s[n] > self.max_age_s[kind]]
        for message in old:
            self.waiting.remove(message)
            self.dropped[message[1]] += 1

    def take(self, limit, *, is_in_trouble=False):
        self.expire()
        unsafe = [message for message in self.waiting if message[1] in DURABLE and message not in self.disk]
        ready = self.waiting if is_in_trouble or not unsafe else self.waiting[: self.waiting.index(unsafe[0])]
        taken = ready[:limit]
        self.waiting = self.waiting[len(taken) :]
        self.in_flight += taken
        return taken

    def commit(self):
        here = sorted(self.waiting + self.in_flight)
        loose = [message for message in here if message[1] not in DURABLE and message not in self.disk]
        late = set(loose) if len(loose) < BATCH else set()
        self.disk = [message for message in here if message not in late]

    def crash(self):
        self.waiting, self.in_flight = sorted(self.disk), []
        self.dropped.clear()
        if self.disk:  # the clock goes on from the newest
            ahead_s = self.now_s - max(self.born_s[n] for n, _ in self.disk)
            self.born_s = {n: born_s + ahead_s for n, born_s in self.born_s.items()}


class Machine(RuleBasedStateMachine):
    """Every step of the outbox in any order, with crashes, full disks, damaged files and time between them."""

    def __init__(self):
        super().__init__()
        self.root = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
        self.n = self.n_folders = 0
        self.events = []
        self.model = DiskModel(capacity=7)
        self.folder = self.root / "0"
        self.clock = Clock()
        self.open()

    def open(self):
        limits = Limits(messages=7, age_s=100.0, telemetry_age_s=50.0)
        self.outbox = DurableOutbox(self.folder, limits, lambda *event: self.events.append(event), clock=self.clock)
        self.outbox._open()
        self.ids = {}

    @property
    def is_in_trouble(self):
        return bool(self.outbox.trouble)

    @rule(kinds=st.lists(st.sampled_from(ORDER[1:]), min_size=1, max_size=4), is_committed=st.booleans())
    def put(self, kinds, is_committed):
        for kind in kinds:
            self.n += 1
            self.outbox.put(envelope(kind, self.n))
            self.model.put(self.n, kind)
        if is_committed:
            self.commit()

    @rule()
    def commit(self):
        if self.outbox.commit():
            self.model.commit()

    @rule(limit=st.integers(1, 4))
    def take(self, limit):
        taken = self.outbox.take(limit)
        self.ids |= {int(message.payload): message_id for message_id, message in taken}
        found = [(int(message.payload), message.kind) for _, message in taken]
        assert found == self.model.take(limit, is_in_trouble=self.is_in_trouble)

    @precondition(lambda self: self.model.in_flight)
    @rule(indices=st.lists(st.integers(0, 3), min_size=1, max_size=4), is_sent=st.booleans())
    def finish(self, indices, is_sent):
        for index in indices[: len(self.model.in_flight)]:
            n, kind = self.model.in_flight.pop(index % len(self.model.in_flight))
            (self.outbox.ack if is_sent else self.outbox.discard)(self.ids[n])
            self.model.dropped[kind] += not is_sent

    @precondition(lambda self: self.model.waiting and not self.model.in_flight)
    @rule(is_sent=st.booleans())
    def deliver(self, is_sent):
        self.take(4)
        if self.model.in_flight:
            self.finish([0, 1, 0, 0], is_sent)

    @rule()
    def requeue(self):
        self.outbox.requeue()
        self.model.requeue()

    @rule(seconds=st.sampled_from([1, 20, 60]))
    def time_passes(self, seconds):
        self.clock.now_s += seconds
        self.model.now_s += seconds

    @rule(has_room=st.booleans())
    def disk(self, has_room):
        if self.outbox._spool is not None:
            self.outbox._spool._writer.execute(f"PRAGMA max_page_count = {1_000_000 if has_room else 1}")

    @rule(boot_s=st.sampled_from([0.0, 1e3, 1e9]))
    def crash(self, boot_s):
        self.reopen_copy(boot_s)
        self.model.crash()
        assert sum(self.outbox.restored().values()) == len(self.model.waiting)

    @rule()
    def restart(self):
        self.disk(has_room=True)
        self.outbox._is_closing = True
        assert self.outbox.commit()
        self.model.disk = self.model.waiting + self.model.in_flight
        self.crash(5.0)

    @rule(
        where=st.floats(0, 1), junk=st.binary(max_size=64), is_cut=st.booleans(), suffix=st.sampled_from(["", "-wal"])
    )
    def damage(self, where, junk, is_cut, suffix):
        def harm(folder):
            path = folder / (FILE + suffix)
            if path.exists():
                content = bytearray(path.read_bytes())
                at = int(where * len(content))
                path.write_bytes(content[:at] if is_cut else content[:at] + junk + content[at + len(junk) :])

        committed, self.before = list(self.model.disk), self.model.now_s
        self.reopen_copy(7.0, harm)
        left = [(int(message.payload), message.kind) for _, message in self.outbox.take(100)]
        # A log that is torn is the past: what had been deleted since may be there once more, but nothing invented.
        assert left == sorted(set(left))
        if suffix == "":
            assert set(left) <= set(committed)
        assert all(1 <= n <= self.n for n, _ in left)
        self.outbox.requeue()
        self.forget_ages(left)

    def forget_ages(self, left):
        """Go on from what was found; its ages are what the file says."""
        self.model.waiting, self.model.in_flight, self.model.disk = list(left), [], list(left)
        self.model.dropped = type(self.model.dropped)(self.outbox.dropped())
        entries = [entry for queue in self.outbox._waiting.values() for entry in queue]
        now_s = self.outbox._now_s()
        by_id = dict(zip(sorted(entry.id for entry in entries), [n for n, _ in left], strict=True))
        self.model.born_s = {by_id[entry.id]: self.model.now_s - (now_s - entry.born_s) for entry in entries}

    def reopen_copy(self, boot_s, harm=lambda folder: None):
        """Go on with a copy of the files as a killed process would have left them; the machine was started anew."""
        self.n_folders += 1
        old, self.folder = self.folder, self.root / str(self.n_folders)
        shutil.copytree(old, self.folder)
        (self.folder / f"{FILE}-shm").unlink(missing_ok=True)
        die(self.outbox)
        shutil.rmtree(old)
        harm(self.folder)
        self.clock.now_s = boot_s
        self.open()

    @invariant()
    def counts_agree(self):
        assert self.outbox.depth == len(self.model.waiting) + len(self.model.in_flight)
        assert +self.model.dropped == self.outbox.dropped()
        came = sum(self.outbox.restored().values()) + sum(self.outbox.stored().values())
        went = sum(self.outbox.sent().values())
        rejected = sum(self.outbox.dropped().values())
        assert came - went - rejected <= self.outbox.depth <= came - went
        assert self.outbox._pending.bytes >= 0
        assert (self.outbox.bytes == 0) == (self.outbox.depth == 0)

    def teardown(self):
        die(self.outbox)
        shutil.rmtree(self.root)


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
