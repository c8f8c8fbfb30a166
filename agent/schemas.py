"""`python -m agent.schemas DIRECTORY` writes the JSON Schemas that `docs/schema` publishes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from . import payloads
from .commands import COMMANDS, Desired
from .replies import ReportedPayload, ResultPayload


def schemas() -> dict[str, dict[str, Any]]:
    """JSON Schema of everything that is sent or received, by file name."""
    published: dict[str, type[msgspec.Struct]] = {topic: struct for topic, (struct, _) in payloads.TOPICS.items()}
    commands = {f"cmd/{name}": struct for name, struct in COMMANDS.items()}
    settings = {"cmd/result": ResultPayload, "desired": Desired, "reported": ReportedPayload}
    return {
        topic.replace("/", "-") + ".json": msgspec.json.schema(struct)
        for topic, struct in (published | commands | settings).items()
    }


def main(directory: str) -> None:
    """Write them."""
    for name, schema in schemas().items():
        Path(directory, name).write_text(json.dumps(schema, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
