"""`python -m tests.fuzzing.child TARGET ENGINE SECONDS FOLDER`: one target; it says how many runs there were."""

from __future__ import annotations

import faulthandler
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from .__main__ import HANG_S, RSS_MB


def with_atheris(name: str, seconds: float, folder: Path) -> None:
    """Guided by the coverage of our code and of the standard library's parsers."""
    import atheris

    with atheris.instrument_imports(include=["agent", "whisperlet", "zipfile", "tomllib", "urllib"]):
        from .targets import TARGETS, checked
    corpus = folder / "corpus"
    corpus.mkdir()
    for n, seed in enumerate(TARGETS[name].seeds()):
        (corpus / f"seed{n}").write_bytes(seed)
    options = [f"-max_total_time={seconds:.0f}", f"-timeout={HANG_S}", f"-rss_limit_mb={RSS_MB}", "-verbosity=0"]
    options += [f"-artifact_prefix={tempfile.gettempdir()}/fuzz-{name}-", "-max_len=20000", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], checked(name, folder))
    atheris.Fuzz()


def with_hypothesis(name: str, seconds: float, folder: Path) -> None:
    """As many rounds of examples as there is time for, each from another seed of the generator."""
    from hypothesis import HealthCheck, Phase, given, seed, settings

    from .mutation import near
    from .targets import TARGETS, checked

    run, strategy = checked(name, folder), near(TARGETS[name].seeds())
    n_runs, n_rounds, until_s = 0, 0, time.monotonic() + seconds

    def timed(data: bytes) -> None:
        nonlocal n_runs
        n_runs += 1
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        run(data)
        faulthandler.cancel_dump_traceback_later()

    while time.monotonic() < until_s:
        n_rounds += 1
        quiet = settings(
            max_examples=500,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        seed(n_rounds)(quiet(given(strategy)(timed)))()
    print(f"Done {n_runs} runs")


ENGINES: dict[str, Callable[[str, float, Path], None]] = {"atheris": with_atheris, "hypothesis": with_hypothesis}

if __name__ == "__main__":
    ENGINES[sys.argv[2]](sys.argv[1], float(sys.argv[3]), Path(sys.argv[4]))
