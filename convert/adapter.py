"""Low-rank adapters of an encoder: put in, taken out, stored, merged or set apart. The arithmetic is peft's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file

from whisperlet.errors import ModelError

from . import disk, model
from .fold import LowRank

TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]  # every matrix of an encoder layer
SHIPPED = "adapters"  # folder of this package
SUFFIX = ".safetensors"
ENCODER = "encoder_sha256"  # of what an adapter was trained beside; older files have only the whole checkpoint's
PADDING = "padding"  # frames of silence after a step that an adapter was taught with; older files do not say
DOWN, UP = ".lora_A.weight", ".lora_B.weight"  # how peft ends the names of a pair


def attach(encoder: Any, rank: int, alpha: int) -> None:
    """Put a low-rank adapter, which adds nothing yet, beside every matrix of the encoder's layers."""
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS), encoder)
    for layer in _layers(encoder):
        layer.cast_input_dtype_enabled = False  # under autocast each input would be made float32 and short again


def _layers(encoder: Any) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in encoder.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def without(encoder: Any) -> Iterator[None]:
    """The encoder as it was before the adapter."""
    for layer in _layers(encoder):
        layer.enable_adapters(enabled=False)
    try:
        yield
    finally:
        for layer in _layers(encoder):
            layer.enable_adapters(enabled=True)


def state(encoder: Any) -> dict[str, torch.Tensor]:
    """The adapter's tensors, by peft's names."""
    from peft import get_peft_model_state_dict

    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(encoder, adapter_name="default")
    return tensors


def restore(encoder: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Put stored tensors into an attached adapter."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(encoder, tensors)


def save(path: Path, encoder: Any, *, rank: int, alpha: int, padding: int, source_sha256: str) -> None:
    """Write the adapter in half precision, with what it fits to, whole or not at all."""
    tensors = {name: tensor.detach().half().contiguous() for name, tensor in state(encoder).items()}
    metadata = {
        "rank": str(rank),
        "alpha": str(alpha),
        PADDING: str(padding),
        "source_sha256": source_sha256,
        ENCODER: hash_encoder(encoder),
    }
    with disk.replacing(path) as partial:
        save_file(tensors, partial, metadata)


def hash_encoder(encoder: Any) -> str:
    """SHA-256 of the encoder's own tensors, whether an adapter is attached or not."""
    tensors = {name.replace(".base_layer.", "."): tensor for name, tensor in encoder.state_dict().items()}
    return model.hash_state({name: tensor for name, tensor in tensors.items() if ".lora_" not in name})


def find(name_or_path: str) -> Path:
    """An adapter by the name of one that ships, or by path. Raises ModelError."""
    path = Path(name_or_path)
    if path.suffix != SUFFIX:
        path = Path(str(files("convert") / SHIPPED / f"{name_or_path}{SUFFIX}"))
        if not path.is_file():
            raise ModelError(f"{name_or_path}: no adapter of this name ships; give a {SUFFIX} file, `distil` makes one")
    if not path.is_file():
        raise ModelError(f"{path}: no such adapter")
    return path


def merge(encoder: Any, path: Path, source_sha256: str) -> None:
    """Add a stored adapter to the encoder's own matrices. Raises ModelError as `put` does."""
    put(encoder, path, source_sha256)
    absorb(encoder)


def absorb(module: Any) -> None:
    """Add an attached adapter to the matrices and take it out."""
    for layer in _layers(module):
        layer.merge()
    _take_out(module)


def apart(encoder: Any, path: Path, source_sha256: str) -> list[dict[str, LowRank]]:
    """What a stored adapter adds to the matrices of each layer, by their names there. Raises ModelError as `put` does.

    The encoder stays as it was.
    """
    put(encoder, path, source_sha256)
    parts: list[dict[str, LowRank]] = [{} for _ in encoder.layers]
    for name, layer in encoder.named_modules():
        if layer in set(_layers(encoder)):
            _, number, matrix = name.split(".", 2)
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            parts[int(number)][matrix] = LowRank(down.detach().clone(), layer.scaling["default"] * up.detach())
    _take_out(encoder)
    return parts


def read(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """What a stored adapter says of itself, and its tensors. Raises ModelError."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        int(metadata["rank"]), int(metadata["alpha"]), metadata["source_sha256"], int(metadata.get(PADDING, 0))
        return metadata, {name: tensor.float() for name, tensor in load_file(path).items()}
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise ModelError(f"{path}: is not an adapter, or is damaged: {error}") from None


def fits(metadata: dict[str, str], encoder: Any, source_sha256: str) -> bool:
    """Whether an adapter was trained beside this encoder, or for this checkpoint where it knows no more."""
    if ENCODER in metadata:
        return metadata[ENCODER] == hash_encoder(encoder)
    return metadata["source_sha256"] == source_sha256


def _check_fit(path: Path, metadata: dict[str, str], encoder: Any, source_sha256: str) -> None:
    if not fits(metadata, encoder, source_sha256):
        raise ModelError(f"{path}: was trained for another checkpoint than this one; train it anew, see `distil`")


def check(path: Path, encoder: Any, source_sha256: str, padding: int, changing: Sequence[str]) -> None:
    """Whether a stored adapter suits a recipe, before its stages take their time.

    `padding` is what the bundle will stream with, `changing` the stages that change the encoder. Raises ModelError.
    """
    metadata, _ = read(path)
    if int(metadata.get(PADDING, padding)) != padding:
        raise ModelError(
            f"{path}: was taught to stream with {metadata[PADDING]} frames of silence after a step, and the recipe's "
            f"export has stream_padding = {padding}: give both the same"
        )
    if not changing:
        _check_fit(path, metadata, encoder, source_sha256)
    elif fits(metadata, encoder, source_sha256):
        raise ModelError(
            f"{path}: was trained for the source's encoder, which {changing[0]} changes; train one for its result, "
            "see `distil`, or leave the adapter out"
        )


def checked(path: Path, encoder: Any, source_sha256: str) -> tuple[int, int, dict[str, torch.Tensor]]:
    """Rank, alpha and tensors of a stored adapter.

    Raises ModelError if the file is damaged, or was made for another checkpoint.
    """
    metadata, tensors = read(path)
    rank = int(metadata["rank"])
    _check_fit(path, metadata, encoder, source_sha256)
    if not tensors or not all(rank in tensor.shape and tensor.isfinite().all() for tensor in tensors.values()):
        raise ModelError(f"{path}: is damaged: its tensors are not finite, or not of rank {rank}")
    return rank, int(metadata["alpha"]), tensors


def put(encoder: Any, path: Path, source_sha256: str, max_rank: int | None = None) -> tuple[int, int]:
    """Attach a stored adapter, or the nearest one of `max_rank`; its rank and alpha. Raises ModelError as `checked`."""
    rank, alpha, tensors = checked(path, encoder, source_sha256)
    if max_rank is not None and rank > max_rank:
        tensors, rank, alpha = _cut(tensors, max_rank), max_rank, alpha * max_rank // rank
    attach(encoder, rank, alpha)
    if _shapes(tensors) != _shapes(state(encoder)):
        raise ModelError(f"{path}: is damaged: its tensors are not those of this checkpoint's encoder")
    restore(encoder, tensors)
    return rank, alpha


def _cut(tensors: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """The pairs of matrices whose products are nearest to those given, by singular value decomposition."""
    cut = {}
    for name, down in tensors.items():
        if name.endswith(DOWN):
            up = name.removesuffix(DOWN) + UP
            u, s, v = torch.svd_lowrank(tensors[up] @ down, rank + 8, niter=8)
            root = s[:rank].sqrt()
            cut[name], cut[up] = root[:, None] * v[:, :rank].T, u[:, :rank] * root
    return cut


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _take_out(encoder: Any) -> None:
    """Put each adapted matrix back in the adapter's place."""
    names = [name for name, module in encoder.named_modules() if module in set(_layers(encoder))]
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(encoder.get_submodule(parent), child, encoder.get_submodule(name).get_base_layer())
