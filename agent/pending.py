"""What the durable outbox has yet to write."""

from __future__ import annotations

from .messages import Kind
from .outbox import Entry


class Pending:
    """Entries that are not on disk. Guarded by its owner's lock."""

    def __init__(self) -> None:
        self.finals: dict[int, Entry] = {}  # and events: not to be sent before they are on disk
        self.telemetry: dict[int, Entry] = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self.finals) + len(self.telemetry)

    def add(self, entry: Entry) -> None:
        """Have an entry written."""
        entry.on_disk = False
        self._of(entry)[entry.id] = entry
        self.bytes += entry.size

    def discard(self, entry: Entry) -> None:
        """Forget an entry, if it is in here."""
        if self._of(entry).pop(entry.id, None) is not None:
            self.bytes -= entry.size

    def shift(self, by_s: float) -> None:
        """Move all births."""
        for entry in (*self.finals.values(), *self.telemetry.values()):
            entry.born_s += by_s

    def _of(self, entry: Entry) -> dict[int, Entry]:
        return self.finals if entry.kind in (Kind.FINAL, Kind.EVENT) else self.telemetry
