"""The bundle's file: written whole or not at all, and never opened with a bit of it changed."""

import errno
import hashlib
import io
import random
import struct
import zipfile

import msgspec
import numpy as np
import pytest
from toy import make_manifest

from whisperlet import bundle
from whisperlet.errors import BundleError

MODEL = random.Random(0).randbytes(3000)
TOKENIZER = b'{"model": "' + b"vocabulary " * 50 + b'"}'


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(MODEL)
    return path


@pytest.fixture
def written(model, tmp_path):
    path = tmp_path / "small.tflite"
    bundle.write(path, model, make_manifest(), TOKENIZER)
    return path


def test_round_trip(written):
    opened = bundle.open_bundle(written)
    content = written.read_bytes()
    assert content.startswith(MODEL)
    assert opened.path == written
    assert opened.tokenizer_json == TOKENIZER
    assert opened.sha256 == hashlib.sha256(content[: -bundle.COMMENT_BYTES]).hexdigest()
    assert opened.manifest == make_manifest(
        model_bytes=len(MODEL),
        model_sha256=hashlib.sha256(MODEL).hexdigest(),
        entries={"tokenizer.json": hashlib.sha256(TOKENIZER).hexdigest()},
    )


def test_any_unzip_reads_it(written):
    with zipfile.ZipFile(written) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["manifest.json", "tokenizer.json"]
        assert archive.read("tokenizer.json") == TOKENIZER
        assert min(info.header_offset for info in archive.infolist()) == len(MODEL)
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    content = written.read_bytes()
    directory = struct.unpack("<I", content[-bundle.COMMENT_BYTES - 6 :][:4])[0]  # Python finds it wherever it lies
    assert content[directory:].startswith(b"PK\x01\x02")


def test_equal_inputs_make_equal_bytes(written, model, tmp_path):
    again = tmp_path / "elsewhere" / "other.tflite"
    again.parent.mkdir()
    bundle.write(again, model, make_manifest(), TOKENIZER)
    assert again.read_bytes() == written.read_bytes()
    bundle.write(again, model, make_manifest(name="other"), TOKENIZER)
    assert again.read_bytes() != written.read_bytes()


def test_truncated_anywhere(written, tmp_path):
    content = written.read_bytes()
    cut = tmp_path / "cut.tflite"
    for n in {*range(0, len(content), 61), *range(len(content) - 200, len(content))}:
        cut.write_bytes(content[:n])
        with pytest.raises(BundleError, match=r"cut\.tflite: is"):
            bundle.open_bundle(cut)


def test_something_appended(written):
    with written.open("ab") as file:
        file.write(b"\n")
    with pytest.raises(BundleError, match="is damaged"):
        bundle.open_bundle(written)


def test_a_flipped_bit_anywhere(written, tmp_path):
    content = bytearray(written.read_bytes())
    changed = tmp_path / "changed.tflite"
    rng = random.Random(1)
    in_model = [rng.randrange(8 * len(MODEL)) for _ in range(300)]
    in_zip = [8 * i + bit for i in range(len(MODEL), len(content)) for bit in rng.sample(range(8), 3)]
    for position in in_model + in_zip:
        content[position // 8] ^= 1 << position % 8
        changed.write_bytes(content)
        with pytest.raises(BundleError, match=r"changed\.tflite: is (damaged|not a whisperlet bundle)"):
            bundle.open_bundle(changed)
        content[position // 8] ^= 1 << position % 8


def test_garbage_inside(written, tmp_path):
    content = written.read_bytes()
    changed = tmp_path / "changed.tflite"
    rng = random.Random(2)
    for _ in range(500):
        start, n = rng.randrange(len(content)), rng.randrange(1, 40)
        garbage = rng.choice([rng.randbytes(n), b"\0" * n, b"\xff" * n, b""])
        changed.write_bytes(content[:start] + garbage + content[start + n :])
        if changed.read_bytes() != content:
            with pytest.raises(BundleError, match=r"is damaged|is not a whisperlet bundle"):
                bundle.open_bundle(changed)


@pytest.mark.parametrize("content", [b"", b"no zip", MODEL, b"PK\x05\x06" + bytes(18)])
def test_not_a_bundle(tmp_path, content):
    path = tmp_path / "other.tflite"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"other\.tflite: is not a whisperlet bundle"):
        bundle.open_bundle(path)


def test_another_zip(tmp_path):
    path = tmp_path / "other.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", "{}")
        archive.writestr("tokenizer.json", "{}")
    with pytest.raises(BundleError):
        bundle.open_bundle(path)


def test_missing_and_unreadable(tmp_path):
    with pytest.raises(BundleError, match=r"nowhere\.tflite: cannot be read: No such file"):
        bundle.open_bundle(tmp_path / "nowhere.tflite")
    with pytest.raises(BundleError, match="cannot be read: Is a directory"):
        bundle.open_bundle(tmp_path)


def forged(path, entries, model=MODEL):
    """Write a bundle whose digest is right, with any entries."""
    buffer = io.BytesIO(model)
    with zipfile.ZipFile(buffer, "a") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
        archive.comment = bytes(bundle.COMMENT_BYTES)
    body = buffer.getvalue()[: -bundle.COMMENT_BYTES]
    path.write_bytes(body + bundle.COMMENT_PREFIX + hashlib.sha256(body).hexdigest().encode())


def manifest_json(**changes):
    real = {"model_bytes": len(MODEL), "model_sha256": hashlib.sha256(MODEL).hexdigest()}
    return msgspec.json.encode(msgspec.to_builtins(make_manifest(**real)) | changes)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"manifest.json": manifest_json()}, r"lacks manifest\.json or tokenizer\.json"),
        ({"tokenizer.json": TOKENIZER}, r"lacks manifest\.json or tokenizer\.json"),
        ({"manifest.json": manifest_json(format_version=1)}, "has format version 1; this program reads 2"),
        ({"manifest.json": manifest_json(streams=[{"chunk": 15}])}, r"manifest\.json: .*overlap.*streams"),
        ({"manifest.json": b"{}"}, "has format version None"),
        ({"manifest.json": b"[1]"}, r"manifest\.json: "),
        ({"manifest.json": b"\xff"}, r"manifest\.json: "),
        ({"manifest.json": manifest_json(dims={"n_mels": "many"})}, r"manifest\.json: .*n_mels"),
        ({"manifest.json": manifest_json(model_bytes=1)}, "the model's bytes do not match"),
        ({"manifest.json": manifest_json(model_sha256="0")}, "the model's bytes do not match"),
        ({"manifest.json": manifest_json(entries={"tokenizer.json": "0"})}, r"tokenizer\.json does not match"),
        ({"manifest.json": manifest_json(entries={"more.json": "0"})}, r"more\.json does not match"),
    ],
)
def test_manifests_that_are_wrong(tmp_path, entries, message):
    path = tmp_path / "forged.tflite"
    with_tokenizer = entries if "lacks" in message else {**entries, "tokenizer.json": TOKENIZER}
    forged(path, with_tokenizer)
    with pytest.raises(BundleError, match=message):
        bundle.open_bundle(path)


def test_forging_by_itself_does_not_fail(tmp_path):
    path = tmp_path / "forged.tflite"
    forged(path, {"manifest.json": manifest_json(), "tokenizer.json": TOKENIZER})
    assert bundle.open_bundle(path).tokenizer_json == TOKENIZER


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(written, model, tmp_path, monkeypatch, failing):
    before = written.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    target = (bundle.os, "fsync") if failing == "fsync" else (type(written), "replace")
    monkeypatch.setattr(*target, full)
    for path in (written, tmp_path / "new.tflite"):
        with pytest.raises(OSError, match="No space left"):
            bundle.write(path, model, make_manifest(name="other"), TOKENIZER)
    assert written.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.tflite", "small.tflite"]


def test_state_is_what_goes_in_and_comes_out():
    def specs(names):
        return [bundle.TensorSpec(name, (1,)) for name in names.split()]

    graph = bundle.GraphSpec("g", specs("tokens self_k_0 cross_k_0"), specs("logits self_k_0"))
    assert graph.state == [("self_k_0", "self_k_0")]
    assert bundle.kv_names("self", 2) == ["self_k_0", "self_v_0", "self_k_1", "self_v_1"]


def test_sizes_of_a_stream():
    spec = bundle.StreamSpec(chunk=15, overlap=40, padding=32, context=512)
    assert (spec.reach, spec.width, spec.name) == (55, 87, "stream_15_40")


def test_both_runtimes_read_it_with_its_zip(toy_path, toy_bundle):
    from ai_edge_litert.compiled_model import CompiledModel
    from ai_edge_litert.interpreter import Interpreter

    names = sorted(graph.name for graph in toy_bundle.manifest.graphs)
    assert sorted(CompiledModel.from_file(str(toy_path)).get_signature_list()) == names
    interpreter = Interpreter(model_path=str(toy_path))
    assert sorted(interpreter.get_signature_list()) == names
    run = interpreter.get_signature_runner("encode_128")
    outputs = run(mel=np.zeros((1, 256, 80), np.float32), offset=np.zeros(1, np.float32))
    assert np.isfinite(outputs["cross_k_0"]).all()


def test_the_toy_is_aligned_and_marked_as_tflite(toy_path):
    start = toy_path.read_bytes()[:8]
    assert start[4:] == b"TFL3"
    assert 0 < struct.unpack("<I", start[:4])[0] < toy_path.stat().st_size
