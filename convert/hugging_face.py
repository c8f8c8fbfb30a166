"""The files of a checkpoint in Hugging Face's form."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whisperlet.errors import ModelError

if TYPE_CHECKING:
    import torch


def find_weights(directory: Path) -> list[Path]:
    """Return the files that hold the weights; safetensors are preferred, shards listed by their index."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = directory / f"{name}.index.json"
        if index.is_file():
            return [directory / shard for shard in sorted(set(read_json(index).get("weight_map", {}).values()))]
        if (directory / name).is_file():
            return [directory / name]
    return []


def read_weights(directory: Path, source: str) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by its name. Raises ModelError."""
    import safetensors.torch
    import torch

    state: dict[str, torch.Tensor] = {}
    for path in find_weights(directory):
        with explained(f"{source}: {path.name} cannot be read"):
            if path.suffix == ".safetensors":
                state |= safetensors.torch.load_file(path)
            else:
                state |= torch.load(path, map_location="cpu", weights_only=True)
    if not state:
        raise ModelError(f"{source} has no weights: no model.bin, model.safetensors or pytorch_model.bin")
    return state


def write(
    directory: Path,
    state: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    tokenizer_json: bytes,
) -> None:
    """Write the four files that a checkpoint consists of."""
    import safetensors.torch

    safetensors.torch.save_file(dict(state), directory / "model.safetensors", {"format": "pt"})
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (directory / "tokenizer.json").write_bytes(tokenizer_json)


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file of a checkpoint says. Raises ModelError."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path.parent.name} is no checkpoint: it has no {path.name}") from None
    except ValueError as error:
        raise ModelError(f"{path.parent.name}/{path.name} is not JSON ({error})") from error
    return content if isinstance(content, dict) else {}


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn whatever a library raises, of many kinds and without a common base, into a `ModelError`."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
        raise ModelError(f"{what} ({reason})") from error
