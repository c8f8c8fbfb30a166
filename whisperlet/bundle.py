"""The bundle: a multi-signature TFLite model with a zip appended, as the TFLite metadata convention has it.

    [ flatbuffer | weights, reached by offset ][ zip: manifest.json, tokenizer.json | comment: digest ]

The manifest holds the sha256 of the bytes before the zip and of each other entry. The zip's comment holds the sha256 of
everything before it, so that a flipped bit anywhere is found. Both are checked in one pass over the file at opening.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import msgspec

from .errors import BundleError

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
COMMENT_PREFIX = b"whisperlet sha256 "
COMMENT_BYTES = len(COMMENT_PREFIX) + 64
MAX_ENTRY_BYTES = 64 << 20  # unpacked; vocabularies take a few MB, and a small file may unpack to anything
_BLOCK = 1 << 20
# RuntimeError: it wants a password; struct.error: a field ends early
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, KeyError, RuntimeError)
_FIXED_DATE = (1980, 1, 1, 0, 0, 0)  # equal inputs make equal bundles


class TensorSpec(msgspec.Struct, frozen=True):
    """An input or output of a graph."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


class GraphSpec(msgspec.Struct, frozen=True):
    """A signature. What it takes in and puts out under one name is state."""

    name: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]

    @property
    def state(self) -> list[tuple[str, str]]:
        """Pairs of (input name, output name) that carry state from one run to the next."""
        outputs = {t.name for t in self.outputs}
        return [(t.name, t.name) for t in self.inputs if t.name in outputs]


class LayerHeads(msgspec.Struct, frozen=True):
    """Attention heads of each layer."""

    encoder: tuple[int, ...]
    decoder: tuple[int, ...]  # of its attention to the text
    cross: tuple[int, ...]  # of its attention to the audio


class Dims(msgspec.Struct, frozen=True, omit_defaults=True):
    """Sizes of the model, named as in openai/whisper's ModelDimensions."""

    n_mels: int
    d_model: int
    n_head: int
    n_audio_layer: int
    n_text_layer: int
    n_vocab: int
    n_text_ctx: int  # tokens that the self-attention state has room for
    layer_heads: LayerHeads | None = None  # of a pruned model; None: `n_head` everywhere

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_head

    def heads(self, kind: str) -> tuple[int, ...]:
        """Attention heads by layer; `kind` is one of those of `kv_names`."""
        is_text = kind in ("self", "cross")
        if self.layer_heads is None:
            return (self.n_head,) * (self.n_text_layer if is_text else self.n_audio_layer)
        return {"self": self.layer_heads.decoder, "cross": self.layer_heads.cross}.get(kind, self.layer_heads.encoder)


class StreamSpec(msgspec.Struct, frozen=True):
    """A way of streaming, in encoder frames of 20 ms: the signature `stream_<chunk>_<overlap>`."""

    chunk: int  # committed by a step
    overlap: int  # after them, computed again by the next step
    padding: int  # of silence after those, which the decoder takes for the end of the speech
    context: int  # committed ones that a step looks back on at the most; whole chunks

    @property
    def reach(self) -> int:
        """Frames of audio that a step computes."""
        return self.chunk + self.overlap

    @property
    def width(self) -> int:
        """Frames that a step computes, its padding included."""
        return self.reach + self.padding

    @property
    def name(self) -> str:
        """Of the signature."""
        return f"stream_{self.chunk}_{self.overlap}"


class Vocabulary(msgspec.Struct, frozen=True):
    """Ids that decoding needs to know."""

    sot: int
    eot: int
    no_timestamps: int
    no_speech: int
    transcribe: int | None  # None: an English-only model
    languages: dict[str, int]  # code -> id; empty for an English-only model
    suppress: list[int]
    suppress_begin: list[int]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle says of itself."""

    format_version: int
    name: str
    dims: Dims
    vocabulary: Vocabulary
    alignment_heads: list[tuple[int, int]]  # (decoder layer, head) whose attention follows the audio
    encode_frames: list[int]
    cross_frames: list[int]
    decode_tokens: list[int]
    streams: list[StreamSpec]  # the first by default; none in a model that was not exported
    silence_frames: dict[str, int]  # zeros after the speech, by language; "default" for the others
    graphs: list[GraphSpec]
    source: str
    source_sha256: str
    recipe: dict[str, Any]
    tools: dict[str, str]  # name -> version
    litert_only: str = ""  # what in it tflite_runtime cannot compute with, "matrices of four bits"
    parity: list[dict[str, Any]] = []
    scores: dict[str, Any] = {}
    model_bytes: int = 0
    model_sha256: str = ""
    entries: dict[str, str] = {}  # entry -> sha256


class Bundle(msgspec.Struct, frozen=True):
    """An opened, verified bundle."""

    path: Path
    manifest: Manifest
    tokenizer_json: bytes
    sha256: str  # of everything before the zip's comment: the bundle's identity


def kv_names(kind: str, n_layer: int) -> list[str]:
    """Names of the key and value tensors of a kind of attention: "self", "cross", "past" or "new" (streaming)."""
    return [f"{kind}_{part}_{layer}" for layer in range(n_layer) for part in "kv"]


def kv_shapes(dims: Dims, kind: str, n: int) -> dict[str, tuple[int, int, int]]:
    """Shapes by those names, over n frames or tokens: keys (n_head, n, d_head), values (n_head, d_head, n)."""
    heads, parts = dims.heads(kind), {"k": (n, dims.d_head), "v": (dims.d_head, n)}
    return {f"{kind}_{part}_{i}": (n_head, *parts[part]) for i, n_head in enumerate(heads) for part in "kv"}


def write(path: Path, model: Path, manifest: Manifest, tokenizer_json: bytes) -> None:
    """Append the zip to a copy of `model` and put it at `path`, whole or not at all."""
    entries = {TOKENIZER: tokenizer_json}
    manifest = msgspec.structs.replace(
        manifest,
        model_bytes=model.stat().st_size,
        model_sha256=_sha256_of_file(model),
        entries={name: hashlib.sha256(data).hexdigest() for name, data in entries.items()},
    )
    entries = {MANIFEST: msgspec.json.encode(manifest), **entries}
    tail = _zip(entries, manifest.model_bytes)
    digest = hashlib.sha256(model.read_bytes() + tail).hexdigest()
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as out:
            out.write(model.read_bytes())
            out.write(tail + COMMENT_PREFIX + digest.encode())
            out.flush()
            os.fsync(out.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _zip(entries: dict[str, bytes], offset: int) -> bytes:
    """A deflated zip that will stand `offset` bytes into a file, its comment left out but its length written."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(_Shifted(buffer, offset), "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, data in entries.items():
            info = zipfile.ZipInfo(name, _FIXED_DATE)
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, data, compresslevel=9)
        archive.comment = bytes(COMMENT_BYTES)
    return buffer.getvalue()[:-COMMENT_BYTES]


class _Shifted(io.RawIOBase):
    """A write-only stream that claims to begin `offset` bytes into a file."""

    def __init__(self, inner: io.BytesIO, offset: int) -> None:
        self.inner, self.offset = inner, offset

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.inner.tell() + self.offset

    def write(self, data: Any) -> int:
        return self.inner.write(data)


def open_bundle(path: Path) -> Bundle:
    """Read and verify. Raises BundleError with one sentence naming the file and the reason."""
    try:
        model_end = _zip_start(path)
        model_sha256, sha256, comment = _digests(path, model_end)
        if comment != COMMENT_PREFIX + sha256.encode():  # nothing is unpacked before its bytes are known to be right
            raise BundleError(f"{path}: is damaged: its bytes do not match their sha256")
        entries = _read_zip(path)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ZIP_ERRORS as error:
        raise BundleError(f"{path}: is not a whisperlet bundle, or is truncated: {error}") from None
    manifest = _manifest(path, entries[MANIFEST])
    if (manifest.model_bytes, manifest.model_sha256) != (model_end, model_sha256):
        raise BundleError(f"{path}: is damaged: the model's bytes do not match the sha256 in {MANIFEST}")
    for name, expected in manifest.entries.items():
        if name not in entries or hashlib.sha256(entries[name]).hexdigest() != expected:
            raise BundleError(f"{path}: is damaged: {name} does not match the sha256 in {MANIFEST}")
    return Bundle(path, manifest, entries[TOKENIZER], sha256)


def _zip_start(path: Path) -> int:
    """Offset of the first byte after the model."""
    with zipfile.ZipFile(path) as archive:
        return min(info.header_offset for info in archive.infolist())


def _read_zip(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.file_size > MAX_ENTRY_BYTES:
                raise ValueError(f"{info.filename!r} is larger than {MAX_ENTRY_BYTES} bytes")
        entries = {name: archive.read(name) for name in archive.namelist()}
    if MANIFEST not in entries or TOKENIZER not in entries:
        raise KeyError(f"it lacks {MANIFEST} or {TOKENIZER}")
    return entries


def _digests(path: Path, model_end: int) -> tuple[str, str, bytes]:
    """sha256 of the model alone and of the model with the zip, and the comment after them, in one pass."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        _update(digest, file, model_end)
        model = digest.hexdigest()
        _update(digest, file, path.stat().st_size - COMMENT_BYTES - model_end)
        return model, digest.hexdigest(), file.read()


def _update(digest: Any, file: Any, n: int) -> None:
    while n > 0:
        block = file.read(min(_BLOCK, n))
        if not block:
            raise EOFError("it ends early")
        digest.update(block)
        n -= len(block)


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest(path: Path, data: bytes) -> Manifest:
    try:
        version = msgspec.json.decode(data).get("format_version")
        if version != FORMAT_VERSION:
            raise BundleError(f"{path}: has format version {version}; this program reads {FORMAT_VERSION}")
        return msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, ValueError, AttributeError, RecursionError) as error:
        raise BundleError(f"{path}: {MANIFEST}: {error}") from None
