"""The runner of stages: what is kept, what is made anew, and what an interruption leaves. And checkpoints on disk."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import toy
from rich.progress import Progress

from convert import disk, model, stages
from convert.stages import Result, Stage, StageReport
from whisperlet.errors import ConfigError

calls = []


class Copy(Stage, frozen=True, kw_only=True, tag="copy"):
    """Joins the source and a word of its own."""

    word: str
    file: str = ""

    def inputs(self):
        return [stages.located(self.file)] if self.file else []


def run(stage, in_dir, out_dir, _progress):
    calls.append((stage.word, sorted(path.name for path in out_dir.iterdir())))
    (out_dir / "checkpoints").mkdir(exist_ok=True)
    (out_dir / "checkpoints" / "step").write_text("1")
    (out_dir / "words").write_text((in_dir / "words").read_text() + stage.word)
    return StageReport("copy", 0.1, {"word": stage.word})


@pytest.fixture(autouse=True)
def no_calls():
    calls.clear()


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "words").write_text("a")
    return Result(folder, disk.hash_folder(folder), StageReport("source", 0.0))


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache" / "stages"


def ran(stage, source, root):
    return stages.run(stage, source, root, Progress(disable=True), lambda: None)


def test_a_result_has_what_the_stage_wrote_and_its_report(source, root):
    result = ran(Copy(word="b"), source, root)
    assert sorted(path.name for path in result.folder.iterdir()) == ["stage.json", "words"]
    assert (result.folder / "words").read_text() == "ab"
    assert result.report == StageReport("copy", 0.1, {"word": "b"})
    assert json.loads((result.folder / "stage.json").read_text())["settings"]["stage"] == {
        "stage": "copy",
        "word": "b",
        "file": "",
    }
    assert {path.suffix for path in root.iterdir()} == {"", ".lock"}


def test_what_is_there_is_not_made_again(source, root, tmp_path):
    first = ran(Copy(word="b"), source, root)
    assert ran(Copy(word="b"), source, root) == first
    assert len(calls) == 1
    moved = source.folder.rename(tmp_path / "elsewhere")
    assert ran(Copy(word="b"), Result(moved, disk.hash_folder(moved), source.report), root) == first
    assert len(calls) == 1


def test_whatever_a_result_depends_on_makes_it_anew(source, root, tmp_path, monkeypatch):
    terms = tmp_path / "terms"
    terms.write_text("x")
    monkeypatch.setenv("TERMS", str(terms))
    stage = Copy(word="b", file="$TERMS")
    folders = [ran(stage, source, root).folder]
    folders.append(ran(Copy(word="c", file="$TERMS"), source, root).folder)
    terms.write_text("y")
    folders.append(ran(stage, source, root).folder)
    (source.folder / "words").write_text("z")
    source = Result(source.folder, disk.hash_folder(source.folder), source.report)
    folders.append(ran(stage, source, root).folder)
    monkeypatch.setattr(stages, "program", lambda path, plain=stages.program: [*plain(path), terms])
    folders.append(ran(stage, source, root).folder)
    assert len(set(folders)) == len(calls) == len(folders)
    assert (folders[3] / "words").read_text() == "zb"


def test_a_program_is_a_module_and_all_that_it_imports_from_its_folder(tmp_path):
    texts = {
        "a": "import os\nfrom . import b\nfrom whisperlet import c",
        "b": "def f():\n    from .d import x",
        "c": "",
        "d": "from . import a\nfrom .. import c\nfrom .absent import y",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert [path.stem for path in stages.program(tmp_path / "a.py")] == ["a", "b", "d"]
    assert [path.stem for path in stages.program(tmp_path / "c.py")] == ["c"]


@pytest.mark.parametrize("damage", ["changed", "added", "gone", "no record", "nonsense"])
def test_a_damaged_result_is_made_anew(source, root, damage):
    result = ran(Copy(word="b"), source, root)
    words, record = result.folder / "words", result.folder / "stage.json"
    {
        "changed": lambda: words.write_text("aB"),
        "added": lambda: (result.folder / "more").write_text(""),
        "gone": words.unlink,
        "no record": record.unlink,
        "nonsense": lambda: record.write_text("{"),
    }[damage]()
    assert ran(Copy(word="b"), source, root) == result
    assert len(calls) == 2
    assert words.read_text() == "ab"
    assert not (result.folder / "more").exists()


def test_a_stage_that_fails_finds_what_it_left(source, root, monkeypatch):
    def fail(path, plain=disk.sync):
        monkeypatch.setattr(disk, "sync", plain)
        raise KeyboardInterrupt

    monkeypatch.setattr(disk, "sync", fail)
    with pytest.raises(KeyboardInterrupt):
        ran(Copy(word="b"), source, root)
    result = ran(Copy(word="b"), source, root)
    assert [found for _, found in calls] == [[], ["stage.json", "words"]]
    assert (result.folder / "words").read_text() == "ab"
    assert {path.suffix for path in root.iterdir()} == {"", ".lock"}


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from rich.progress import Progress
    import test_stages
    from convert import disk, stages

    def killing(name, plain):
        def call(*args, **more):
            if name == sys.argv[3]:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*args, **more)
        return call

    for name in ("sync", "sync_entry", "hash_folder"):
        setattr(disk, name, killing(name, getattr(disk, name)))
    test_stages.run = killing("run", test_stages.run)
    source, root = map(Path, sys.argv[1:3])
    result = stages.Result(source, "0", stages.StageReport("source", 0.0))
    done = stages.run(test_stages.Copy(word="b"), result, root, Progress(disable=True), lambda: None)
    print(done.sha256)
"""


@pytest.mark.parametrize("moment", ["run", "hash_folder", "sync", "sync_entry"])
def test_killed_at_any_moment_the_next_run_gives_the_same(source, root, moment):
    def start(moment, root):
        command = [sys.executable, "-c", textwrap.dedent(KILLED), str(source.folder), str(root), moment]
        paths = os.pathsep.join([str(toy.REPOSITORY / "tests"), str(toy.REPOSITORY)])
        environment = {**os.environ, "PYTHONPATH": paths}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    assert start(moment, root).returncode == -signal.SIGKILL
    after, undisturbed = start("never", root), start("never", root.with_name("other"))
    assert after.stdout == undisturbed.stdout != ""
    assert {path.name for path in root.iterdir()} == {path.name for path in root.with_name("other").iterdir()}


def test_two_runs_that_meet_make_it_once(source, root):
    waits, results, inside = [], [], threading.Event()

    def slow(out):
        inside.set()
        while not waits:
            time.sleep(0.01)
        (out / "words").write_text("once")
        calls.append("slow")
        return StageReport("slow", 0.0)

    def keep(make, wait):
        results.append(stages.keep(root, "slow", {}, make, wait))

    first = threading.Thread(target=keep, args=(slow, lambda: None))
    first.start()
    inside.wait(10)
    keep(lambda _out: pytest.fail("it was made twice"), lambda: waits.append(1))
    first.join()
    assert calls == ["slow"]
    assert results[0] == results[1]


def full(out):
    import safetensors.torch
    import torch

    (out / "model.safetensors").symlink_to("/dev/full")
    with (out / "model.safetensors").open("wb") as file:
        file.write(safetensors.torch.save({"a": torch.zeros(9)}))


def hidden(_out):
    raise RuntimeError("it went wrong") from OSError(errno.EDQUOT, "quota")


def told(_out):
    raise RuntimeError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("make", [full, hidden, told])
def test_a_full_disk_is_named_in_one_sentence(root, make):
    with pytest.raises(ConfigError, match="the disk is full, so prune had to stop; free some space") as error:
        stages.keep(root, "prune", {}, make, lambda: None)
    assert str(error.value).startswith(f"{root}: ")
    assert "\n" not in str(error.value)


def test_other_errors_stay_what_they_are(root):
    with pytest.raises(ZeroDivisionError):
        stages.keep(root, "prune", {}, lambda _out: 1 // 0, lambda: None)


def test_a_disk_without_room_is_refused_before_any_work(source, root, monkeypatch):
    usage = type(disk.shutil.disk_usage("/"))
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _path: usage(10, 10, 0))
    with pytest.raises(ConfigError, match="the disk is too full for copy, which needs about 0 MB"):
        ran(Copy(word="b"), source, root)
    assert calls == []


def test_everything_that_is_missing_is_named_at_once(tmp_path):
    missing = [Copy(word="b", file=str(tmp_path / name)) for name in ("one", "two")]
    with pytest.raises(ConfigError, match=r"copy: .*one: no such file or folder; copy: .*two: no such"):
        stages.check([*missing, Copy(word="b")])
    stages.check([Copy(word="b", file=str(tmp_path))])


def test_a_variable_that_is_not_set_is_named_once_and_what_else_is_missing_too(tmp_path, monkeypatch):
    monkeypatch.delenv("RECORDINGS", raising=False)
    missing = [Copy(word="b", file=file) for file in ("$RECORDINGS/one", "${RECORDINGS}/two", "gone", "gone")]
    with pytest.raises(ConfigError) as refused:
        stages.check(missing)
    said = "$RECORDINGS: is not set, and paths of the recipe begin with it; copy: gone: no such file or folder"
    assert str(refused.value) == said
    monkeypatch.setenv("RECORDINGS", str(tmp_path))
    with pytest.raises(ConfigError, match=f"{tmp_path}/one: no such file or folder; copy: .*/two"):
        stages.check(missing)


def test_a_path_is_written_as_in_a_shell(monkeypatch):
    monkeypatch.setenv("HOME", "/there")
    monkeypatch.setenv("SPEECH", "/data")
    assert stages.located("~/$SPEECH/a") == Path("/there//data/a")


# a checkpoint on the disk


def test_a_saved_checkpoint_is_loaded_as_it_was(tmp_path):
    from transformers import WhisperForConditionalGeneration

    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    toy.save_checkpoint(tmp_path / "first")
    first = model.load(str(tmp_path / "first"))
    model.save_directory(first, tmp_path / "second")
    second = model.load_directory(tmp_path / "second", first.source)
    assert second.sha256 == first.sha256
    assert second.generation == first.generation
    assert second.tokenizer_json == first.tokenizer_json
    assert (second.multilingual, second.source) == (first.multilingual, first.source)
    theirs = WhisperForConditionalGeneration.from_pretrained(tmp_path / "second")
    assert model.hash_tensors(theirs) == first.sha256
    assert theirs.generation_config.lang_to_id == {"<|en|>": toy.EN, "<|haw|>": toy.HAW}
    assert sorted(path.name for path in (tmp_path / "second").iterdir()) == [
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
    ]
