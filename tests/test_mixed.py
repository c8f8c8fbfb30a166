"""Some matrices with four bits: which, in what file, and what runs it."""

import msgspec
import numpy as np
import pytest
import soundfile
import torch
import toy

from agent.engine import InterpreterEngine, LiteRtEngine, load_engine
from agent.state import DecoderState
from convert import calibration, compact, four_bits, mixed, packing, parity, recipe, sensitivity
from convert.fold import FoldedWhisper
from convert.int4 import Packed
from convert.mixed import Search, choose
from convert.recipe import Quantise
from whisperlet import bundle
from whisperlet.audio import SAMPLE_RATE
from whisperlet.errors import BundleError, ConfigError, ModelError


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    for seed in range(4):
        soundfile.write(folder / f"{seed}.wav", toy.babble(1.5, seed), SAMPLE_RATE)
    return folder


@pytest.fixture(scope="module")
def whisper():
    return FoldedWhisper(toy.make_model(), toy.ALIGNMENT_HEADS)


def stage(recordings, **settings):
    return Quantise(calibration=str(recordings), n_calibration=4, **({"linear": "int4"} | settings))


@pytest.fixture(scope="module")
def search(recordings, whisper):
    return Search(stage(recordings, linear="mixed", max_bytes=1), whisper, toy.VOCABULARY)


@pytest.fixture(scope="module")
def quantised(toy_folder):
    return [toy_folder / f"{half}_float.int8.tflite" for half in ("encode", "decode")]


def bundled(model, toy_bundle, **changes):
    """Return a way to know how large a bundle is with the model as it is at that time."""
    path = model.with_name("bundle.tflite")

    def size():
        manifest = msgspec.structs.replace(toy_bundle.manifest, **changes)
        bundle.write(path, model, manifest, toy_bundle.tokenizer_json)
        return path.stat().st_size

    return size


def mix(stage, whisper, quantised, target, toy_bundle):
    size = bundled(target, toy_bundle, litert_only="matrices of four bits")
    compact.compact(quantised, target)
    return four_bits.apply(stage, whisper, toy.VOCABULARY, quantised, target, size), size()


@pytest.fixture(scope="module")
def four(recordings, whisper, quantised, toy_bundle, tmp_path_factory):
    """Everything that may have four bits has, encoder included: what was decided, and the file."""
    target = tmp_path_factory.mktemp("four") / "model.tflite"
    parts = ("decoder", "embedding", "encoder")
    found, _ = mix(stage(recordings, int4_parts=parts), whisper, quantised, target, toy_bundle)
    return found, target


def test_parts_are_where_matrices_run(whisper):
    parts = {name: mixed.part(name) for name in mixed.matrices(whisper)}
    assert parts["token_embedding"] == "embedding"
    assert parts["decoder_layers.0.cross.key"] == parts["encoder_layers.1.mlp.fc2"] == "encoder"
    assert parts["decoder_layers.0.cross.query"] == parts["decoder_layers.1.attention.key"] == "decoder"
    assert len(parts) == 1 + 2 * 6 + 2 * 10


def test_the_teacher_agrees_with_itself_and_not_with_another(search, whisper):
    assert search.judge.divergence() == pytest.approx(0, abs=1e-5)
    with mixed.swapped(search.matrices, {"token_embedding": whisper.token_embedding.weight.roll(1, 0)}):
        assert search.judge.divergence() > 0.001
    assert search.judge.divergence() == pytest.approx(0, abs=1e-5)


def test_what_is_decoded_in_pieces_is_what_is_decoded_at_once(search, whisper):
    heard = search.judge.heard[0]
    audio = calibration.encoded(whisper, heard.mel)
    memory = calibration.Memory(whisper, audio)
    pieces = [calibration.decoded(whisper, part, memory) for part in (heard.tokens[:2], heard.tokens[2:])]
    at_once = calibration.decoded(whisper, heard.tokens, calibration.Memory(whisper, audio))
    torch.testing.assert_close(torch.cat(pieces), at_once, atol=1e-4, rtol=1e-4)


def test_calibration_hears_what_the_graphs_hear(whisper, search):
    """The same encoder and decoder as the exported ones, arranged for one pass."""
    heard = search.judge.heard[0]
    stage = recipe.Export(n_text_ctx=toy.N_TEXT_CTX)
    probe = parity.Probe(whisper, toy.DIMS, stage, heard.tokens[:4])
    decode = parity.Decode(whisper, toy.DIMS, 4, 1500, {})
    inputs = probe.inputs(decode)
    audio = calibration.encoded(whisper, probe.mel(1500))
    ours = calibration.decoded(whisper, heard.tokens[:4], calibration.Memory(whisper, audio))
    torch.testing.assert_close(ours, decode(**inputs)["logits"][0], atol=1e-3, rtol=1e-3)


def test_energies_are_second_moments(search, whisper):
    seen = []
    matrix = whisper.decoder_layers[0].mlp.fc1
    hook = matrix.register_forward_pre_hook(lambda _m, x: seen.append(x[0][0]))
    heard = search.judge.heard
    found = calibration.energies(whisper, heard, search.matrices)
    hook.remove()
    rows = torch.cat(seen)
    torch.testing.assert_close(found["decoder_layers.0.mlp.fc1"], rows.T @ rows, atol=1e-2, rtol=1e-3)
    assert found.keys() == search.matrices.keys()


def test_the_report_matches_a_recomputation(search):
    names = search.allowed[:3]
    report = search.report({name: search.packed[name] for name in names})
    assert [m.name for m in report.matrices if m.bits == 4] == [n for n in search.matrices if n in names]
    row = next(m for m in report.matrices if m.name == names[0])
    weight, energy = search.matrices[names[0]].weight, search.energies[names[0]]
    lost = weight - search.packed[names[0]].values()
    expected = torch.einsum("oi,ij,oj->", lost, energy, lost) / torch.einsum("oi,ij,oj->", weight, energy, weight)
    assert row.int4_error == pytest.approx(float(expected), rel=1e-3)
    assert row.int8_error < row.int4_error
    assert row.int4_cost == pytest.approx(search.divergence([names[0]]), rel=1e-3)
    assert report.divergence == pytest.approx(search.divergence(names), rel=1e-3)


def test_the_table_of_sensitivities(search, tmp_path):
    report = search.report({})
    four_bits.record(report, tmp_path, "x")
    rows = {row.name: row for row in sensitivity.read(tmp_path / "x.sensitivity.json").rows}
    assert rows.keys() == set(search.allowed)
    row = rows["decoder_layers.1.cross.query"]
    assert (row.kind, row.layer, row.cost) == ("decoder cross.query", 1, search.costs[row.name])
    assert (rows["token_embedding"].kind, rows["token_embedding"].layer) == ("embedding", None)


COSTS = {"dear": 9.0, "cheap": 1.0, "free": -0.1, "middling": 2.0}
SAVES = {"dear": 100, "cheap": 100, "free": 10, "middling": 150}


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (5, {"free"}),
        (100, {"cheap"}),
        (105, {"free", "cheap"}),
        (250, {"cheap", "middling"}),
        (300, {"cheap", "middling", "dear"}),
        (360, set(COSTS)),
        (361, None),
    ],
)
def test_the_insensitive_go_first_and_no_more_than_needed(wanted, expected):
    chosen = choose(COSTS, SAVES, wanted)
    assert (None if chosen is None else set(chosen)) == expected


def test_a_budget_is_met(recordings, whisper, quantised, toy_bundle, tmp_path, search):
    target = tmp_path / "model.tflite"
    compact.compact(quantised, target)
    whole = bundled(target, toy_bundle, litert_only="matrices of four bits")()
    limit = whole - 4_000 + four_bits.MARGIN
    mixed = stage(recordings, linear="mixed", max_bytes=limit, int4_parts=("embedding",))
    found, size = mix(
        mixed, whisper, quantised, target, toy_bundle
    )  # the toy's others save less than their tables take
    assert size < whole
    assert size + four_bits.MARGIN <= limit
    assert found.precision.max_bytes == limit
    chosen = {m.name for m in found.precision.matrices if m.bits == 4}
    assert chosen == set(found.packed) < set(search.allowed)
    by_need = sorted(search.allowed, key=lambda name: search.costs[name] / search.saves(name))
    assert by_need[-1] not in chosen


def test_a_budget_that_is_no_constraint_costs_nothing(recordings, whisper, quantised, toy_bundle, tmp_path):
    target = tmp_path / "model.tflite"
    found, _ = mix(stage(recordings, linear="mixed", max_bytes=10**8), whisper, quantised, target, toy_bundle)
    assert found == four_bits.Mixture({}, None)


def test_a_budget_that_nothing_reaches(recordings, whisper, quantised, toy_bundle, tmp_path):
    target = tmp_path / "model.tflite"
    with pytest.raises(
        ConfigError, match=r"max_bytes: 1,000 cannot be reached: .*\(decoder\).* still has (\d+,)+\d+ b"
    ) as e:
        mix(
            stage(recordings, linear="mixed", max_bytes=1000, int4_parts=("decoder",)),
            whisper,
            quantised,
            target,
            toy_bundle,
        )
    nearest = int(str(e.value).partition("still has ")[2].partition(" ")[0].replace(",", ""))
    _, size = mix(stage(recordings, int4_parts=("decoder",)), whisper, quantised, target, toy_bundle)
    assert size + four_bits.MARGIN == nearest


def test_every_signature_computes_what_four_bits_say(four, whisper, toy_folder):
    found, target = four
    export = recipe.stages(toy.recipe(toy_folder))[0]
    probe = parity.Probe(whisper, toy.DIMS, export, [toy.SOT, toy.EN, toy.TRANSCRIBE, toy.NO_TIMESTAMPS])
    floats = [toy_folder / f"{half}_float.tflite" for half in ("encode", "decode")]
    rows = parity.compare_signatures(probe, floats, target, packed=found.packed)
    assert min(row.int8_cosine for row in rows) > 0.995
    wrong = {name: Packed(one.codes.flip(0).contiguous(), one.scales) for name, one in found.packed.items()}
    with pytest.raises(ModelError, match="does not compute"):
        parity.compare_signatures(probe, floats, target, packed=wrong)


def test_four_bits_may_be_a_little_further_off():
    row = parity.SignatureParity("decode_1", float_max_abs=0.001, int8_max_abs=0.7, int8_cosine=0.985)
    parity._check(row, parity.MIN_MIXED_COSINE)
    with pytest.raises(ModelError, match=r"decode_1 does not compute .* is 0\.9850, where 0\.99 is the least$"):
        parity._check(row, parity.MIN_INT8_COSINE)
    with pytest.raises(ModelError, match=r"before rounding it is up to 0\.06 off, where 0\.05 may be"):
        parity._check(parity.SignatureParity("decode_1", 0.06), parity.MIN_MIXED_COSINE)
    for values in ({"float_max_abs": float("nan")}, {"float_max_abs": 0.0, "int8_cosine": float("nan")}):
        with pytest.raises(ModelError, match="nan"):
            parity._check(parity.SignatureParity("decode_1", **values), parity.MIN_MIXED_COSINE)


def test_a_bundle_with_four_bits_hears(four, toy_bundle, tmp_path, monkeypatch):
    _, target = four
    bundled(target, toy_bundle, litert_only="matrices of four bits")()
    found = bundle.open_bundle(target.with_name("bundle.tflite"))
    from ai_edge_litert.interpreter import Interpreter

    mel = torch.randn(1, 256, 80, generator=torch.Generator().manual_seed(0)).numpy()
    heard = []
    for engine in (LiteRtEngine(found, 1, tmp_path), InterpreterEngine(found, 1, Interpreter)):
        state: DecoderState = engine.new_state()
        engine.encode(state, mel)
        heard.append(engine.decode(state, [toy.SOT, toy.EN, toy.TRANSCRIBE, toy.NO_TIMESTAMPS]))
    assert np.isfinite(heard[0]).all()
    np.testing.assert_allclose(heard[0], heard[1], atol=0.05 * np.abs(heard[0]).max())


def test_the_old_runtime_is_told_apart(toy_bundle, monkeypatch, tmp_path):
    """Without LiteRT, what has four bits is refused in words rather than computed wrongly."""
    import sys
    from types import SimpleNamespace

    made = []
    monkeypatch.setattr("agent.engine.LiteRtEngine", lambda *_: (_ for _ in ()).throw(ModuleNotFoundError))
    monkeypatch.setattr("agent.engine.InterpreterEngine", lambda *given: made.append(given))
    monkeypatch.setitem(sys.modules, "tflite_runtime", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "tflite_runtime.interpreter", SimpleNamespace(Interpreter=None))
    load_engine(toy_bundle, 1, tmp_path)
    assert len(made) == 1
    manifest = msgspec.structs.replace(toy_bundle.manifest, litert_only="matrices of four bits")
    with pytest.raises(
        BundleError, match=r"has matrices of four bits, which tflite-runtime cannot .* install ai-edge-litert"
    ):
        load_engine(msgspec.structs.replace(toy_bundle, manifest=manifest), 1, tmp_path)


def test_a_matrix_that_is_nowhere(quantised, search, tmp_path):
    packed = search.packed["token_embedding"]
    weights = {"token_embedding": search.matrices["token_embedding"].weight * 1.1}

    def change(model, contents):
        packing.pack_in(model, contents, weights, {"token_embedding": packed})

    with pytest.raises(ModelError, match="not in the graphs: token_embedding"):
        compact.compact(quantised, tmp_path / "x.tflite", change)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ('linear = "mixed"', "max_bytes goes with"),
        ("max_bytes = 5", "max_bytes goes with"),
        ('linear = "int4"', "needs calibration"),
        ('linear = "mixed"\nmax_bytes = 0\ncalibration = "x"', "must be positive"),
        ('linear = "int4"\ncalibration = "x"\nint4_parts = []', "must name one part"),
        ('linear = "int4"\ncalibration = "x"\nn_calibration = 1', "2 or more"),
        ('linear = "int4"\ncalibration = "x"\nint4_parts = ["nose"]', "Invalid enum value 'nose'"),
    ],
)
def test_a_recipe_that_cannot_be(settings, reason):
    import tomllib

    with pytest.raises(msgspec.ValidationError, match=reason):
        msgspec.convert(tomllib.loads(settings) | {"stage": "quantise"}, Quantise)


def test_recordings_that_are_not_there_are_found_out_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("SETS", str(tmp_path))
    stage = Quantise(linear="int4", calibration="$SETS/none")
    assert stage.problems() == [f"{tmp_path}/none: no such file or folder"]


def test_one_recording_is_too_little(recordings, whisper, tmp_path):
    (tmp_path / "one.wav").write_bytes((recordings / "0.wav").read_bytes())
    with pytest.raises(ConfigError, match="two recordings are the least"):
        Search(Quantise(linear="int4", calibration=str(tmp_path)), whisper, toy.VOCABULARY)


def test_a_matrix_saves_half_its_codes_and_pays_with_scales(search):
    for name, packed in search.packed.items():
        n_rows, n_columns = search.matrices[name].weight.shape
        blocks = n_rows * n_columns // packed.block
        assert search.saves(name) == n_rows * n_columns / 2 + 4 * n_rows - 2 * blocks
