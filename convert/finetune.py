"""The stage that adapts a checkpoint to a domain, from recordings with their texts.

transformers' Trainer does the training, peft the low-rank adapters, audiomentations the distortions. Under `accelerate
launch` every process runs `run`; the first alone writes.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from whisperlet.errors import ConfigError

from . import augment, manifests, stages
from .augment import Augmentation
from .manifests import Data, Utterance
from .stages import CHECKPOINTS, RECORD, Stage, StageReport

if TYPE_CHECKING:
    from .recipe import Recipe
    from .tuning import Tuning

SETS = ("train", "dev", "test", "canary", "replay")
CONDITIONED = ("dev", "test")  # are scored in the recipe's condition


class Finetune(Stage, frozen=True, kw_only=True, tag="finetune"):
    """Checkpoint -> checkpoint that hears a domain better."""

    recovers: ClassVar[bool] = True

    train: tuple[Data, ...]
    dev: tuple[Data, ...]  # scored while training: decides what is kept and when to stop
    test: tuple[Data, ...] = ()  # scored before and after, and otherwise not looked at
    canary: tuple[Data, ...] = ()  # general speech, scored before and after as it is
    replay: tuple[Data, ...] = ()  # general speech, trained on as it is, so that it is not forgotten
    replay_share: float = 0.2  # of what is trained on
    shared_speakers: bool = False  # dev and test may have speakers of train: a model for few people
    augment: Augmentation = Augmentation()  # what is trained on
    condition: Augmentation | None = None  # dev and test, the same each time
    spelling: Literal["as_is", "checkpoint"] = "as_is"  # checkpoint: its case and punctuation where texts have none

    mode: Literal["last_layers", "lora", "full"] = "last_layers"
    last_layers: int = 3  # of encoder and of decoder
    thaw_epochs: int = 1  # until one layer more is trained, from the last on
    rank: int = 16
    alpha: int = 32

    learning_rate: float = 3e-5
    warmup_steps: int = 10
    cycle_epochs: int = 3  # the learning rate's cosine begins anew ...
    cycle_decay: float = 0.8  # ... from this share of its last peak
    kept_share: float = 1.0  # of what the best weights have changed; less forgets less, and learns a little less
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    batch: int = 8  # recordings a process takes at once
    accumulation: int = 4  # batches to a step
    epochs: int = 9
    patience: int = 3  # scores without a new best, then it stops
    score_steps: int = 0  # steps between scores, the last one is always scored; 0: an epoch
    save_steps: int = 25  # steps between checkpoints
    silence: int = 128  # frames of 20 ms after each recording
    correction_weight: float = 0.0  # of a loss on the decoder alone: a transcript with mistakes -> the right one
    mistakes: float = 0.15  # share of words
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ("last_layers", "thaw_epochs", "rank", "alpha", "cycle_epochs", "batch", "accumulation", "epochs")
        for name in (*positive, "patience", "save_steps", "learning_rate", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive")
        if not 0.0 <= self.replay_share < 1.0 or not 0.0 <= self.mistakes <= 1.0:
            raise ValueError("replay_share and mistakes are shares: from 0 to 1")
        if not 0.0 < self.kept_share <= 1.0:
            raise ValueError("kept_share must be above 0, and 1 at the most")
        if min(self.warmup_steps, self.score_steps, self.silence, self.correction_weight, self.weight_decay) < 0:
            raise ValueError("warmup_steps, score_steps, silence, correction_weight, weight_decay must not be negative")

    @property
    def data(self) -> Iterator[Data]:
        """Every set that the stage reads."""
        for name in SETS:
            yield from getattr(self, name)
        yield from self.augment.sets
        yield from self.condition.sets if self.condition else ()

    def inputs(self) -> list[Path]:
        """Manifests, and the recordings that are taken of them."""
        return sorted({path for data in self.data for path in manifests.files(data)})

    def problems(self) -> list[str]:
        """Everything that is wrong with the recordings, found out before anything is trained."""
        found, sets = [], {}
        for name in SETS:
            try:
                sets[name] = read(self, name)
            except ConfigError as error:
                found.append(str(error))
        for noise in (*self.augment.sets, *(self.condition.sets if self.condition else ())):
            try:
                manifests.audio_files([noise])
            except ConfigError as error:
                found.append(str(error))
        found += [line for name, some in sets.items() for line in _problems(name, some)]
        return found + self._overlaps(sets)

    def _overlaps(self, sets: dict[str, list[Utterance]]) -> list[str]:
        """What is scored must not be trained on."""
        pairs = [(a, b) for a in ("train", "replay") for b in ("dev", "test", "canary")] + [("dev", "test")]
        return [
            line
            for a, b in pairs
            if a in sets and b in sets
            for line in manifests.overlaps(a, sets[a], b, sets[b], speakers=not self.shared_speakers)
        ]


def _problems(name: str, utterances: list[Utterance]) -> list[str]:
    is_optional = name in ("test", "canary", "replay")
    return [] if is_optional and not utterances else manifests.problems(name, utterances)


def read(stage: Finetune, name: str) -> list[Utterance]:
    """One of the stage's sets. Raises ConfigError."""
    return [one for data in getattr(stage, name) for one in manifests.read(data)]


def run(stage: Finetune, in_dir: Path, out_dir: Path, progress: Progress) -> StageReport:
    """Fine-tune; what was begun in `out_dir` is gone on with.

    Raises ConfigError if recordings are not as they should be, ModelError if the checkpoint is not.
    """
    began = time.monotonic()
    if found := stage.problems():
        raise ConfigError("; ".join(found))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from .tuning import Tuning

    tuning = Tuning(stage, in_dir, out_dir, progress)
    details = _tuned(tuning)
    return StageReport("finetune", round(time.monotonic() - began, 1), details)


def _tuned(tuning: Tuning) -> dict[str, Any]:
    before = tuning.scores("before")
    curve = tuning.train()
    after = tuning.scores("after")
    tuning.save()
    points = [msgspec.to_builtins(point) for point in curve]
    return {"before": before, "after": after, "curve": points, **tuning.described()}


# the stage without a build


def of(recipe: Recipe) -> Finetune:
    """The recipe's finetune stage. Raises ConfigError if it has none."""
    found = [stage for stage in recipe.stages if isinstance(stage, Finetune)]
    if not found:
        raise ConfigError(f"{recipe.name}: has no stage finetune")
    return found[0]


def alone(recipe: Recipe, out: Path, console: Console) -> StageReport:
    """Fine-tune the recipe's source into a folder, in this process or in all that `accelerate launch` has started."""
    stage = of(recipe)
    if (out / "config.json").exists():
        raise ConfigError(f"{out}: holds a checkpoint already")
    stages.check([stage])
    from . import chain, model

    out.mkdir(parents=True, exist_ok=True)
    is_first = int(os.environ.get("RANK", "0")) == 0
    columns = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not is_first) as progress:
        kept = chain.Chain(recipe, progress, lambda *_: nullcontext(str))
        source = kept.keep_source(model.load(recipe.source))
        report = run(stage, source.folder, out, progress)
    if is_first:
        (out / RECORD).write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1))
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    return report


def write_set(recipe: Recipe, name: str, out: Path) -> Path:
    """One of the stage's sets as it is scored; the path of its manifest. Raises ConfigError."""
    stage = of(recipe)
    if name not in SETS:
        raise ConfigError(f"{name}: is none of {', '.join(SETS)}")
    if found := _problems(name, read(stage, name)):
        raise ConfigError("; ".join(found))
    change = stage.condition if name in CONDITIONED else None
    return augment.write_set(read(stage, name), change, out)
