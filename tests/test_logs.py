"""What the journal gets: one line an event, with its priority, and nothing of what was said."""

import io
import json
import logging
import os
import shlex
import subprocess
import sys

import pytest

from agent.config import LogConfig
from agent.logs import OneLine, reads_journal, set_up
from whisperlet.errors import ConfigError

AWKWARD = 'two\nlines, "quoted" and ü'


@pytest.fixture(autouse=True)
def root():
    """The root logger, put back as it was."""
    logger = logging.getLogger()
    handlers, level = list(logger.handlers), logger.level
    yield logger
    logger.handlers[:], logger.level = handlers, level


def record(message=AWKWARD, level=logging.WARNING, **extra):
    made = logging.makeLogRecord({"name": "agent.pipeline", "levelno": level, "levelname": logging.getLevelName(level)})
    made.msg = message
    vars(made).update(extra)
    return made


def test_json():
    line = OneLine("json", has_priority=False).format(record(event="microphone_lost"))
    assert json.loads(line) == {
        "level": "warning",
        "logger": "agent.pipeline",
        "event": "microphone_lost",
        "msg": AWKWARD,
    }


def test_logfmt():
    line = OneLine("logfmt", has_priority=False).format(record(event="microphone_lost", utterance=3))
    fields = dict(word.split("=", 1) for word in shlex.split(line))
    assert fields == {
        "level": "warning",
        "logger": "agent.pipeline",
        "event": "microphone_lost",
        "utterance": "3",
        "msg": AWKWARD.replace("\n", "\\n"),
    }


@pytest.mark.parametrize("form", ["text", "logfmt", "json"])
def test_an_error_with_its_traceback_is_one_line(form):
    with pytest.raises(ValueError) as raised:
        int(AWKWARD)
    made = record("it failed", logging.ERROR, exc_info=raised._excinfo)
    line = OneLine(form, has_priority=True).format(made)
    assert line.startswith("<3>")
    assert len(line.splitlines()) == 1
    assert "ValueError: invalid literal" in line
    assert "it failed" in line


@pytest.mark.parametrize(("level", "priority"), [("DEBUG", 7), ("INFO", 6), ("WARNING", 4), ("CRITICAL", 2)])
def test_priorities_are_the_journals(level, priority):
    made = record("x", logging.getLevelNamesMapping()[level])
    assert OneLine("text", has_priority=True).format(made) == f"<{priority}>{level} agent.pipeline: x"


@pytest.mark.parametrize(
    ("config", "environment", "heard"),
    [
        (LogConfig(), {}, ["INFO", "WARNING"]),
        (LogConfig(level="warning"), {}, ["WARNING"]),
        (LogConfig(level="error"), {"WHISPERLET_LOG": "debug"}, ["DEBUG", "INFO", "WARNING"]),
    ],
)
def test_levels(root, config, environment, heard):
    stream = io.StringIO()
    set_up(LogConfig(level="debug"), {}, stream)
    set_up(config, environment, stream)  # the second one holds
    for level in ("debug", "info", "warning"):
        getattr(logging.getLogger("agent.x"), level)("said")
    assert [line.partition(" ")[0] for line in stream.getvalue().splitlines()] == heard


def test_only_the_journals_own_stream_is_the_journal():
    with open(os.devnull, "w") as stream:  # noqa: PTH123
        stat = os.fstat(stream.fileno())
        assert reads_journal({"JOURNAL_STREAM": f"{stat.st_dev}:{stat.st_ino}"}, stream)
        assert not reads_journal({"JOURNAL_STREAM": f"{stat.st_dev}:{stat.st_ino + 1}"}, stream)
        assert not reads_journal({}, stream)
    assert not reads_journal({"JOURNAL_STREAM": "1:1"}, io.StringIO())


def test_under_the_journal_a_line_has_priority_and_fields(tmp_path):
    code = """
import logging, os
stat = os.fstat(2)
os.environ["JOURNAL_STREAM"] = f"{stat.st_dev}:{stat.st_ino}"
from agent import logs
from agent.config import LogConfig
logs.set_up(LogConfig())
logging.getLogger("agent.x").warning("the cable is out", extra={"event": "microphone_lost"})
"""
    environment = {name: value for name, value in os.environ.items() if name != "WHISPERLET_LOG"}
    with (tmp_path / "log").open("w") as log:
        subprocess.run([sys.executable, "-c", code], stderr=log, env=environment, check=True)
    line = (tmp_path / "log").read_text()
    assert line == '<4>level=warning logger=agent.x event=microphone_lost msg="the cable is out"\n'


def test_an_unknown_level_is_refused_in_one_sentence():
    with pytest.raises(ConfigError, match=r"^WHISPERLET_LOG: 'loud' is none of debug, info, warning, error, critical$"):
        set_up(LogConfig(), {"WHISPERLET_LOG": "loud"})


def test_what_is_logged_while_libraries_are_kept_quiet_is_not_lost(tmp_path):
    """Also after the second setting up, with the configuration that was read meanwhile."""
    code = """
import logging
from agent import logs
from agent.config import LogConfig
from agent.quiet import quiet_stderr
logs.set_up(LogConfig())
logs.set_up(LogConfig())
with quiet_stderr():
    logging.getLogger("agent.x").warning("the broker is away")
"""
    assert errors_of(code, tmp_path) == "WARNING agent.x: the broker is away\n"


def test_a_thread_that_dies_is_one_line(tmp_path):
    code = """
import threading
from agent import logs
from agent.config import LogConfig
logs.set_up(LogConfig(format="json"))
threading.excepthook = logs.log_fault
thread = threading.Thread(target=lambda: 1 / 0, name="ear")
thread.start()
thread.join()
"""
    said = json.loads(errors_of(code, tmp_path))
    assert (said["level"], said["msg"]) == ("critical", "thread ear has ended by a fault of its own")
    assert "ZeroDivisionError" in said["traceback"]


def errors_of(code, folder):
    environment = {
        name: value for name, value in os.environ.items() if name not in {"WHISPERLET_LOG", "JOURNAL_STREAM"}
    }
    with (folder / "errors").open("w") as log:
        subprocess.run([sys.executable, "-c", code], stderr=log, env=environment, check=True)
    return (folder / "errors").read_text()
