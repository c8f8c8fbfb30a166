"""One fine-tuning: its checkpoint, its recordings and scores, and what is kept of it when it is interrupted."""

from __future__ import annotations

import logging
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import msgspec
import tokenizers
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.progress import Progress
from transformers import TrainerCallback

from whisperlet.errors import ConfigError

from . import (
    adapter,
    disk,
    finetune,
    greedy,
    lessons,
    manifests,
    model,
    precision,
    scoring,
    spelling,
    streaming,
    trainer,
)
from .augment import Augmenter, heard
from .finetune import Finetune
from .lessons import Lessons, Plan
from .machine import describe
from .manifests import Utterance
from .stages import CHECKPOINTS, located
from .trainer import Pupil, Tuner

Sets = dict[str, dict[str, float | None]]  # error rate in percent, by "test" or "canary", then by the set's name


SPELT_AT_ONCE = 128  # recordings, before what was found is kept


class Point(msgspec.Struct, frozen=True):
    """One score on the held-out recordings."""

    step: int
    loss: float | None  # mean over the steps since the last point; of the first there are none
    error_rate: float  # percent


class Tuning:
    """Everything that a run needs, from the checkpoint to the scores."""

    def __init__(self, stage: Finetune, in_dir: Path, out_dir: Path, progress: Progress) -> None:
        logging.getLogger("transformers").setLevel(logging.ERROR)
        self.stage, self.out, self.work, self.progress = stage, out_dir, out_dir / CHECKPOINTS, progress
        self.checkpoint = model.load_directory(in_dir, in_dir.name)
        self.arguments = trainer.arguments(stage, self.work)
        self.processes = PartialState()
        self._begin()
        self.sets = {name: finetune.read(stage, name) for name in finetune.SETS}
        self._check()
        self.device = self.arguments.device
        self.whisper = cast("Any", self.checkpoint.model)  # the types of its methods are not what they take
        self.whisper.to(self.device)
        self.tokenizer = tokenizers.Tokenizer.from_str(self.checkpoint.tokenizer_json.decode())
        self.condition = Augmenter(stage.condition) if stage.condition else None
        self._spell()

    def _begin(self) -> None:
        """A run with other settings leaves nothing that this one could go on with."""
        identity = {"stage": msgspec.json.encode(self.stage).decode(), "checkpoint": self.checkpoint.sha256}
        path = self.work / "run.json"
        if self.processes.is_main_process and _read(path) != identity:
            shutil.rmtree(self.work, ignore_errors=True)
            _write(path, identity)
        self.processes.wait_for_everyone()

    def _check(self) -> None:
        """What only the checkpoint can tell of the recordings."""
        languages = list(self.checkpoint.generation.lang_ids) or ["en"]
        found = [
            line for name, some in self.sets.items() for line in manifests.unknown_languages(name, some, languages)
        ]
        if self.stage.correction_weight and lessons.START_OF_PREVIOUS.encode() not in self.checkpoint.tokenizer_json:
            found.append(f"correction_weight: the checkpoint has no {lessons.START_OF_PREVIOUS} to put a text before")
        if found:
            raise ConfigError("; ".join(found))

    # texts

    def _spell(self) -> None:
        """Give the texts to train on the checkpoint's case and punctuation, if they are to have it."""
        if self.stage.spelling == "as_is":
            return
        spelt: dict[str, str] = _read(self.work / "spelt.json") or {}  # by recording: sets may share some
        for name in ("train", "replay"):
            bare = [one for one in self.sets[name] if not spelling.has_style(one.text) and str(one.audio) not in spelt]
            for first in range(0, len(bare), SPELT_AT_ONCE):
                spelt |= self._spelt(name, bare[first : first + SPELT_AT_ONCE])
                self._keep("spelt.json", spelt)
            self.sets[name] = [
                msgspec.structs.replace(one, text=spelt.get(str(one.audio), one.text)) for one in self.sets[name]
            ]

    def _spelt(self, name: str, bare: Sequence[Utterance]) -> dict[str, str]:
        texts = self.transcripts(f"spell {name}", bare, None)
        spelt = [spelling.lend(one.text, text, one.language) for one, text in zip(bare, texts, strict=True)]
        return {str(one.audio): text for one, text in zip(bare, spelt, strict=True)}

    # scores

    def transcripts(self, what: str, utterances: Sequence[Utterance], change: Augmenter | None) -> list[str]:
        """What the model hears in recordings as they are scored; each process takes its share of them."""
        rank, n_ranks = self.processes.process_index, self.processes.num_processes
        mine = sorted(range(len(utterances)), key=lambda i: utterances[i].audio.stat().st_size)[rank::n_ranks]
        task = self.progress.add_task(what, total=len(mine))
        texts: list[tuple[int, str]] = []
        for first in range(0, len(mine), greedy.BATCH):
            places = mine[first : first + greedy.BATCH]
            texts += zip(places, self._heard([utterances[place] for place in places], change), strict=True)
            self.progress.advance(task, len(places))
        self.progress.remove_task(task)
        gathered = dict(gather_object(texts))
        return [gathered[place] for place in range(len(utterances))]

    def _heard(self, batch: Sequence[Utterance], change: Augmenter | None) -> list[str]:
        n_mels = self.whisper.config.num_mel_bins
        clips = [(streaming.log_power(heard(one, change), n_mels), one.language) for one in batch]
        rows = greedy.transcribe(
            self.whisper, self.checkpoint.generation, clips, self.stage.silence, precision.precision()
        )
        return [self.tokenizer.decode(row).strip() for row in rows]

    def _rate(self, what: str, utterances: Sequence[Utterance], change: Augmenter | None) -> float | None:
        """Error rate in percent: of words, or of characters where no set has words."""
        texts = self.transcripts(what, utterances, change)
        pairs = [
            (scoring.normalise(one.text, one.language), scoring.normalise(text, one.language))
            for one, text in zip(utterances, texts, strict=True)
        ]
        is_worded = any(one.language not in scoring.SPACELESS for one in utterances)
        rate = scoring.word_error_rate(pairs) if is_worded else scoring.character_error_rate(pairs)
        return None if rate is None else round(rate, 2)

    def scores(self, when: str) -> Sets:
        """Error rates on each set of test and canary; kept, so that they are found once."""
        kept: Sets = _read(self.work / f"{when}.json") or {"test": {}, "canary": {}}
        for kind, found in kept.items():
            for name, utterances in self._named(kind).items():
                if name not in found:
                    change = self.condition if kind == "test" else None
                    found[name] = self._rate(f"{when}: {name}", utterances, change)
                    self._keep(f"{when}.json", kept)
        return kept

    def _named(self, kind: str) -> dict[str, list[Utterance]]:
        sets: dict[str, list[Utterance]] = defaultdict(list)
        for data in getattr(self.stage, kind):
            sets[located(data.path).name] += manifests.read(data)
        return sets

    # training

    def train(self) -> list[Point]:
        """Train until the last epoch, or until nothing is gained; put the best weights in place. Its scores."""
        callbacks = trainer.prepare(self.whisper, self.stage)
        lessons = Lessons(self.checkpoint, self._plan(), self.sets["train"], self._general())
        tuner = Tuner(
            Pupil(self.whisper, self.stage.correction_weight),
            self.arguments,
            lessons,
            lambda: self._rate("score", self.sets["dev"], self.condition) or 0.0,
            self.stage.patience,
            self._schedule,
            [*callbacks, _Shown(self.progress)],
        )
        self.n_trained = sum(p.numel() for p in tuner.trained.values())
        curve = _read(self.work / "curve.json")
        if curve is None:
            curve = self._taught(tuner)
        tuner.keep(self.stage.kept_share)
        return msgspec.convert(curve, list[Point])

    def _taught(self, tuner: Tuner) -> list[dict[str, Any]]:
        start = trainer.newest(self.work)
        self.processes.wait_for_everyone()
        if self.processes.is_main_process:
            trainer.remove_others(self.work, start)
        self.arguments.eval_on_start = start is None
        tuner.train(resume_from_checkpoint=None if start is None else str(start))
        curve = [msgspec.to_builtins(point) for point in _points(tuner.state.log_history)]
        self._keep("curve.json", curve)
        return curve

    def _plan(self) -> Plan:
        s = self.stage
        return Plan(
            augment=s.augment,
            replay_share=s.replay_share,
            corrections=s.correction_weight > 0,
            mistakes=s.mistakes,
            silence=s.silence,
            batch=s.batch,
            seed=s.seed,
        )

    def _general(self) -> list[Utterance]:
        return [msgspec.structs.replace(one, is_general=True) for one in self.sets["replay"]]

    def _schedule(self, step: int, epoch_steps: float) -> float:
        s = self.stage
        return trainer.rate(step, s.cycle_epochs * epoch_steps, s.cycle_decay, s.warmup_steps)

    # results

    def save(self) -> None:
        """The checkpoint with what was learnt; the first process writes it."""
        if self.stage.mode == "lora":
            adapter.absorb(self.whisper.model)
        if self.processes.is_main_process:
            whisper = self.whisper.to("cpu").requires_grad_(requires_grad=False).eval()
            model.save_directory(replace(self.checkpoint, model=whisper), self.out)
        self.processes.wait_for_everyone()

    def described(self) -> dict[str, Any]:
        """How it was done."""
        return {
            "mode": self.stage.mode,
            "parameters": self.n_trained,
            "processes": self.processes.num_processes,
            "precision": str(precision.precision()).removeprefix("torch."),
            "recordings": {name: len(some) for name, some in self.sets.items()},
            "resampled": {name: rates for name, some in self.sets.items() if (rates := manifests.resampled(some))},
            "machine": describe(),
        }

    def _keep(self, name: str, content: Any) -> None:
        if self.processes.is_main_process:
            _write(self.work / name, content)
        self.processes.wait_for_everyone()


class _Shown(TrainerCallback):
    """A bar with the last loss and score."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._said = progress, {"loss": "-", "eval_wer": "-"}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self._task = self._progress.add_task("finetune", total=state.max_steps, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        logs = kwargs["logs"]
        self._said |= {name: f"{logs[name]:.3f}" for name in self._said if name in logs}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        said = f"finetune, loss {self._said['loss']} error rate {self._said['eval_wer']} %"
        self._progress.update(self._task, completed=state.global_step, description=said)


def _points(history: Sequence[dict[str, Any]]) -> list[Point]:
    """Scores, each with the mean of the losses since the one before."""
    points, losses = [], []
    for row in history:
        if "loss" in row:
            losses.append(row["loss"])
        if "eval_wer" in row:
            loss = round(sum(losses) / len(losses), 4) if losses else None
            points.append(Point(row["step"], loss, row["eval_wer"]))
            losses = []
    return points


def _read(path: Path) -> Any:
    """What `_write` wrote; None if it did not."""
    return msgspec.json.decode(path.read_bytes()) if path.is_file() else None


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk.replacing(path) as partial:
        partial.write_bytes(msgspec.json.encode(content))
