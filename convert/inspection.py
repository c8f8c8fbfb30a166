"""What a bundle is made of, byte by byte."""

from __future__ import annotations

import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from whisperlet.bundle import GraphSpec, Manifest, TensorSpec, open_bundle


class Contents(msgspec.Struct, frozen=True):
    """What `inspect` shows."""

    name: str
    total_bytes: int
    signatures: list[tuple[str, str, str]]  # name, inputs, outputs
    parts: dict[str, int]  # part -> bytes; they add up to the file
    facts: dict[str, str]


def contents(path: Path) -> Contents:
    """Open, verify and take apart. Raises BundleError."""
    bundle = open_bundle(path)
    manifest = bundle.manifest
    return Contents(
        name=f"{path.name}: {manifest.name}",
        total_bytes=path.stat().st_size,
        signatures=[
            (graph.name, _shapes(graph, inputs=True), _shapes(graph, inputs=False)) for graph in manifest.graphs
        ],
        parts=_parts(path, manifest),
        facts=_facts(manifest, bundle.sha256),
    )


def _facts(manifest: Manifest, sha256: str) -> dict[str, str]:
    return {
        "format version": str(manifest.format_version),
        "sha256 of the bundle": sha256,
        "sha256 of the model": manifest.model_sha256,
        "source": manifest.source,
        "sha256 of its tensors": manifest.source_sha256,
        "languages": str(len(manifest.vocabulary.languages) or 1),
        "silence after speech": ", ".join(f"{k}: {v} frames" for k, v in manifest.silence_frames.items()),
        "recipe": msgspec.json.encode(manifest.recipe).decode(),
        "made with": ", ".join(f"{k} {v}" for k, v in manifest.tools.items()),
    }


def _shapes(graph: GraphSpec, *, inputs: bool) -> str:
    """Shapes of a side; state, of which there is a pair a layer, in one word each."""
    tensors = graph.inputs if inputs else graph.outputs
    kinds: dict[str, TensorSpec] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.name.rstrip("0123456789"), tensor)
    return "\n".join(f"{kind.rstrip('_')} {'x'.join(map(str, spec.shape))}" for kind, spec in kinds.items())


def _parts(path: Path, manifest: Manifest) -> dict[str, int]:
    """Bytes by part. A weight belongs to the encoder if an encoder graph reads it, cross-attention keys included."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    names = [graph.name for graph in sorted(manifest.graphs, key=lambda graph: _subgraph(model, graph.name))]
    owner: dict[int, str] = {}
    for name, graph in zip(names, model.subgraphs, strict=True):
        for tensor in graph.tensors:
            owner.setdefault(tensor.buffer, _part(name, tensor, manifest))
    sizes: Counter[str] = Counter()
    for index, buffer in enumerate(model.buffers):
        sizes[owner.get(index, "constants")] += buffer.size if buffer.offset else 0
    with zipfile.ZipFile(path) as archive:
        compressed = {info.filename: info.compress_size for info in archive.infolist()}
    weights = sum(sizes.values())
    head = min(buffer.offset for buffer in model.buffers if buffer.offset)
    rest = path.stat().st_size - weights - head - sum(compressed.values())
    return {**dict(sizes.most_common()), "graphs and quantisation": head, **compressed, "alignment and zip": rest}


def _subgraph(model: Any, signature: str) -> int:
    key = signature.encode()
    return next(int(s.subgraphIndex) for s in model.signatureDefs if s.signatureKey == key)


def _part(graph: str, tensor: Any, manifest: Manifest) -> str:
    shape = [] if tensor.shape is None else list(tensor.shape)
    if shape[:1] == [manifest.dims.n_vocab]:
        return "embedding"
    if len(shape) < 2:
        return "constants"
    return "encoder" if graph.startswith("encode") else "decoder"
