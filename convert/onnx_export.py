"""PyTorch -> ONNX: a window of the encoder and a pass of the decoder, for other runtimes and other converters.

The same modules as the bundle's, float32, static shapes, one file each with its own weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from whisperlet.audio import WINDOW_FRAMES
from whisperlet.bundle import Dims
from whisperlet.errors import ConfigError, ModelError

from .fold import FoldedWhisper
from .graphs import Decode, Encode, by_layer
from .parity import Probe
from .recipe import Export

MAX_ERROR = 1e-3  # of keys and values relative to the largest of them, and of logits: float32 added up in another order
Tensors = dict[str, NDArray[Any]]


NEXT = "next_"  # before the name of an output that takes an input's place in the next pass: ONNX wants names once


class Shapes(msgspec.Struct, frozen=True, kw_only=True):
    """Which graphs to write."""

    n_frames: int = WINDOW_FRAMES  # of the encoder's window and of what the decoder looks at, 20 ms each
    n_tokens: int = 1  # in a pass of the decoder

    def check(self, export: Export) -> None:
        """Raise ConfigError where a size is none of a Whisper."""
        if not 1 <= self.n_frames <= WINDOW_FRAMES:
            raise ConfigError(f"frames: {self.n_frames}: an encoder takes 1 to {WINDOW_FRAMES}")
        if not 1 <= self.n_tokens <= export.n_text_ctx:
            raise ConfigError(f"tokens: {self.n_tokens}: a pass takes 1 to n_text_ctx, {export.n_text_ctx}")


class OnnxParity(msgspec.Struct, frozen=True):
    """How far a runtime is from the PyTorch module: the largest difference, relative to the largest value."""

    graph: str
    runtime: str
    error: float | None  # None: it could not be converted
    note: str  # the output that is furthest off, or what stopped the converter


class Placed(Decode):
    """The decoder with state written by a sum over a mask: ops that every converter has."""

    @staticmethod
    def update(state: Tensor, new: Tensor, axis: int, position: Tensor) -> Tensor:
        """See `Decode.update`."""
        places = position + torch.arange(new.shape[axis], dtype=torch.int32)
        rows = (torch.arange(state.shape[axis], dtype=torch.int32)[:, None] == places[None]).float()
        kept = 1.0 - rows.sum(1)
        if axis == 1:  # keys: (n_head, n, d_head)
            return state * kept[:, None] + rows @ new
        return state * kept + new @ rows.T


def graphs(whisper: FoldedWhisper, dims: Dims, shapes: Shapes) -> Iterator[tuple[str, Encode | Decode]]:
    """Names and modules."""
    n_frames, n_tokens = shapes.n_frames, shapes.n_tokens
    yield f"encode_{n_frames}", Encode(whisper, dims, n_frames, n_frames)
    watched = by_layer(whisper.alignment_heads)
    yield f"decode_{n_tokens}_{n_frames}", Placed(whisper, dims, n_tokens, n_frames, watched)


def export(
    whisper: FoldedWhisper,
    probe: Probe,
    shapes: Shapes,
    out: Path,
    advance: Callable[[str], None] = lambda _: None,
) -> tuple[list[Path], list[OnnxParity]]:
    """Write every graph into `out` and compare it. Raises ModelError where one computes something else."""
    paths, rows = [], []
    for name, module in graphs(whisper, probe.dims, shapes):
        advance(f"writes {name}")
        path = out / f"{name}.onnx"
        _write(module.eval(), path)
        advance(f"compares {name}")
        inputs = probe.inputs(module)
        with torch.inference_mode():
            expected = {key: value.numpy() for key, value in module(**inputs).items()}
        rows.append(compared(name, "onnxruntime", expected, run(path, inputs)))
        paths.append(path)
    return paths, rows


def _write(module: Encode | Decode, path: Path) -> None:
    examples = module.examples()
    named = _Named(module, list(examples))
    with torch.inference_mode():
        outputs = [f"{NEXT}{name}" if name in examples else name for name in named.module(**examples)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        program = torch.onnx.export(
            named,
            tuple(examples.values()),
            dynamo=True,
            input_names=list(examples),
            output_names=outputs,
            verbose=False,
        )
    assert program is not None
    program.save(str(path), external_data=False)


class _Named(nn.Module):
    """A graph whose inputs come in order: the exporter would order named ones as it likes."""

    def __init__(self, module: Encode | Decode, names: list[str]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        found = self.module(**dict(zip(self.names, inputs, strict=True)))
        return tuple(found.values())


def run(path: Path, inputs: dict[str, Tensor]) -> Tensors:
    """Outputs of an ONNX file on onnxruntime, by name."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    wanted = {one.name for one in session.get_inputs()}  # one that folds away is not there
    found = session.run(names, {key: value.numpy() for key, value in inputs.items() if key in wanted})
    return dict(zip(names, found, strict=True))


def compared(graph: str, runtime: str, expected: Tensors, found: Tensors) -> OnnxParity:
    """How far apart two results are. Raises ModelError if it is more than float32 explains."""
    found = {key.removeprefix(NEXT): value for key, value in found.items()}
    if expected.keys() != found.keys():
        raise ModelError(f"{graph}: {runtime} puts out {', '.join(sorted(found))}, not {', '.join(sorted(expected))}")
    errors = {
        key: float(np.abs(found[key] - value).max() / max(1.0, float(np.abs(value).max())))
        for key, value in expected.items()
    }
    worst = max(errors, key=lambda key: errors[key])
    if not errors[worst] <= MAX_ERROR:
        raise ModelError(
            f"{graph} does not compute on {runtime} what the checkpoint does: {worst} is off by {errors[worst]:.2g}"
        )
    return OnnxParity(graph, runtime, errors[worst], worst)
