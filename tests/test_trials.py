"""`evaluate` with two models, terms, slots and noise, from end to end on the toy; and what earlier runs wrote."""

import json

import pytest
import toy
from test_evaluate import speech_set
from typer.testing import CliRunner

from convert import trials
from convert.__main__ import app
from whisperlet.errors import WhisperletError


@pytest.fixture
def run(tmp_path, weight_caches, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(weight_caches))
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*arguments):
        result = CliRunner().invoke(app, ["evaluate", "--threads", "1", *map(str, arguments)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    return invoke


@pytest.fixture
def recordings(tmp_path):
    clips = [(f"clip{n}", toy.babble(0.9, n), "some words") for n in range(3)]
    noise = ("noise", toy.babble(1.0, 5), None, {"language": "none"})
    return speech_set(tmp_path, *clips, noise)


def test_one_run_with_everything(run, recordings, tmp_path, toy_path):
    (tmp_path / "terms.txt").write_text("words\t2\n")
    shown = run(toy_path, recordings, "--terms", tmp_path / "terms.txt", "--json", tmp_path / "a.json")
    found = json.loads((tmp_path / "a.json").read_text())
    assert (found["speechless_s"], found["n_without_text"], found["terms"]) == (1.0, 1, ["words"])
    heard = next(u["hyp"] for u in found["utterances"] if u["id"] == "noise")
    assert found["invented_words_per_hour"] == 3600 * len(heard.split()) > 0
    assert found["entities"]["missed"] == 3
    assert found["intervals"]["wer"]["low"] <= found["wer"] <= found["intervals"]["wer"]["high"]
    assert found["meter"]
    for text in ("entity F1", "words invented per hour", "energy by", "95 % interval"):
        assert text in shown


def test_a_bundle_against_its_checkpoint(run, recordings, tmp_path, toy_path, toy_folder):
    out = tmp_path / "c.json"
    shown = run(toy_path, recordings, "--against", toy_folder / "checkpoint", "--json", out)
    found = json.loads(out.read_text())
    assert (found["a"]["model"], found["b"]["bundle_bytes"]) == ("toy.tflite", None)
    assert found["n_changed"] == len(found["changes"])
    assert {"wer", "cer", "invented_words_per_hour"} == {row["figure"] for row in found["differences"]}
    assert "A less B" in shown
    assert f"{found['n_changed']} clips" in shown


def test_earlier_runs_are_compared_without_another(run, recordings, tmp_path, toy_path):
    (tmp_path / "terms.txt").write_text("words\n")
    run(toy_path, recordings, "--json", tmp_path / "a.json")
    stored = json.loads((tmp_path / "a.json").read_text())
    better = [u | {"hyp": u["ref"] or ""} for u in stored["utterances"]]
    (tmp_path / "b.json").write_text(json.dumps(stored | {"model": "better", "utterances": better}))
    arguments = [tmp_path / "a.json", "--against", tmp_path / "b.json", "--terms", tmp_path / "terms.txt"]
    shown = run(*arguments, "--json", tmp_path / "c.json")
    found = json.loads((tmp_path / "c.json").read_text())
    by_figure = {row["figure"]: row for row in found["differences"]}
    assert by_figure["entity_recall"]["difference"] == -100
    assert by_figure["wer"]["a"] == pytest.approx(stored["wer"], abs=0.01)
    assert found["b"]["entities"]["heard"] == 3
    assert "B: better" in shown
    assert "clip0: A" in shown


def test_of_an_earlier_run_only_the_clips_that_are_asked_for(run, recordings, tmp_path, toy_path):
    run(toy_path, recordings, "--json", tmp_path / "a.json")
    run(tmp_path / "a.json", recordings, "--limit", "2", "--json", tmp_path / "few.json")
    found = json.loads((tmp_path / "few.json").read_text())
    assert [u["id"] for u in found["utterances"]] == ["clip0", "clip1"]
    assert found["audio_s"] == 1.8


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["toy"], "to score it, name a manifest"),
        (["a.json"], "a.json: is no evaluation that"),
        (["none.json"], "none.json: cannot be read: No such file"),
        (["toy", "set", "--against", "none.tflite"], "none.tflite"),
        (
            ["toy", "set", "--against", "checkpoint", "--pace"],
            "checkpoint: --pace and --detect-language are for bundles",
        ),
        (["toy", "set", "--terms", "none.txt"], "none.txt: cannot be read"),
        (["toy", "noise", "--terms", "terms.txt"], "no clip has a text in which a term could be looked for"),
        (["old.json", "set"], "old.json: holds no score of 1 of the clips, as clip1"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    run, tmp_path, monkeypatch, toy_path, toy_folder, arguments, reason
):
    for name, text in (("set", "words"), ("noise", None)):
        (tmp_path / name).mkdir()
        speech_set(tmp_path / name, *[(f"clip{n}", toy.babble(0.3), text) for n in range(2)])
    (tmp_path / "terms.txt").write_text("words\n")
    (tmp_path / "a.json").write_text("{}")
    run(toy_path, tmp_path / "set", "--limit", 1, "--json", tmp_path / "old.json")
    monkeypatch.setattr(trials, "evaluate_bundle", None)
    monkeypatch.setattr(trials, "evaluate_reference", None)
    stands_for = {"toy": toy_path, "checkpoint": toy_folder / "checkpoint"}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WhisperletError, match=reason):
        run(*(stands_for.get(argument, argument) for argument in arguments))
