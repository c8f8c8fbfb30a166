"""Fine-tuning a toy: it learns in each mode, goes on where it was killed, and says at once what is wrong."""

import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
import toy
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file
from test_manifests import read_rows, write_rows, write_set
from test_recipe import PLAIN

from convert import finetune, manifests, model, speechset, tables, trainer
from convert.augment import Augmentation
from convert.finetune import Finetune
from convert.manifests import Data
from convert.stages import CHECKPOINTS, RECORD, StageReport
from whisperlet.errors import ConfigError

PLAIN_EVALUATE = trainer.Tuner.evaluate
STEPS = 12  # 6 recordings and 2 replayed ones in batches of 2, two batches a step, 6 epochs


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """So small a model is only slowed down by a second one."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module", autouse=True)
def last_is_best():
    """What a toy hears says little; so what was trained longest is kept."""
    with pytest.MonkeyPatch.context() as patch:
        score_as(patch, lambda step: 100.0 - step)
        yield


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    speakers = {"train": 6, "dev": 2, "test": 2, "canary": 1, "replay": 2}
    return {name: (Data(str(write_set(root / name, n, speaker=name))),) for name, n in speakers.items()}


@pytest.fixture(scope="module")
def make(sets):
    def make(**changes):
        settings = {
            "mode": "full",
            "learning_rate": 2e-3,
            "warmup_steps": 2,
            "batch": 2,
            "accumulation": 2,
            "epochs": 6,
            "patience": 9,
            "save_steps": 2,
            "silence": 10,
            "replay_share": 0.25,
            **sets,
        }
        return Finetune(**(settings | changes))

    return make


def tuned(stage, folder, out):
    out.mkdir(exist_ok=True)
    with Progress(disable=True) as progress:
        return finetune.run(stage, folder, out, progress)


@pytest.fixture(scope="module")
def unbroken(make, folder, tmp_path_factory):
    """A run from the first step to the last, its report and its folder."""
    out = tmp_path_factory.mktemp("unbroken")
    return tuned(make(), folder, out), out


def tensors(out):
    return load_file(out / "model.safetensors")


def changed(folder, out):
    """Names of the tensors that are not as they were."""
    before, after = tensors(folder), tensors(out)
    assert before.keys() == after.keys()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


class Killed(Exception):
    pass


def kill_at(monkeypatch, step):
    """Ctrl-C after so many steps of this process."""
    plain = trainer.Tuner.training_step
    calls = iter(range(10**6))

    def training_step(self, *arguments, **named):
        if next(calls) == 2 * step:  # batches
            raise Killed
        return plain(self, *arguments, **named)

    monkeypatch.setattr(trainer.Tuner, "training_step", training_step)


# what is learnt


def test_it_learns_and_reports(unbroken, folder):
    report, out = unbroken
    details = report.details
    assert report.stage == "finetune"
    losses = [point["loss"] for point in details["curve"]]
    assert losses[0] is None
    assert losses[-1] < 0.7 * losses[1]
    assert [point["step"] for point in details["curve"]] == [0, 2, 4, 6, 8, 10, 12]
    assert details["before"].keys() == details["after"].keys() == {"test", "canary"}
    assert details["before"]["canary"].keys() == {"canary"}
    assert details["recordings"] == {"train": 6, "dev": 2, "test": 2, "canary": 1, "replay": 2}
    assert details["processes"] == 1
    assert "model.encoder.layers.0.fc1.weight" in changed(folder, out)
    assert "model.encoder.embed_positions.weight" not in changed(folder, out)
    assert msgspec.json.decode(msgspec.json.encode(details)) == details
    assert model.load(str(out)).generation == model.load(str(folder)).generation


def test_what_is_kept_is_what_scored_best(unbroken, make, folder, tmp_path, monkeypatch):
    score_as(monkeypatch, lambda step: 10.0 if step == 2 else 50.0)
    report = tuned(make(test=(), canary=()), folder, tmp_path / "out")
    assert min(report.details["curve"], key=lambda point: point["error_rate"])["step"] == 2
    early = tuned(make(test=(), canary=(), patience=2), folder, tmp_path / "early")
    assert [point["step"] for point in early.details["curve"]] == [0, 2, 4, 6]  # and stops
    assert changed(tmp_path / "out", tmp_path / "early") == set()
    assert changed(unbroken[1], tmp_path / "early") != set()


def score_as(patch, score):
    """Let a function of the step take the place of an error rate."""

    def evaluate(self, *arguments, **named):
        self._score = lambda: score(self.state.global_step)
        return PLAIN_EVALUATE(self, *arguments, **named)

    patch.setattr(trainer.Tuner, "evaluate", evaluate)


@pytest.mark.parametrize(("every", "scored"), [(3, [0, 3, 4]), (2, [0, 2, 4])])
def test_the_last_step_is_scored_once_whatever_the_steps_between_scores(make, folder, tmp_path, every, scored):
    report = tuned(make(test=(), canary=(), epochs=2, score_steps=every), folder, tmp_path)
    assert [point["step"] for point in report.details["curve"]] == scored


def test_nothing_is_kept_that_is_worse_than_before(make, folder, tmp_path, monkeypatch):
    score_as(monkeypatch, lambda step: step)
    tuned(make(test=(), canary=(), epochs=2), folder, tmp_path / "out")
    assert changed(folder, tmp_path / "out") == set()


def test_last_layers_are_thawed_one_by_one(make, folder, tmp_path):
    stage = make(mode="last_layers", last_layers=2, thaw_epochs=3, test=(), canary=(), learning_rate=2e-3)
    first = tuned(msgspec.structs.replace(stage, epochs=3), folder, tmp_path / "first")
    names = changed(folder, tmp_path / "first")
    layers = ("model.encoder.layers.1.", "model.decoder.layers.1.", "model.encoder.layer_norm", "model.decoder.layer_n")
    assert names
    assert all(name.startswith(layers) for name in names)
    tuned(stage, folder, tmp_path / "both")
    assert any(name.startswith("model.encoder.layers.0.") for name in changed(folder, tmp_path / "both"))
    assert not any("embed" in name or "conv" in name for name in changed(folder, tmp_path / "both"))
    assert first.details["parameters"] < sum(tensor.numel() for tensor in tensors(folder).values())


def test_low_rank_adapters_are_merged(make, folder, tmp_path):
    report = tuned(make(mode="lora", rank=2, alpha=4, test=(), canary=(), epochs=3), folder, tmp_path / "out")
    names = changed(folder, tmp_path / "out")
    assert names
    assert all(name.endswith(("_proj.weight", "fc1.weight", "fc2.weight")) for name in names)
    delta = tensors(tmp_path / "out")["model.decoder.layers.0.fc1.weight"].double()
    delta = delta - tensors(folder)["model.decoder.layers.0.fc1.weight"].double()
    assert torch.linalg.svdvals(delta)[2] < 1e-4 * torch.linalg.svdvals(delta)[0]
    assert report.details["parameters"] < 20_000


@pytest.mark.parametrize("changes", [{"mode": "full"}, {"mode": "lora", "rank": 2, "alpha": 4}])
def test_a_share_of_what_was_learnt_is_kept(make, folder, tmp_path, changes):
    stage = make(test=(), canary=(), epochs=2, **changes)
    tuned(stage, folder, tmp_path / "all")
    tuned(msgspec.structs.replace(stage, kept_share=0.25), folder, tmp_path / "some")
    before, learnt, kept = (tensors(path) for path in (folder, tmp_path / "all", tmp_path / "some"))
    largest = max((learnt[name] - before[name]).abs().max() for name in before)
    assert largest > 0
    for name, tensor in before.items():
        assert (kept[name] - tensor - 0.25 * (learnt[name] - tensor)).abs().max() < 1e-3 * largest, name


def test_corrections_are_learnt_by_the_decoder_without_audio(make, folder, tmp_path):
    plain = tuned(make(test=(), canary=(), epochs=1), folder, tmp_path / "plain")
    both = tuned(make(test=(), canary=(), epochs=1, correction_weight=1.0), folder, tmp_path / "both")
    assert both.details["curve"][1]["loss"] > 1.3 * plain.details["curve"][1]["loss"]
    checkpoint = model.load(str(folder))
    pupil = trainer.Pupil(checkpoint.model.requires_grad_(requires_grad=True), 1.0)
    ids = torch.tensor([[263, 65, 257, 258, 261, 265]])
    labels = torch.tensor([[-100, -100, -100, -100, -100, 66]])
    said = pupil(torch.zeros(1, 40, 80), ids, labels)["loss"]
    loss = pupil(torch.zeros(1, 40, 80), ids, labels, ids, labels)["loss"] - said
    loss.backward()
    assert checkpoint.model.model.encoder.conv1.weight.grad.abs().max() == 0
    assert checkpoint.model.model.decoder.layers[0].fc1.weight.grad.abs().max() > 0


def test_texts_in_upper_case_are_trained_on_in_the_checkpoints_spelling(make, folder, tmp_path, monkeypatch):
    from convert import tuning

    monkeypatch.setattr(
        tuning.Tuning, "_heard", lambda _self, batch, _change: [f"{one.text.title()}." for one in batch]
    )
    loud = Data(str(write_set(tmp_path / "loud", 4, text="HE SAID", speaker="loud")))
    with Progress(disable=True) as progress:
        spelt = tuning.Tuning(make(train=(loud,), spelling="checkpoint"), folder, tmp_path / "out", progress)
    assert {one.text for one in spelt.sets["train"]} == {"He Said."}
    assert {one.text for one in spelt.sets["dev"]} == {"word 0", "word 1"}


# interruptions


def test_it_is_killed_and_goes_on_as_if_nothing_had_been(make, folder, tmp_path, unbroken, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, 7)
        with pytest.raises(Killed):
            tuned(make(), folder, tmp_path / "out")
    work = tmp_path / "out" / CHECKPOINTS
    assert trainer.newest(work).name == "checkpoint-6"
    # Another interruption, in the middle of a checkpoint: it looks like one, and is not whole.
    torn = shutil.copytree(work / "checkpoint-6", work / "checkpoint-8")
    (torn / "optimizer.pt").write_bytes((torn / "optimizer.pt").read_bytes()[:-100])
    shutil.copytree(work / "checkpoint-6", work / "checkpoint-10")
    (work / "checkpoint-10" / trainer.LIST).unlink()
    assert trainer.newest(work).name == "checkpoint-6"
    steps = []
    plain = trainer.Tuner.training_step
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Tuner, "training_step", lambda *a, **n: (steps.append(1), plain(*a, **n))[1])
        report = tuned(make(), folder, tmp_path / "out")
    assert len(steps) == 2 * (STEPS - 6)
    curves = [[point["error_rate"] for point in some.details["curve"]] for some in (report, unbroken[0])]
    assert curves[0] == curves[1]
    for name, tensor in tensors(unbroken[1]).items():
        assert (tensors(tmp_path / "out")[name] - tensor).abs().max() < 1e-5, name


def test_a_finished_training_is_not_begun_again(make, folder, tmp_path, unbroken, monkeypatch):
    shutil.copytree(unbroken[1], tmp_path / "out")
    kill_at(monkeypatch, 0)
    report = tuned(make(), folder, tmp_path / "out")
    assert report.details == unbroken[0].details


def test_what_a_run_with_other_settings_left_is_not_gone_on_with(make, folder, tmp_path, unbroken, monkeypatch):
    shutil.copytree(unbroken[1], tmp_path / "out")
    kill_at(monkeypatch, 0)
    with pytest.raises(Killed):
        tuned(make(seed=1), folder, tmp_path / "out")


# several processes

LAUNCHED = """
import os, sys, msgspec
from pathlib import Path
from rich.progress import Progress
from convert import finetune
stage = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=finetune.Finetune)
with Progress(disable=True) as progress:
    report = finetune.run(stage, Path(sys.argv[2]), Path(sys.argv[3]), progress)
Path(sys.argv[3] + os.environ["RANK"] + ".json").write_bytes(msgspec.json.encode(report))
"""


@pytest.mark.slow
def test_two_processes_share_the_work_and_one_writes(make, folder, tmp_path):
    script, settings, out = tmp_path / "run.py", tmp_path / "stage.json", tmp_path / "out"
    script.write_text(LAUNCHED)
    stage = make(mode="last_layers", last_layers=2, epochs=4, save_steps=1)
    settings.write_bytes(msgspec.json.encode(stage))
    out.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]  # as accelerate does
    done = subprocess.run(
        [*launch, script, settings, folder, out],
        env={**os.environ, "PYTHONPATH": str(toy.REPOSITORY), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    reports = [json.loads((tmp_path / f"out{rank}.json").read_text())["details"] for rank in range(2)]
    assert reports[0] == reports[1]
    assert reports[0]["processes"] == 2
    assert [point["step"] for point in reports[0]["curve"]] == [0, 1, 2, 3, 4]  # half as many as of one process
    assert model.load(str(out)).multilingual


STAGE = """[[stages]]
stage = "finetune"
train = [{{ path = "{train}" }}]
dev = [{{ path = "{dev}" }}]
batch = 2
accumulation = 1
epochs = 1
silence = 10
"""


@pytest.mark.slow
def test_accelerate_launches_the_command(sets, folder, tmp_path):
    recipe, out = tmp_path / "toy.toml", tmp_path / "out"
    stage = STAGE.format(train=sets["train"][0].path, dev=sets["dev"][0].path)
    plain = PLAIN.replace("pypi:whisper-base", str(folder))
    recipe.write_text(plain.replace("[[stages]]", f"{stage}[[stages]]", 1))
    accelerate = [str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu", "--num_processes", "1"]
    done = subprocess.run(
        [*accelerate, "-m", "convert", "finetune", str(recipe), "--out", str(out)],
        env={
            **os.environ,
            "PYTHONPATH": str(toy.REPOSITORY),
            "WHISPERLET_CACHE": str(tmp_path),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = msgspec.json.decode((out / RECORD).read_bytes(), type=StageReport)
    assert [point["step"] for point in report.details["curve"]] == [0, 3]  # six recordings, two a step
    assert changed(folder, out)


# what is refused


def test_everything_wrong_is_said_before_the_checkpoint_is_looked_at(make, sets, tmp_path):
    bad = write_set(tmp_path / "bad", 3, speaker="dev")
    rows = read_rows(bad)
    (bad / rows[0]["audio"]).unlink()
    rows[1]["text"] = None
    write_rows(bad, rows)
    stage = make(
        train=(Data(str(bad)),),
        test=(Data(str(tmp_path / "gone")),),
        augment=Augmentation(noise=(Data(str(tmp_path / "still")),)),
    )
    with pytest.raises(ConfigError) as refused:
        tuned(stage, tmp_path / "no-checkpoint", tmp_path / "out")
    for sentence in (
        "gone: no such folder or manifest",
        "still: no such folder or manifest",
        "train: 1 audio files are missing: bad0.wav",
        "train: 1 have no text: bad1",
        "train and dev share 1 speakers: dev",
    ):
        assert sentence in str(refused.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_speakers_may_be_shared_where_the_recipe_says_so(make, sets):
    stage = make(dev=sets["train"], shared_speakers=True)
    assert stage.problems() == ["train and dev share 6 ids: train0, train1, train2, train3, train4, ..."]
    assert make(shared_speakers=True).problems() == make().problems() == []


def test_what_only_the_checkpoint_can_tell(make, folder, sets, tmp_path):
    foreign = (Data(str(write_set(tmp_path / "foreign", 2, language="xx", speaker="x"))),)
    with pytest.raises(ConfigError, match="train: 1 languages are unknown to the checkpoint: xx"):
        tuned(make(train=foreign), folder, tmp_path / "out")
    bare = shutil.copytree(folder, tmp_path / "bare")
    text = (bare / "tokenizer.json").read_text().replace("<|startofprev|>", "<|startofpast|>")
    (bare / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigError, match="correction_weight: the checkpoint has no"):
        tuned(make(correction_weight=0.5), bare, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"batch": 0}, "batch must be positive"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"replay_share": 1.0}, "from 0 to 1"),
        ({"kept_share": 0.0}, "above 0"),
        ({"correction_weight": -1.0}, "must not be negative"),
        ({"mode": "half"}, "Invalid enum value"),
        ({"learning_rat": 1.0}, "unknown field"),
    ],
)
def test_settings_that_cannot_be(changes, reason):
    settings = {"stage": "finetune", "train": [{"path": "a"}], "dev": [{"path": "b"}], **changes}
    with pytest.raises(msgspec.ValidationError, match=reason):
        msgspec.convert(settings, Finetune)


# the learning rate


def test_the_rate_is_a_cosine_that_begins_anew_lower():
    rates = [trainer.rate(step, 30, 0.8, 5) for step in range(91)]
    assert rates[0] < rates[3] < rates[5]
    assert rates[5] == pytest.approx((1 + math.cos(math.pi / 6)) / 2)
    assert rates[15] == pytest.approx(0.5)
    assert rates[29] < 0.01
    assert [rates[30], rates[60], rates[90]] == pytest.approx([0.8, 0.64, 0.512])


# without a build


@pytest.fixture
def recipe(make, folder, tmp_path, monkeypatch):
    """A recipe whose stage is over in a moment."""
    monkeypatch.setenv("WHISPERLET_CACHE", str(tmp_path / "cache"))
    stage = make(epochs=1, condition=Augmentation(band_hz=(300.0, 3400.0)))
    plain = toy.recipe(folder.parent)
    return msgspec.structs.replace(plain, source=str(folder), stages=[stage, *plain.stages])


def test_the_stage_runs_alone(recipe, folder, tmp_path):
    report = finetune.alone(recipe, tmp_path / "out", Console(quiet=True))
    written = msgspec.json.decode((tmp_path / "out" / RECORD).read_bytes(), type=StageReport)
    assert msgspec.to_builtins(written) == msgspec.to_builtins(report)
    assert not (tmp_path / "out" / CHECKPOINTS).exists()
    assert changed(folder, tmp_path / "out")
    with pytest.raises(ConfigError, match="out: holds a checkpoint already"):
        finetune.alone(recipe, tmp_path / "out", Console(quiet=True))
    console = Console(width=120, file=io.StringIO())
    tables.show_finetuning(report, console)
    shown = console.file.getvalue()
    assert "canary: canary" in shown
    assert "dev after 2 steps" in shown


def test_a_set_is_written_in_the_condition_in_which_it_is_scored(recipe, tmp_path):
    differences = {}
    for name in ("test", "canary"):
        path = finetune.write_set(recipe, name, tmp_path / name)
        (was, *_), (now, *_) = finetune.read(finetune.of(recipe), name), manifests.read(Data(str(path)))
        difference = speechset.audio(now.audio) - speechset.audio(was.audio)
        differences[name] = float(abs(difference).max())
    assert differences["test"] > 0.01 > differences["canary"]
    with pytest.raises(ConfigError, match="tets: is none of train, dev, test, canary, replay"):
        finetune.write_set(recipe, "tets", tmp_path / "new")
    with pytest.raises(ConfigError, match="toy: has no stage finetune"):
        finetune.of(toy.recipe(tmp_path))
