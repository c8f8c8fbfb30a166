"""transformers' Trainer for a Whisper over short windows: what is trained, how fast, when to stop, what is kept.

A checkpoint holds what is trained and no more. It counts only once a list of its files with their hashes lies in it, so
one that was cut off is passed over.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from . import adapter, disk, precision, streaming
from .finetune import Finetune
from .lessons import IGNORED, ByLength, Lessons

WEIGHTS, BEST, LIST = "model.safetensors", "best.safetensors", "whole.json"
N_WORKERS = 4  # processes that make the batches while a GPU computes


class Pupil(nn.Module):
    """A Whisper and its losses: the transcript's, and that of the corrected transcript without audio."""

    def __init__(self, whisper: Any, correction_weight: float) -> None:
        super().__init__()
        self.whisper, self.correction_weight = whisper, correction_weight

    def forward(
        self,
        power: Tensor,
        said_ids: Tensor,
        said_labels: Tensor,
        corrected_ids: Tensor | None = None,
        corrected_labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Shapes as `Lessons.collate` gives them."""
        encoded = streaming.full(self.whisper.model.encoder, power)
        loss = self._loss(encoded, said_ids, said_labels)
        if corrected_ids is not None and corrected_labels is not None:
            masked = torch.zeros_like(encoded[:, :1])
            loss = loss + self.correction_weight * self._loss(masked, corrected_ids, corrected_labels)
        return {"loss": loss}

    def _loss(self, encoded: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
        """Mean over the tokens that count; the vocabulary is only asked for those."""
        decoded = self.whisper.model.decoder(ids, encoder_hidden_states=encoded, use_cache=False)
        counts = labels != IGNORED
        logits = self.whisper.proj_out(decoded.last_hidden_state[counts])
        return F.cross_entropy(logits.float(), labels[counts])


def rate(step: int, cycle_steps: float, decay: float, warmup_steps: int) -> float:
    """Share of the learning rate: a cosine that begins anew in each cycle, from `decay` of the peak before."""
    cycle, place = divmod(step / cycle_steps, 1.0)
    peak: float = decay**cycle
    return min(1.0, (step + 1) / (warmup_steps + 1)) * peak * (1.0 + math.cos(math.pi * place)) / 2.0


class Tuner(Trainer):
    """Trains what requires a gradient; scores by `score`, which gives an error rate in percent."""

    def __init__(
        self,
        pupil: Pupil,
        arguments: TrainingArguments,
        lessons: Lessons,
        score: Callable[[], float],
        patience: int,
        schedule: Callable[[int, float], float],
        callbacks: list[TrainerCallback],
    ) -> None:
        self.sampler, self._folder = ByLength(lessons), Path(str(arguments.output_dir))
        self._score, self._patience, self._schedule = score, patience, schedule
        self.trained = {name: p for name, p in pupil.named_parameters() if p.requires_grad}
        self._untrained = {name: p.detach().clone() for name, p in self.trained.items()}
        super().__init__(
            pupil,
            arguments,
            data_collator=lessons.collate,
            train_dataset=lessons,
            eval_dataset=lessons,  # `evaluate` takes its own
            callbacks=[_Epoch(self.sampler), _Last(), _Sealed(), *callbacks],
        )
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, *_: Any) -> ByLength:
        return self.sampler

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The stage's own schedule. The second argument counts steps in an epoch."""
        epoch_steps = num_training_steps / self.args.num_train_epochs
        optimizer = optimizer or self.optimizer
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: self._schedule(n, epoch_steps))
        return self.lr_scheduler

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Score, note whether it is the best so far, and stop when it has not been for long."""
        metrics = {"eval_wer": self._score()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        scores = [row["eval_wer"] for row in self.state.log_history if "eval_wer" in row]
        if scores[-1] == min(scores) and self.args.should_save:
            self._write(self._folder, BEST)
        if min(scores) not in scores[-self._patience :]:
            self.control.should_training_stop = True
        self.control.should_save = self.state.global_step > 0  # what was best and what comes next belong together
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ARG002 - theirs
        if not self.args.should_save:  # every process is asked, one writes
            return
        folder = Path(output_dir or self._folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._write(folder, WEIGHTS)

    def _write(self, folder: Path, name: str) -> None:
        with disk.replacing(folder / name) as partial:
            save_file({name: p.detach().contiguous() for name, p in self.trained.items()}, partial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ARG002
        self.restore(Path(resume_from_checkpoint) / WEIGHTS)

    def restore(self, path: Path) -> None:
        """Put stored tensors in the place of those that are trained."""
        with torch.no_grad():
            for name, tensor in load_file(path).items():
                self.trained[name].copy_(tensor)

    def keep(self, share: float) -> None:
        """The best weights, with this share of what they have changed.

        Between a checkpoint and what was fine-tuned from it lie weights that know most of both (Wortsman et al. 2022,
        "Robust fine-tuning of zero-shot models"). Of an adapter's two factors, the one that began at zero is shortened.
        """
        self.restore(self.best)
        with torch.no_grad():
            for name, tensor in self.trained.items():
                if ".lora_A." not in name:
                    tensor.lerp_(self._untrained[name], 1.0 - share)

    @property
    def best(self) -> Path:
        """What scored best so far."""
        return self._folder / BEST


class _Epoch(TrainerCallback):
    """Tells the sampler which epoch begins."""

    def __init__(self, sampler: ByLength) -> None:
        self._sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self._sampler.epoch = int(state.epoch or 0)


class _Last(TrainerCallback):
    """Scores after the last step too, where scores come every so many of them: the weights there are the most trained."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if state.global_step >= state.max_steps and args.eval_strategy == "steps":
            control.should_evaluate = True


class _Sealed(TrainerCallback):
    """Puts the list of its files into a checkpoint that has been written."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if state.is_world_process_zero:
            seal(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")


class _Thaw(TrainerCallback):
    """Gradual unfreezing: the topmost group at first, one more every so many epochs."""

    def __init__(self, groups: list[list[nn.Parameter]], epochs: int) -> None:
        self._groups, self._epochs = groups, epochs

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        n_thawed = 1 + int(state.epoch or 0) // self._epochs
        for number, group in enumerate(self._groups):
            for parameter in group:
                parameter.requires_grad = number < n_thawed


def prepare(whisper: Any, stage: Finetune) -> list[TrainerCallback]:
    """Require gradients of what the stage's mode trains, and no others; what has to watch over it."""
    whisper.requires_grad_(requires_grad=False)
    if stage.mode == "lora":
        adapter.attach(whisper.model, stage.rank, stage.alpha)
        return []
    if stage.mode == "full":
        whisper.requires_grad_(requires_grad=True)
        whisper.model.encoder.embed_positions.requires_grad_(requires_grad=False)  # a bundle computes these
        return []
    groups = last_layers(whisper, stage.last_layers)
    for group in groups:
        for parameter in group:
            parameter.requires_grad = True
    return [_Thaw(groups, stage.thaw_epochs)]


def last_layers(whisper: Any, n: int) -> list[list[nn.Parameter]]:
    """Parameters of the last n layers of encoder and decoder, the last pair first, with the norms after them."""
    stacks = whisper.model.encoder, whisper.model.decoder
    groups = [[p for stack in stacks for p in stack.layers[-i].parameters()] for i in range(1, _depth(stacks, n) + 1)]
    groups[0] += [p for stack in stacks for p in stack.layer_norm.parameters()]
    return groups


def _depth(stacks: Sequence[Any], n: int) -> int:
    return min(n, *(len(stack.layers) for stack in stacks))


def seal(checkpoint: Path) -> None:
    """Note what a checkpoint consists of; random states of other processes may still be on their way."""
    found = [path for path in checkpoint.iterdir() if path.name != LIST and not path.name.startswith("rng_state_")]
    files = {path.name: disk.hash_path(path) for path in found}
    with disk.replacing(checkpoint / LIST) as partial:
        partial.write_bytes(msgspec.json.encode(files))


def newest(folder: Path) -> Path | None:
    """The last checkpoint that is whole."""
    found = sorted(folder.glob("checkpoint-*/"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    return next((path for path in found if _is_whole(path)), None)


def remove_others(folder: Path, kept: Path | None) -> None:
    """Leave no checkpoint but the one to go on from."""
    for path in folder.glob("checkpoint-*/"):
        if path != kept:
            shutil.rmtree(path)


def _is_whole(checkpoint: Path) -> bool:
    try:
        files = msgspec.json.decode((checkpoint / LIST).read_bytes(), type=dict[str, str])
        return all(disk.hash_path(checkpoint / name) == sha256 for name, sha256 in files.items())
    except (OSError, msgspec.DecodeError):
        return False


def arguments(stage: Finetune, work: Path) -> TrainingArguments:
    """What the Trainer is to do; checkpoints go to `work`."""
    return TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=stage.batch,
        gradient_accumulation_steps=stage.accumulation,
        num_train_epochs=stage.epochs,
        learning_rate=stage.learning_rate,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        eval_strategy="steps" if stage.score_steps else "epoch",
        eval_steps=stage.score_steps or None,
        save_strategy="steps",
        save_steps=stage.save_steps,
        save_total_limit=2,
        remove_unused_columns=False,  # `Lessons.collate` makes what the model takes
        logging_steps=1,
        seed=stage.seed,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        use_cpu=not torch.cuda.is_available(),
        dataloader_num_workers=N_WORKERS if torch.cuda.is_available() else 0,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=True,  # gradual unfreezing leaves some without a gradient
        bf16=precision.precision() == torch.bfloat16,
        fp16=precision.precision() == torch.float16,
    )
