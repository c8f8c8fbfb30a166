"""Training that is gone on with: what carries a run from step to step, and how it is saved.

What is drawn in a step depends on the seed and the step's number alone, so a resumed run is the same as an unbroken one.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec
import torch
from torch import Tensor

from whisperlet.errors import ModelError

from . import disk

CHECKPOINT = "checkpoint.pt"


class Run:
    """A training. What is trained, and on what, is its subclasses'.

    Of its settings it knows `steps`, `seed`, `learning_rate` with `warmup_steps` and `final_rate` (a share of it, at the
    end of a cosine), `clip_norm`, `gap_every` and `save_every` (steps between measurements and between checkpoints).
    """

    point: Any  # type of a measurement

    def __init__(self, settings: Any, parameters: list[Tensor]) -> None:
        self.settings = settings
        self.parameters = parameters
        self.optimiser = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
        self.step = 0
        self.seconds = 0.0
        self.losses: list[float] = []  # since the last measurement
        self.curve: list[Any] = []

    def loss(self, rng: random.Random) -> float:
        """Of a batch; leaves its gradients on the parameters."""
        raise NotImplementedError

    def measured(self) -> Any:
        """A point of the curve, on held-out utterances."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """What a run must have in common with the one that it goes on with."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """What is trained, by name."""
        raise NotImplementedError

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put them back."""
        raise NotImplementedError

    def run(self, work: Path, on_step: Callable[[Self], None] = lambda _: None) -> None:
        """Train to the last step, from where `work` says that an earlier run was."""
        self._resume(work)
        if not self.curve:
            self._measure()
        while self.step < self.settings.steps:
            began = time.monotonic()
            self.losses.append(self._train_step())
            self.step += 1
            self.seconds += time.monotonic() - began
            if self._is_due(self.settings.gap_every):
                self._measure()
            if self._is_due(self.settings.save_every):
                self._save(work)
            on_step(self)

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.settings.steps

    def _measure(self) -> None:
        self.curve.append(self.measured())
        self.losses = []

    def _train_step(self) -> float:
        settings = self.settings
        for group in self.optimiser.param_groups:
            group["lr"] = settings.learning_rate * self._rate()
        loss = self.loss(random.Random(f"{settings.seed} {self.step}"))
        torch.nn.utils.clip_grad_norm_(self.parameters, settings.clip_norm)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return loss

    def _rate(self) -> float:
        """Linear warm-up, then half a cosine down to `final_rate`."""
        settings, step = self.settings, self.step
        if step < settings.warmup_steps:
            return float((step + 1) / settings.warmup_steps)
        progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
        return float(settings.final_rate + (1 - settings.final_rate) * 0.5 * (1 + math.cos(math.pi * progress)))

    def _save(self, work: Path) -> None:
        """A checkpoint; an interruption leaves the last one whole."""
        work.mkdir(parents=True, exist_ok=True)
        curve = msgspec.json.encode(self.curve)
        progress = {"step": self.step, "seconds": self.seconds, "losses": self.losses, "curve": curve}
        tensors = {"trained": self.tensors(), "optimiser": self.optimiser.state_dict()}
        with disk.replacing(work / CHECKPOINT) as partial:
            torch.save({**self.identity(), **progress, **tensors}, partial)

    def _resume(self, work: Path) -> None:
        """Go on from the checkpoint, if there is one. Raises ModelError if it is damaged, or not of such a run."""
        path, saved = work / CHECKPOINT, read(work)
        if saved is None:
            return
        try:
            is_ours = all(saved.get(key, value) == value for key, value in self.identity().items())
            if is_ours:
                self.step, self.seconds, self.losses = saved["step"], saved["seconds"], saved["losses"]
                self.curve = msgspec.json.decode(saved["curve"], type=list[self.point])  # type: ignore[name-defined]
                self.restore(saved["trained"])
                self.optimiser.load_state_dict(saved["optimiser"])
        except Exception as error:  # whatever is not as it was written
            raise damaged(path) from error
        if not is_ours:
            raise ModelError(f"{path}: is of a run with other settings, audio or checkpoint; remove it to begin anew")


def read(work: Path) -> dict[str, Any] | None:
    """The checkpoint that a run has left in `work`, or None. Raises ModelError if it is damaged."""
    path = work / CHECKPOINT
    if not path.is_file():
        return None
    try:
        saved: dict[str, Any] = torch.load(path, weights_only=True)
    except Exception as error:  # unpickling alone raises five kinds
        raise damaged(path) from error
    return saved


def damaged(path: Path) -> ModelError:
    """What is wrong with a checkpoint that cannot be gone on from."""
    return ModelError(f"{path}: is damaged; remove it to begin anew")


def mean(values: Sequence[float]) -> float:
    """To four digits."""
    return float(f"{sum(values) / len(values):.4g}")
