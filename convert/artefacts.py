"""The graphs of a recipe as ONNX files beside its bundle, and through a second converter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from whisperlet.errors import ModelError

from . import onnx2tf, onnx_export, pipeline
from .onnx_export import OnnxParity, Shapes
from .parity import Probe
from .recipe import Recipe


def make(recipe: Recipe, shapes: Shapes, out: Path, console: Console, *, second: bool = False) -> list[OnnxParity]:
    """Write `<recipe>.<graph>.onnx` into `out`; how far each is from PyTorch.

    With `second`, each goes through onnx2tf and TensorFlow as well, to `<recipe>.<graph>.tflite`. Raises ConfigError for
    sizes that cannot be, ModelError if a graph computes something else, or if onnx2tf cannot convert the encoder.
    """
    with pipeline.started(recipe, out, console, "the export") as job:
        shapes.check(job.stages[0])
        job.load()
        probe = Probe(job.whisper, job.dims, job.stages[0], job.prompt())
        with job.step("onnx", 4) as advance:
            paths, rows = onnx_export.export(job.whisper, probe, shapes, job.work, advance)
        if second:
            with job.step("onnx2tf") as advance:
                found, more = _converted(probe, shapes, paths, advance)
                paths, rows = [*paths, *found], [*rows, *more]
        for path in paths:
            path.replace(out / f"{recipe.name}.{path.name}")
    return rows


def _converted(
    probe: Probe, shapes: Shapes, paths: list[Path], advance: Callable[[str], None]
) -> tuple[list[Path], list[OnnxParity]]:
    """Each graph through the second converter: the files, and how far they are from PyTorch."""
    onnx2tf.environment(advance)
    found, rows = [], []
    for path, (name, module) in zip(paths, onnx_export.graphs(probe.whisper, probe.dims, shapes), strict=True):
        advance(f"converts {name}")
        inputs = probe.inputs(module)
        with torch.inference_mode():
            expected = {key: value.numpy() for key, value in module(**inputs).items()}
        try:
            converted = onnx2tf.convert(path, inputs, path.parent / name)
            rows.append(onnx_export.compared(name, onnx2tf.NAME, expected, onnx2tf.run(converted, inputs)))
        except ModelError as error:
            if name.startswith("encode_"):
                raise
            rows.append(OnnxParity(name, onnx2tf.NAME, None, str(error)))
        else:
            found.append(converted.replace(path.with_suffix(".tflite")))
    return found, rows
