"""Teaching a toy to stream: it learns, it goes on where it was interrupted, and its command says what is wrong."""

import dataclasses
import json
import random
import shutil

import msgspec
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_cli import run
from test_corpus import write
from test_prune import save_toy

from convert import adapter, distil, losses, model, streaming
from convert.__main__ import main
from convert.corpus import Corpus
from convert.distil import Settings, Training
from convert.speechset import Source
from convert.utterances import Lessons
from whisperlet.errors import ConfigError, ModelError

SHIPPED = adapter.find("whisper_base")
QUICK = Settings(
    steps=12,
    batch_frames=500,
    warmup_steps=2,
    rank=4,
    alpha=8,
    chunks=(5, 15),
    overlaps=(10, 20),
    padding=8,
    context=64,
    learning_rate=3e-3,
    gap_every=4,
    save_every=5,
    whole_weight=1.0,
)


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    return write(tmp_path_factory.mktemp("audio") / "babble", *(0.6 + 0.02 * i for i in range(36)))


def training(folder, audio, settings=QUICK):
    return Training(model.load(str(folder)), Corpus([Source(audio)], 80), settings)


@pytest.fixture(scope="module")
def unbroken(folder, audio, tmp_path_factory):
    """A run from the first step to the last."""
    whole = training(folder, audio)
    whole.run(tmp_path_factory.mktemp("work"))
    return whole


class Killed(Exception):
    pass


def kill_at(step):
    def die(run):
        if run.step == step:
            raise Killed

    return die


@pytest.fixture(scope="module")
def left(folder, audio, tmp_path_factory):
    """What a run leaves that was killed two steps after its checkpoint."""
    work = tmp_path_factory.mktemp("left")
    with pytest.raises(Killed):
        training(folder, audio).run(work, kill_at(7))
    assert [path.name for path in work.iterdir()] == ["checkpoint.pt"]
    return work


@pytest.fixture
def work(left, tmp_path):
    """The same for one test."""
    return shutil.copytree(left, tmp_path / "work")


def test_it_learns_to_stream(unbroken):
    first, second, _, last = unbroken.curve
    assert [point.step for point in unbroken.curve] == [0, 4, 8, 12]
    assert first.loss is None
    assert last.loss < 0.7 * second.loss
    assert last.streamed < 0.6 * first.streamed
    assert last.short < 0.5 * first.short


def test_it_may_learn_to_stream_alone(folder, audio, tmp_path, unbroken):
    alone = training(folder, audio, Settings(**{**msgspec.structs.asdict(QUICK), "whole_weight": 0.0}))
    alone.run(tmp_path)
    assert alone.curve[-1].streamed < alone.curve[0].streamed
    assert alone.curve[-1].loss < unbroken.curve[-1].loss  # which has the other error in it


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    """A toy whose decoder finds an end in what it hears."""
    folder = tmp_path_factory.mktemp("speaking") / "whisper-toy"
    save_toy(folder)
    return folder


def with_decoder(folder, audio, settings=QUICK):
    checkpoint, corpus = model.load(str(folder)), Corpus([Source(audio)], 80)
    return Training(checkpoint, corpus, settings, lessons=Lessons(corpus, checkpoint))


def test_what_the_decoder_reads_counts_by_its_weight(speaking, audio):
    run_ = with_decoder(speaking, audio)
    losses_, gradients = [], []
    for weight in (0.0, 1.0, 3.0):
        run_.settings = msgspec.structs.replace(QUICK, tokens_weight=weight, whole_weight=0.0)
        losses_.append(run_.loss(random.Random(1)))
        gradients.append(torch.cat([p.grad.flatten() for p in run_.parameters if p.grad is not None]))
        run_.optimiser.zero_grad()
    assert losses_[1] > 1.05 * losses_[0]
    assert losses_[2] - losses_[0] == pytest.approx(3 * (losses_[1] - losses_[0]), rel=1e-3)
    of_tokens = gradients[1] - gradients[0]
    assert of_tokens.norm() > 0.01 * gradients[0].norm()
    assert (gradients[2] - gradients[0] - 3 * of_tokens).norm() < 0.1 * of_tokens.norm()  # bfloat16


def test_it_learns_what_the_decoder_reads(speaking, audio, tmp_path):
    run_ = with_decoder(speaking, audio)
    run_.run(tmp_path)
    assert run_.curve[-1].tokens < 0.6 * run_.curve[0].tokens


def test_it_goes_on_with_the_decoder_too(speaking, audio, tmp_path):
    whole = with_decoder(speaking, audio)
    whole.run(tmp_path / "whole")
    with pytest.raises(Killed):
        with_decoder(speaking, audio).run(tmp_path / "left", kill_at(7))
    resumed = with_decoder(speaking, audio)
    resumed.run(tmp_path / "left")
    assert resumed.curve == whole.curve


def test_what_the_teacher_heard_is_kept_while_it_trains(speaking, audio, tmp_path, monkeypatch):
    target = tmp_path / "toy.safetensors"
    seen = []
    monkeypatch.setattr(Training, "run", lambda self, work, _: seen.append((self, [*work.glob("*")])))
    monkeypatch.setattr(Training, "write", lambda *_: None)
    distil.distil(model.load(str(speaking)), [Source(audio)], QUICK, target, Console(quiet=True))
    alone = msgspec.structs.replace(QUICK, tokens_weight=0.0)
    distil.distil(model.load(str(speaking)), [Source(audio)], alone, target, Console(quiet=True))
    (run_, files), (without, _) = seen
    assert [path.name for path in files] == ["transcripts.json"]
    assert run_.lessons.corpus is run_.corpus
    assert without.lessons is None


def test_the_teacher_stays_as_it_was(folder, audio, unbroken):
    clips = unbroken.corpus.held_out[0]
    before = training(folder, audio)._teacher(clips, 10)
    assert before.shape[1] == max(map(len, clips)) // 2 + 10
    assert torch.equal(unbroken._teacher(clips, 10), before)


def test_it_is_killed_and_goes_on_as_if_nothing_had_been(folder, audio, work, unbroken):
    resumed = training(folder, audio)
    steps = []
    resumed.run(work, lambda run: steps.append(run.step))
    assert steps == list(range(6, 13))
    assert resumed.curve == unbroken.curve
    expected = adapter.state(unbroken.encoder)
    for name, tensor in adapter.state(resumed.encoder).items():
        assert (tensor - expected[name]).abs().max() < 1e-6, name


def test_seeds_differ(folder, audio, tmp_path, unbroken):
    other = training(folder, audio, msgspec.structs.replace(QUICK, seed=1))
    other.run(tmp_path)
    assert other.curve[-1] != unbroken.curve[-1]


def test_a_finished_run_does_nothing_again(folder, audio, tmp_path, unbroken):
    unbroken._save(tmp_path)
    again = training(folder, audio)
    again.run(tmp_path, kill_at(13))
    assert again.curve == unbroken.curve
    assert again.seconds == unbroken.seconds


def test_a_checkpoint_of_another_run_is_refused(folder, audio, work, tmp_path):
    other = training(folder, write(tmp_path / "other", 1.0))
    slower = training(folder, audio, msgspec.structs.replace(QUICK, learning_rate=1e-4))
    elsewhere = training(folder, audio)
    elsewhere.checkpoint = dataclasses.replace(elsewhere.checkpoint, sha256="0" * 64)
    for run_ in (other, slower, elsewhere):
        with pytest.raises(ModelError, match=r"checkpoint\.pt: is of a run with other settings, audio or checkpoint"):
            run_.run(work, kill_at(1))


def test_a_checkpoint_from_before_audio_was_noted_is_gone_on_with(folder, audio, work):
    path = work / "checkpoint.pt"
    saved = torch.load(path)
    del saved["data"]
    torch.save(saved, path)
    resumed = training(folder, audio)
    with pytest.raises(Killed):
        resumed.run(work, kill_at(6))


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def replace_with_text(path):
    path.write_text("not a checkpoint")


def replace_with_a_list(path):
    torch.save([1, 2], path)


def forget(key):
    def damage(path):
        saved = torch.load(path)
        del saved[key]
        torch.save(saved, path)

    return damage


@pytest.mark.parametrize(
    "damage", [cut, replace_with_text, replace_with_a_list, forget("step"), forget("optimiser"), forget("trained")]
)
def test_a_damaged_checkpoint(folder, audio, work, damage):
    damage(work / "checkpoint.pt")
    with pytest.raises(ModelError, match=r"checkpoint\.pt: is damaged; remove it to begin anew$"):
        training(folder, audio).run(work, kill_at(1))


def test_what_is_written(folder, audio, tmp_path, unbroken):
    target = tmp_path / "new" / "toy.safetensors"
    settings = msgspec.structs.replace(QUICK, tokens_weight=0.0)
    record = distil.distil(model.load(str(folder)), [Source(audio)], settings, target, Console(quiet=True))
    assert sorted(path.name for path in target.parent.iterdir()) == ["toy.json", "toy.safetensors"]
    assert msgspec.json.decode(target.with_suffix(".json").read_bytes(), type=distil.Record) == record
    assert record.settings == settings
    assert record.curve == unbroken.curve
    assert (record.file, record.source) == ("toy.safetensors", "whisper-toy")
    expected = adapter.state(unbroken.encoder)
    for name, tensor in load_file(target).items():
        assert torch.equal(tensor, expected[name].half())
    merged = model.load(str(folder))
    adapter.merge(merged.model.model.encoder, target, merged.sha256)
    power = streaming.pad(unbroken.corpus.held_out[0], 200)
    with torch.no_grad():
        heard, trained = (streaming.full(encoder, power) for encoder in (merged.model.model.encoder, unbroken.encoder))
    assert (heard - trained).abs().max() < 1e-2  # half precision


def test_the_rate_rises_then_falls():
    run_ = Training.__new__(Training)
    run_.settings, rates = QUICK, []
    for run_.step in range(QUICK.steps):
        rates.append(run_._rate())
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[7] == pytest.approx(0.05 + 0.95 / 2)
    run_.step = QUICK.steps
    assert run_._rate() == pytest.approx(0.05)


def test_the_error_of_a_step():
    """Committed frames count once each, the others `tail_weight` times their mean; what is past the end not at all."""
    target, lengths = torch.ones(2, 5, 8), torch.tensor([5, 5])
    frames = torch.ones(2, 2, 4, 8)  # steps of 3 frames and 1 of overlap: 0 1 2 (3), 3 4 . (.)
    assert losses.stream_error(frames, target, lengths, 3, 0.25) == 0.0
    frames[:, 1, 2:] = 9.0  # past the end
    assert losses.stream_error(frames, target, lengths, 3, 0.25) == 0.0
    frames[0, 0, 1] = 3.0  # committed: four times the teacher's energy, one of 2 * 5 frames
    assert float(losses.stream_error(frames, target, lengths, 3, 0.25)) == pytest.approx(4 / 10)
    frames[0, 0, 1], frames[1, 0, 3] = 1.0, 3.0
    assert float(losses.stream_error(frames, target, lengths, 3, 0.25)) == pytest.approx(0.25 * 3 / 1 * 4 / 10)


def test_what_fills_a_batch_up_teaches_nothing():
    target, lengths = torch.ones(2, 5, 8), torch.tensor([5, 2])
    whole, frames = torch.ones(2, 5, 8), torch.ones(2, 2, 4, 8)
    whole[1, 2:], frames[1, 0, 2:], frames[1, 1] = 9.0, 9.0, 9.0
    assert losses.mean_error(whole, target, lengths) == 0.0
    assert losses.stream_error(frames, target, lengths, 3, 0.25) == 0.0
    whole[1, 1] = frames[1, 0, 1] = 3.0
    assert float(losses.mean_error(whole, target, lengths)) == pytest.approx(4 / 7)
    assert float(losses.stream_error(frames, target, lengths, 3, 0.25)) == pytest.approx(4 / 7)


def test_an_adapter_is_trained_on(folder, audio, tmp_path, unbroken):
    target = tmp_path / "first.safetensors"
    unbroken.write(target)
    settings = Settings(**{**msgspec.structs.asdict(QUICK), "steps": 1, "seed": 7})
    further = Training(model.load(str(folder)), unbroken.corpus, settings, target)
    further.run(tmp_path / "work")
    assert further.curve[0].streamed == pytest.approx(unbroken.curve[-1].streamed, rel=1e-2)
    record = further.write(tmp_path / "second.safetensors")
    assert record.start["file"] == target.name
    assert record.start["record"]["curve"] == msgspec.to_builtins(unbroken.curve)


def test_an_adapter_is_cut_to_the_rank_that_is_asked_for(folder, tmp_path, unbroken):
    target = tmp_path / "first.safetensors"
    unbroken.write(target)
    settings = Settings(**{**msgspec.structs.asdict(QUICK), "rank": QUICK.rank // 2, "alpha": QUICK.alpha // 2})
    further = Training(model.load(str(folder)), unbroken.corpus, settings, target)
    further._measure()
    assert unbroken.curve[-1].streamed < further.curve[0].streamed < unbroken.curve[0].streamed


def test_an_adapter_of_another_rank_is_not_trained_on(folder, tmp_path, unbroken):
    target = tmp_path / "first.safetensors"
    unbroken.write(target)
    settings = Settings(**{**msgspec.structs.asdict(QUICK), "rank": QUICK.rank + 1})
    with pytest.raises(ModelError, match="has rank and alpha"):
        Training(model.load(str(folder)), unbroken.corpus, settings, target)


# the command


def test_the_command(speaking, audio, tmp_path):
    options = ["--audio", f"{audio}:4", "--out", "adapters/mine.safetensors", "--steps", 2, "--padding", 10]
    done = run("whisperlet-convert", "distil", speaking, *options, cwd=tmp_path, COLUMNS="160")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "adapters/mine.json").read_text())
    assert msgspec.convert(record["settings"], Settings) == Settings(steps=2, padding=10)
    assert {path.name for path in (tmp_path / "adapters").iterdir()} == {"mine.json", "mine.safetensors"}
    for said in (
        "mine.safetensors",
        "whisper-toy",
        "4 recordings, 0.0 min",
        "2, 0.",
        f"{record['curve'][-1]['short']:.4f}",
    ):
        assert said in done.stdout
    assert all(
        line.lstrip().startswith(("distil: read", "distil: transcribe", "distil, gap streamed"))
        for line in done.stderr.splitlines()
    )


def test_a_teacher_that_hears_nothing_has_nothing_to_teach(capfd, monkeypatch, folder, audio, tmp_path):
    sentence = refused(capfd, monkeypatch, folder, "--audio", f"{audio}:4", "--out", tmp_path / "mine.safetensors")
    assert sentence == "the recordings hold nothing in which the teacher hears speech that ends"


def refused(capfd, monkeypatch, *arguments):
    """The one sentence that the command ends with."""
    monkeypatch.setattr("sys.argv", ["whisperlet-convert", "distil", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    *_, sentence = capfd.readouterr().err.splitlines()
    assert sentence.startswith("whisperlet-convert: ")
    return sentence.removeprefix("whisperlet-convert: ")


def test_a_place_that_cannot_be_written(capfd, monkeypatch, folder, audio, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.safetensors").mkdir()
    for out, reason in (
        ("mine", "mine: an adapter's name must end with .safetensors"),
        ("mine.pt", "mine.pt: an adapter's name must end with .safetensors"),
        ("file/mine.safetensors", "mine.safetensors: cannot be written"),
        ("folder.safetensors", "folder.safetensors: cannot be written"),
    ):
        sentence = refused(capfd, monkeypatch, "no-such-model", "--audio", audio, "--out", tmp_path / out)
        assert sentence.endswith(reason)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.safetensors"]


def test_a_folder_without_rights(monkeypatch, tmp_path):
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ConfigError, match="cannot be written"):
        distil.check_target(tmp_path / "mine.safetensors")


def test_wrong_audio_and_wrong_checkpoints(capfd, monkeypatch, folder, audio, tmp_path):
    out = tmp_path / "mine.safetensors"
    bad = write(tmp_path / "bad", 1.0)
    (bad / "noise.wav").write_text("noise" * 99)
    for source, sound, reason in (
        (folder, tmp_path / "gone", "gone: no such folder or manifest.jsonl"),
        (folder, bad, "noise.wav: cannot be read: "),
        (folder, f"{bad}:0", "bad: too little audio to train on"),
        (tmp_path / "gone", audio, "gone is no directory"),
    ):
        assert reason in refused(capfd, monkeypatch, source, "--audio", sound, "--out", out)
    out.with_suffix(".work").mkdir()
    replace_with_text(out.with_suffix(".work") / "checkpoint.pt")
    assert "is damaged" in refused(capfd, monkeypatch, folder, "--audio", audio, "--out", out)
    other = tmp_path / "other"  # ... and which adapter was to be trained on
    sentence = refused(
        capfd, monkeypatch, folder, "--audio", audio, "--out", f"{other}.safetensors", "--start", SHIPPED
    )
    assert "whisper_base.safetensors: was trained for another checkpoint" in sentence
    assert not list(tmp_path.rglob("transcripts.json"))  # hours of work may lie before that point
    assert not out.exists()
