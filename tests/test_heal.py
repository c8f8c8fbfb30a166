"""The stage `heal` on the toy: it closes the gap to its teacher, goes on after a kill, and says what is wrong."""

import random
import shutil
from dataclasses import replace

import msgspec
import pytest
import torch
import toy
from rich.console import Console
from rich.progress import Progress
from test_corpus import write
from test_prune import save_toy

from convert import heal, model, prune, pruned
from convert.answers import Answers
from convert.corpus import Corpus
from convert.heal import Heal
from convert.healing import Healing
from convert.pruned import Kept, KeptLayer
from convert.speechset import Source
from convert.utterances import Lessons
from whisperlet.errors import ConfigError, ModelError

CHANNELS = tuple(range(0, 64, 2))
KEPT = Kept(
    encoder=(KeptLayer(0, (0, 2, 3), CHANNELS), KeptLayer(1, (1, 3), CHANNELS)),
    decoder=(KeptLayer(0, (0, 1, 2), CHANNELS, (0, 1)), KeptLayer(1, (0, 1, 2), CHANNELS, (0, 2))),
)
EMBEDDING = "model.decoder.embed_tokens.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pruned toy beside its parent."""
    parent, small = (tmp_path_factory.mktemp("toys") / name for name in ("whisper-toy", "small"))
    save_toy(parent)
    small.mkdir()
    model.save_directory(pruned.cut(model.load(str(parent)), KEPT), small)
    prune.hand_on_teacher(parent, small)
    return small


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    return write(tmp_path_factory.mktemp("audio") / "babble", *(0.6 + 0.02 * i for i in range(36)))


def stage(audio, **changes):
    quick = {"steps": 12, "encoder_steps": 4, "batch_frames": 500, "warmup_steps": 2, "learning_rate": 2e-3}
    return Heal(audio=(str(audio),), silence=(10, 20), gap_every=4, save_every=5, **quick | changes)


def a_healing(folder, audio, **changes):
    teacher = model.load(str(folder / prune.TEACHER))
    return Healing(stage(audio, **changes), model.load(str(folder)), Lessons(Corpus([Source(audio)], 80), teacher))


def progress():
    return Progress(console=Console(quiet=True))


@pytest.fixture(scope="module")
def result(folder, audio, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return out, heal.run(stage(audio), folder, out, progress())


def test_it_closes_the_gap(result):
    first, second, _, last = result[1].details["curve"]
    assert [point["step"] for point in result[1].details["curve"]] == [0, 4, 8, 12]
    assert first["loss"] is None
    assert second["frames"] < first["frames"]
    assert last["frames"] < 0.7 * first["frames"]
    assert last["hidden"] < first["hidden"]
    assert last["tokens"] < 0.8 * first["tokens"]


def test_its_shape_and_its_words_stay(folder, result):
    before, after = model.load(str(folder)), model.load(str(result[0]))
    assert pruned.sizes_of(after.model) == KEPT.sizes
    assert after.generation == before.generation
    assert after.sha256 != before.sha256
    states = before.model.state_dict(), after.model.state_dict()
    assert torch.equal(*(state[EMBEDDING] for state in states))
    assert not torch.equal(*(state["model.decoder.layers.1.fc1.weight"] for state in states))


def test_the_decoder_waits_for_the_encoder(folder, audio):
    run = a_healing(folder, audio, steps=3, encoder_steps=3)
    before = {name: tensor.clone() for name, tensor in run.tensors().items()}
    run.step = 1
    run._train_step()
    changed = {name.split(".")[1] for name, tensor in run.tensors().items() if not torch.equal(before[name], tensor)}
    assert changed == {"encoder"}
    run.step = 3
    run._train_step()
    changed = {name.split(".")[1] for name, tensor in run.tensors().items() if not torch.equal(before[name], tensor)}
    assert changed == {"encoder", "decoder"}


def test_a_student_that_is_its_teacher_has_no_gap(folder, audio):
    lessons = Lessons(Corpus([Source(audio)], 80), model.load(str(folder / prune.TEACHER)))
    point = Healing(stage(audio), model.load(str(folder / prune.TEACHER)), lessons).measured()
    small = a_healing(folder, audio).measured()
    for name in ("frames", "hidden", "tokens"):  # what is left is half precision, and the teacher's longer silence
        assert getattr(point, name) < 0.06
        assert getattr(small, name) > 0.1


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def left(folder, audio, tmp_path_factory):
    """What a run leaves that was killed two steps after its checkpoint."""
    out = tmp_path_factory.mktemp("left")

    def die(self, rng):
        if self.step == 7:
            raise Killed
        return plain(self, rng)

    plain = Healing.loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Healing, "loss", die)
        with pytest.raises(Killed):
            heal.run(stage(audio), folder, out, progress())
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["checkpoint.pt", "transcripts.json"]
    return out


@pytest.fixture
def work(left, tmp_path):
    return shutil.copytree(left, tmp_path / "out")


def test_it_is_killed_and_goes_on_as_if_nothing_had_been(folder, audio, work, result, monkeypatch):
    steps = []
    plain = Healing.loss
    monkeypatch.setattr(Healing, "loss", lambda self, rng: steps.append(self.step) or plain(self, rng))
    report = heal.run(stage(audio), folder, work, progress())
    assert steps == list(range(5, 12))
    assert report.details["curve"] == result[1].details["curve"]
    assert model.load(str(work)).sha256 == model.load(str(result[0])).sha256


def test_a_checkpoint_of_another_run_is_refused(folder, audio, work):
    with pytest.raises(ModelError, match="is of a run with other settings"):
        heal.run(stage(audio, steps=13), folder, work, progress())


def test_a_damaged_checkpoint_is_found_before_the_teacher_transcribes(folder, audio, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "checkpoint.pt").write_bytes(b"cut off")
    with pytest.raises(ModelError, match=r"checkpoint\.pt: is damaged; remove it to begin anew$"):
        heal.run(stage(audio), folder, tmp_path, progress())
    assert [path.name for path in tmp_path.rglob("*.*")] == ["checkpoint.pt"]


def test_without_a_teacher(folder, audio, tmp_path):
    alone = shutil.copytree(folder, tmp_path / "alone", ignore=shutil.ignore_patterns(prune.TEACHER))
    with pytest.raises(ConfigError, match="nobody to learn from"):
        heal.run(stage(audio), alone, tmp_path / "out", progress())
    named = stage(audio, teacher=str(folder / prune.TEACHER))
    assert heal.find_teacher(named, alone) == folder / prune.TEACHER
    assert named.inputs()[-1] == folder / prune.TEACHER


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"encoder_steps": 999}, {"learning_rate": 0}, {"silence": [9, 3]}, {"audio": []}, {"x": 1}]
)
def test_settings_that_cannot_be(audio, wrong):
    plain = {"stage": "heal", "audio": [str(audio)]}
    msgspec.convert(plain, Heal)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(plain | wrong, Heal)


def test_the_error_is_of_the_tokens_that_are_said(folder, audio):
    """What only fills up a batch teaches nothing."""
    run = a_healing(folder, audio)
    batch = run.lessons.held_out()[0]
    padded = replace(
        batch,
        tokens=torch.nn.functional.pad(batch.tokens, (0, 3), value=toy.EOT),
        is_said=torch.nn.functional.pad(batch.is_said, (0, 3)),
    )
    with torch.no_grad():
        gaps = [run.gap(x) for x in (batch, padded)]
    assert float(gaps[0].tokens) == pytest.approx(float(gaps[1].tokens), rel=1e-2)


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.5, 2.0, 3.0)])
def test_each_error_counts_by_its_weight_and_teaches_the_encoder(folder, audio, weights):
    names = ("frames", "hidden", "tokens")
    run = a_healing(folder, audio, **{f"{name}_weight": weight for name, weight in zip(names, weights, strict=True)})
    run.step = run.settings.encoder_steps
    batch = run.lessons.batch(rng := random.Random(3), run.settings.batch_frames, rng.randint(*run.settings.silence))
    with torch.no_grad():
        gap = run.gap(batch)
    expected = sum(weight * float(getattr(gap, name)) for name, weight in zip(names, weights, strict=True))
    rng = random.Random(3)
    run.lessons.batch = lambda *_: batch
    assert run.loss(rng) == pytest.approx(expected, rel=1e-3)
    taught = [p for name, p in run.named.items() if "encoder" in name and name.endswith("fc1.weight")]
    assert all(p.grad is not None and p.grad.any() for p in taught)


def test_the_silence_after_an_utterance_varies(folder, audio, monkeypatch):
    run, drawn = a_healing(folder, audio, encoder_steps=12), []
    plain = run.lessons.batch
    monkeypatch.setattr(run.lessons, "batch", lambda *args: drawn.append(args[2]) or plain(*args))
    for seed in range(6):
        run.loss(random.Random(seed))
    assert len(set(drawn)) > 2
    assert all(10 <= n <= 20 for n in drawn)


@pytest.mark.parametrize(("room", "n_asked"), [(10**9, 1), (0, 3)])
def test_the_teacher_is_asked_once_about_what_there_is_room_for(folder, audio, monkeypatch, room, n_asked):
    lessons = Lessons(Corpus([Source(audio)], 80), model.load(str(folder / prune.TEACHER)))
    answers, asked = Answers(lessons, room), []
    plain = answers._ask
    monkeypatch.setattr(answers, "_ask", lambda clips: asked.extend(clips) or plain(clips))
    batch = lessons.held_out()[0]
    first, again = answers.frames(batch), answers.frames(batch)
    answers.hidden(batch)
    assert len(asked) == n_asked * len(batch.clips)
    assert torch.equal(first, again)
