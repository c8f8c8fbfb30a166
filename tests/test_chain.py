"""A recipe whose first stages change the checkpoint: what a build makes of it, keeps and refuses."""

import json
import re

import msgspec
import pytest
import toy
from rich.console import Console
from rich.progress import Progress

from agent.audio_files import read_file
from convert import adapter, budget, chain, evaluate, model, pipeline, recipe, vocabulary, words
from convert.evaluation import Scored
from convert.recipe import Adapter, Budget, Export, Recipe
from convert.stages import Result, Stage, StageReport
from convert.vocabulary import Vocabulary
from whisperlet.audio import WINDOW_FRAMES
from whisperlet.bundle import open_bundle
from whisperlet.errors import ConfigError, ModelError

TRIM = Vocabulary(languages=("en",), max_tokens=265)  # every byte, and what steers decoding in English
CLIPS = sorted((toy.REPOSITORY / "demo" / "speech").glob("*.flac"))[:3]


class Shift(Stage, frozen=True, kw_only=True, tag="shift"):
    """Moves the encoder a little."""

    by: float = 1e-3


class Mend(Shift, frozen=True, kw_only=True, tag="mend"):
    """As a stage that trains."""

    recovers = True


def run(stage, in_dir, out_dir, _progress):
    checkpoint = model.load_directory(in_dir, "toy")
    checkpoint.model.model.encoder.layer_norm.bias += stage.by
    model.save_directory(checkpoint, out_dir)
    return StageReport(stage.__struct_config__.tag, 1.0, {"by": stage.by})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain") / "checkpoint"
    toy.save_checkpoint(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WHISPERLET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(words, "listed", lambda language: {"the": 0.9, "wizard": 0.1})
    return tmp_path / "cache" / "stages"


def made(folder, *stages, **more):
    return Recipe(source=str(folder), stages=[*stages, *toy.recipe(folder).stages], name="toy", **more)


def loaded(folder, work, *stages, **more):
    """A build of the checkpoint after its first steps."""
    build = pipeline.Build(made(folder, *stages, **more), work, Progress(disable=True))
    build.load()
    return build


def test_a_build_goes_on_with_what_the_last_stage_made(checkpoint, tmp_path):
    plain = model.load(str(checkpoint))
    build = loaded(checkpoint, tmp_path, Shift(by=0.5), TRIM, Shift(by=0.25))
    bias = build.checkpoint.model.model.encoder.layer_norm.bias
    assert (bias - plain.model.model.encoder.layer_norm.bias - 0.75).abs().max() < 1e-6
    assert build.dims.n_vocab == 265
    assert list(build.seconds) == ["load", "shift", "vocabulary", "shift 2", "fold"]
    said = build.manifest()
    assert said.source_sha256 == plain.sha256 != build.checkpoint.sha256
    assert (said.source, said.vocabulary.languages) == ("checkpoint", {"en": 258})
    assert [report["stage"] for report in said.recipe["reports"]] == ["shift", "vocabulary", "shift"]
    assert said.recipe["reports"][0] == {"stage": "shift", "by": 0.5}
    assert said.recipe["stages"][1]["max_tokens"] == 265


def test_a_second_build_takes_what_is_kept(checkpoint, tmp_path, monkeypatch, cache):
    first = loaded(checkpoint, tmp_path, TRIM, Shift())
    kept = {path: path.stat().st_mtime_ns for path in cache.iterdir() if path.suffix == ""}
    assert sorted(path.name.partition("-")[0] for path in kept) == ["shift", "source", "vocabulary"]
    monkeypatch.setattr(vocabulary, "run", lambda *_: pytest.fail("it was run again"))
    second = loaded(checkpoint, tmp_path, TRIM, Shift())
    assert second.manifest() == first.manifest()
    assert second.chain.reports == first.chain.reports
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    loaded(checkpoint, tmp_path, TRIM, Shift(by=2e-3))
    assert len([path for path in cache.iterdir() if path.suffix == ""]) == 4


def test_a_recipe_without_such_stages_keeps_nothing(checkpoint, tmp_path, cache):
    build = loaded(checkpoint, tmp_path)
    assert "reports" not in build.manifest().recipe
    assert not cache.exists()


# adapters


@pytest.fixture
def taught(checkpoint, tmp_path):
    """An adapter of the source."""
    source = model.load(str(checkpoint))
    adapter.attach(source.model.model.encoder, 4, 8)
    path = tmp_path / "mine.safetensors"
    adapter.save(
        path, source.model.model.encoder, rank=4, alpha=8, padding=toy.STREAMS[0].padding, source_sha256=source.sha256
    )
    return Adapter(file=str(path))


def test_an_adapter_fits_as_long_as_the_encoder_is_the_same(checkpoint, tmp_path, taught):
    build = loaded(checkpoint, tmp_path, TRIM, taught)
    assert build.adapter == taught.file
    stages = build.manifest().recipe["stages"]
    assert [stage["stage"] for stage in stages][:2] == ["vocabulary", "adapter"]
    assert len(stages[1]["sha256"]) == 64


def test_an_adapter_that_will_not_fit_is_refused_before_anything_is_run(checkpoint, tmp_path, taught, cache):
    with pytest.raises(ModelError, match=r"was trained for the source's encoder, which shift changes; train one"):
        loaded(checkpoint, tmp_path, TRIM, Shift(), taught)
    source = model.load(str(checkpoint))
    source.model.model.encoder.layer_norm.bias += 1
    adapter.attach(source.model.model.encoder, 4, 8)
    other = tmp_path / "other.safetensors"
    adapter.save(
        other, source.model.model.encoder, rank=4, alpha=8, padding=toy.STREAMS[0].padding, source_sha256=source.sha256
    )
    with pytest.raises(ModelError, match="was trained for another checkpoint than this one"):
        loaded(checkpoint, tmp_path, TRIM, Adapter(file=str(other)))
    assert not cache.exists()
    build = loaded(checkpoint, tmp_path, Shift(by=1.0), Adapter(file=str(other)))  # made for what the stage makes
    assert build.adapter == str(other)


# order


def ordered(tmp_path, *names):
    texts = {
        "vocabulary": 'languages = ["en"]',
        "adapter": 'file = "x"',
        "package": "silence_frames = { default = 256 }",
    }
    stages = "\n".join(f'[[stages]]\nstage = "{name}"\n{texts.get(name, "")}' for name in names)
    path = tmp_path / "mine.toml"
    path.write_text(f'source = "pypi:whisper-base"\n{stages}\n')
    return recipe.load(str(path))


BUILD = ("export", "quantise", "package")


def test_stages_of_the_model_come_first(tmp_path):
    found = ordered(tmp_path, "vocabulary", "adapter", *BUILD)
    assert recipe.model_stages(found) == [Vocabulary(languages=("en",))]
    assert recipe.adapter(found) == Adapter(file="x")
    assert isinstance(recipe.stages(found)[0], Export)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("vocabulary", "vocabulary", *BUILD), "stages[1]: vocabulary may be there once"),
        (("adapter", "vocabulary", *BUILD), "stages[1]: vocabulary changes the checkpoint: it cannot follow adapter"),
        (
            ("export", "vocabulary", "quantise", "package"),
            "stages[1]: vocabulary changes the checkpoint: it cannot follow export",
        ),
        ((*BUILD, "vocabulary"), "stages[3]: vocabulary changes the checkpoint: it cannot follow package"),
        (("vocabulary",), "must be export, quantise, package"),
        (("vocabulary", "adapter", "adapter", *BUILD), "must be export, quantise, package"),
    ],
)
def test_an_order_that_cannot_be_is_refused(tmp_path, names, reason):
    with pytest.raises(ConfigError, match=re.escape(reason)) as error:
        ordered(tmp_path, *names)
    assert str(error.value).startswith("mine.toml: stages")


# budget


@pytest.fixture
def speech(tmp_path):
    folder = tmp_path / "speech"
    folder.mkdir()
    lines = [{"id": path.stem, "audio": str(path), "text": "red green blue black white"} for path in CLIPS]
    (folder / "manifest.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return folder


@pytest.fixture
def ears(monkeypatch):
    """Hears one word in five wrongly for each step of the encoder's bias; counts what it has heard."""
    heard = []

    def evaluate_reference(checkpoint, clips, _options, advance):
        heard.append(len(clips))
        n_wrong = round(float(checkpoint.model.model.encoder.layer_norm.bias[0] - first))
        words = ["wrong"] * n_wrong + ["red", "green", "blue", "black", "white"][n_wrong:]
        advance()
        plain = Scored("", "red green blue black white", " ".join(words), 1.0, None, None, "en", [])
        return [msgspec.structs.replace(plain, id=clip.id) for clip in clips], None

    monkeypatch.setattr(evaluate, "evaluate_reference", evaluate_reference)
    first = None

    def begin(folder):
        nonlocal first
        first = float(model.load(str(folder)).model.model.encoder.layer_norm.bias[0])
        return heard

    return begin


def test_what_stages_cost_is_measured_once(checkpoint, tmp_path, speech, ears):
    heard = ears(checkpoint)
    allowed = Budget(manifest=str(speech), limit=2, max_relative_loss=0.5)
    build = loaded(checkpoint, tmp_path, TRIM, Shift(by=1.0), budget=allowed)
    losses = [(x.stage, x.n, x.source_error_percent, x.error_percent, x.relative_loss) for x in build.chain.losses]
    assert losses == [("vocabulary", 2, 0.0, 0.0, 0.0), ("shift", 2, 0.0, 20.0, 0.2)]
    assert heard == [2, 2, 2]  # the source, and after each stage
    loaded(checkpoint, tmp_path, TRIM, Shift(by=1.0), budget=allowed)
    assert len(heard) == 3
    assert {"score vocabulary", "score shift"} < set(build.seconds)


def test_a_budget_that_is_exceeded_stops_the_build(checkpoint, tmp_path, speech, ears):
    ears(checkpoint)
    with pytest.raises(ModelError) as error:
        loaded(checkpoint, tmp_path, TRIM, Shift(by=1.0), Shift(by=1.0), budget=Budget(manifest=str(speech)))
    assert str(error.value) == (
        "the accuracy budget is exceeded after shift: on 3 clips of speech its error rate is 20.00 %, the source's "
        "0.00 %, a relative loss of 20.0 %, and max_relative_loss allows 2.0 %"
    )


def test_a_later_stage_may_win_it_back(checkpoint, tmp_path, speech, ears):
    ears(checkpoint)
    allowed = Budget(manifest=[str(speech)])
    build = loaded(checkpoint, tmp_path, Shift(by=1.0), Mend(by=-1.0), budget=allowed)
    assert [loss.error_percent for loss in build.chain.losses] == [20.0, 0.0]
    with pytest.raises(ModelError, match="exceeded after mend"):
        loaded(checkpoint, tmp_path, Shift(by=1.0), Mend(by=0.0), budget=allowed)


def test_what_is_missing_is_named_before_anything_is_loaded(tmp_path):
    gone = Vocabulary(corpus=(str(tmp_path / "words.txt"),))
    with pytest.raises(ConfigError, match=r"vocabulary: .*words\.txt: no such file"):
        pipeline.build(made(tmp_path / "nothing", gone), tmp_path / "out", Console(quiet=True))
    wanted = Budget(manifest=str(tmp_path / "speech"))
    with pytest.raises(ConfigError, match="speech: cannot be read"):
        chain.check(made(tmp_path / "nothing", TRIM, budget=wanted))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"limit": 0}, {"max_relative_loss": 1.5}, {"manifest": []}])
def test_a_budget_that_cannot_be_is_refused(change):
    with pytest.raises(ValueError, match="budget: needs"):
        Budget(**{"manifest": "x", **change})


def test_accuracy_is_what_is_not_wrong():
    assert budget.relative_loss(4.0, 4.0) == 0.0
    assert budget.relative_loss(4.0, 13.6) == pytest.approx(0.1)
    assert budget.relative_loss(10.0, 5.5) == pytest.approx(-0.05)
    assert budget.relative_loss(100.0, 120.0) == 0.0


def test_the_rate_of_a_language_without_spaces_is_of_characters(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "stages").mkdir()
    clip = Scored("a", "你好世界", "你好世间", 1.0, None, None, "zh", [])
    monkeypatch.setattr(evaluate, "evaluate_reference", lambda *_: ([clip], None))
    result = Result(checkpoint, "0", StageReport("source", 0.0))
    assert budget.error_percent(result, [], tmp_path, lambda: None) == 25.0
    unknown = msgspec.structs.replace(clip, ref=None)
    monkeypatch.setattr(evaluate, "evaluate_reference", lambda *_: ([unknown], None))
    other = msgspec.structs.replace(result, sha256="1")
    with pytest.raises(ModelError, match="have no texts to score against"):
        budget.error_percent(other, [], tmp_path, lambda: None)


# to the end


@pytest.mark.slow
def test_the_agent_hears_in_a_bundle_of_a_smaller_vocabulary_what_it_hears_in_the_whole_one(checkpoint, tmp_path):
    """Weights are quantised row by row, so no row knows that others are gone."""
    export = Export(
        n_text_ctx=toy.N_TEXT_CTX,
        encode_frames=(WINDOW_FRAMES,),
        cross_frames=(WINDOW_FRAMES,),
        decode_tokens=(1, 4),
        stream_overlaps=(10,),
        stream_padding=9,
        stream_context=60,
    )
    ending = [export, *toy.recipe(checkpoint).stages[1:]]
    for name, first in (("small", [TRIM]), ("whole", [])):
        wanted = Recipe(source=str(checkpoint), stages=[*first, *ending], name=name)
        report = pipeline.build(wanted, tmp_path, Console(quiet=True))
        assert [stage.stage for stage in report.stages] == ["vocabulary"] * len(first)
    small, whole = (open_bundle(tmp_path / f"{name}.tflite") for name in ("small", "whole"))
    assert (small.manifest.dims.n_vocab, whole.manifest.dims.n_vocab) == (265, toy.DIMS.n_vocab)
    assert small.manifest.vocabulary.languages == {"en": 258}
    pcm = [read_file(path) for path in CLIPS]
    texts = [evaluate.bundle_texts(bundle.path, pcm, "en") for bundle in (small, whole)]
    assert texts[0] == texts[1]
    assert any(texts[0])
