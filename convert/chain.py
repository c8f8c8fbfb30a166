"""From a source to the checkpoint that is exported, through the stages of a recipe that change it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from rich.progress import Progress

from . import budget as budgets
from . import model, stages, wheels
from . import recipe as recipes
from .budget import Loss
from .model import Checkpoint
from .recipe import Recipe
from .stages import Result, StageReport, tag

Step = Callable[[str, int | None], AbstractContextManager[Callable[[str], None]]]  # a bar, see `pipeline.Build.step`


_WAITING = "waits: another run makes the same"


def stages_dir() -> Path:
    """Where the results of stages are kept. They may be removed at any time: the next build makes them anew."""
    return wheels.cache_dir() / "stages"


def check(recipe: Recipe) -> None:
    """Raise ConfigError with everything that would stop one of the stages, or the check of the budget."""
    stages.check(recipe.stages)
    if recipe.budget:
        budgets.clips_of(recipe.budget)


class Chain:
    """One run of the stages, and what it tells of itself."""

    def __init__(self, recipe: Recipe, progress: Progress, step: Step) -> None:
        self.recipe, self.progress, self.step = recipe, progress, step
        self.root = stages_dir()
        self.reports: list[StageReport] = []
        self.losses: list[Loss] = []

    def run(self, checkpoint: Checkpoint) -> Checkpoint:
        """What all stages make of the source. Raises ModelError where they cost more than the budget allows."""
        source = self.keep_source(checkpoint)
        name, result = checkpoint.source, source
        del checkpoint  # a stage needs the memory
        for title, stage in self._titled():
            with self.step(title, None) as advance:
                result = stages.run(stage, result, self.root, self.progress, lambda: advance(_WAITING))
            self.reports.append(result.report)
            self._score(title, stage, result, source)
        return model.load_directory(result.folder, name)

    def keep_source(self, checkpoint: Checkpoint) -> Result:
        """The source in the form that stages read."""

        def make(out: Path) -> StageReport:
            model.save_directory(checkpoint, out)
            return StageReport("source", 0.0)

        tokenizer = hashlib.sha256(checkpoint.tokenizer_json).hexdigest()
        settings = {"tensors": checkpoint.sha256, "tokenizer": tokenizer, "generation": repr(checkpoint.generation)}
        return stages.keep(self.root, "source", settings, make, lambda: None)

    def _titled(self) -> Iterator[tuple[str, stages.Stage]]:
        """The stages with names that differ."""
        seen: list[str] = []
        for stage in recipes.model_stages(self.recipe):
            seen.append(tag(stage))
            n = seen.count(tag(stage))
            yield tag(stage) if n == 1 else f"{tag(stage)} {n}", stage

    def _score(self, title: str, stage: stages.Stage, result: Result, source: Result) -> None:
        """Note what has been lost so far, which must be within the budget if no later stage wins any of it back."""
        budget = self.recipe.budget
        if budget is None:
            return
        with self.step(f"score {title}", None) as advance:
            found = budgets.losses(stage, result, source, budget, self.root, lambda: advance(""))
        self.losses += found
        chosen = recipes.model_stages(self.recipe)
        if not any(later.recovers for later in chosen[len(self.reports) :]):
            budgets.check(found, budget)
