"""`python -m soak [NAME...]`: run at full length, print a table, write NAME.json. Exit code 1 if one failed."""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from pathlib import Path

NAMES = ("outbox", "wear", "fleet", "endurance")  # modules with `run(folder) -> dict` and `failures(result) -> list`


def main(arguments: list[str]) -> int:
    """Run each, also after one that failed."""
    chosen = arguments or list(NAMES)
    if unknown := set(chosen) - set(NAMES):
        print(f"there is no soak {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    out = Path("build/soak")
    out.mkdir(parents=True, exist_ok=True)
    return max(_run(name, out) for name in chosen)


def _run(name: str, out: Path) -> int:
    module = importlib.import_module(f".{name}", __package__)
    with tempfile.TemporaryDirectory() as folder:
        result = module.run(Path(folder))
    (out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    for key, value in result.items():
        print(f"{key.replace('_', ' '):<32} {value}")
    for failure in (failures := module.failures(result)):
        print(f"FAILED: {failure}")
    print(f"{name}: {'failed' if failures else 'passed'}; {out / name}.json")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
