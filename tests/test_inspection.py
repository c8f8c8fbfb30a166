"""What `inspect` says of a bundle adds up."""

import pytest
from typer.testing import CliRunner

from convert import inspection
from convert.__main__ import app
from whisperlet.errors import BundleError


@pytest.fixture(scope="module")
def contents(toy_path):
    return inspection.contents(toy_path)


def test_parts_add_up_to_the_file(contents, toy_path):
    assert sum(contents.parts.values()) == contents.total_bytes == toy_path.stat().st_size
    assert all(n_bytes > 0 for n_bytes in contents.parts.values())


def test_parts_are_what_they_are_called(contents, toy_bundle):
    dims = toy_bundle.manifest.dims
    cross_kv = 2 * 2 * 64 * 64  # which run with the encoder
    encoder = 3 * 64 * (80 + 64) + 2 * (4 * 64 * 64 + 2 * 64 * 96) + cross_kv
    decoder = 2 * (8 * 64 * 64 + 2 * 64 * 80) - cross_kv + dims.n_text_ctx * dims.d_model
    expected = {"embedding": dims.n_vocab * dims.d_model, "encoder": encoder, "decoder": decoder}
    for part, n_weights in expected.items():
        assert 1 <= contents.parts[part] / n_weights < 1.1, part  # one byte each
    assert {"manifest.json", "tokenizer.json", "graphs and quantisation", "alignment and zip"} < contents.parts.keys()


def test_signatures_and_facts(contents, toy_bundle):
    assert [name for name, _, _ in contents.signatures] == [graph.name for graph in toy_bundle.manifest.graphs]
    by_name = {name: (takes, gives) for name, takes, gives in contents.signatures}
    takes, gives = by_name["decode_4_256"]
    assert "tokens 1x4" in takes
    assert "self_k 4x32x16" in takes
    assert "cross_v 4x16x256" in takes
    assert "logits 1x4x280" in gives
    assert contents.facts["sha256 of the bundle"] == toy_bundle.sha256
    assert contents.facts["languages"] == "2"
    assert contents.facts["silence after speech"] == "default: 64 frames, haw: 96 frames"


def test_the_command(toy_path, contents, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(app, ["inspect", str(toy_path)])
    assert result.exit_code == 0
    for part, n_bytes in contents.parts.items():
        assert part in result.stdout
        assert f"{n_bytes:,}" in result.stdout
    assert "decode_1_1500" in result.stdout


def test_a_damaged_bundle(toy_path, tmp_path):
    path = tmp_path / "cut.tflite"
    path.write_bytes(toy_path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"cut\.tflite: is"):
        inspection.contents(path)


@pytest.mark.bundle
def test_the_real_bundle(real_bundle):
    contents = inspection.contents(real_bundle.path)
    assert sum(contents.parts.values()) == real_bundle.path.stat().st_size
    assert contents.parts["embedding"] >= 51_865 * 512
    assert max(contents.parts, key=contents.parts.get) == "embedding"
