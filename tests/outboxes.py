"""Durable outboxes for tests."""

import os

from agent.outbox import Limits
from agent.store import DurableOutbox

LIMITS = Limits(messages=10_000, bytes=10_000_000, age_s=86_400)


class Boxes:
    """Makes outboxes in a folder, remembers their events, closes them."""

    def __init__(self, folder):
        self.folder, self.events, self.made = folder, [], []

    def __call__(self, limits=LIMITS, folder=None, **options):
        options = {"delete_after_s": 0.01, "retry_s": 0.05} | options
        self.made.append(
            DurableOutbox(folder or self.folder, limits, lambda *event: self.events.append(event), **options)
        )
        return self.made[-1]

    def started(self, *args, **options):
        outbox = self(*args, **options)
        outbox.start()
        return outbox

    @property
    def names(self):
        return [name for name, _ in self.events]

    def close(self):
        for outbox in self.made:
            outbox.close()


def die(outbox):
    """Let go of the files as a killed process does: nothing is written."""
    outbox._close_spool()
    if outbox._lock_descriptor is not None:
        os.close(outbox._lock_descriptor)
        outbox._lock_descriptor = None
