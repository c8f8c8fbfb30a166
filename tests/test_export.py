"""The files that a build passes through: float, quantised, compacted. Each must compute what the one before it did."""

import itertools
import os
import subprocess
import sys
from collections import Counter, defaultdict

import litert_torch
import msgspec
import numpy as np
import psutil
import pytest
import torch
import toy
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from brokers import wait_for

from convert import compact, fold, parity
from convert.fold import FoldedWhisper
from convert.graphs import signatures
from convert.recipe import stages
from whisperlet.bundle import kv_names
from whisperlet.errors import ModelError

SIGNATURES = [
    *(f"encode_{n}" for n in toy.ENCODE_FRAMES),
    *(spec.name for spec in toy.STREAMS),
    *(f"decode_{n}_{n_cross}" for n_cross in toy.CROSS_FRAMES for n in toy.DECODE_TOKENS),
]


@pytest.fixture(scope="module")
def modules():
    """Modules by signature, with their specs."""
    export = stages(toy.recipe(toy.REPOSITORY))[0]
    whisper = FoldedWhisper(toy.make_model(), toy.ALIGNMENT_HEADS)
    return {spec.name: (spec, module) for spec, module in signatures(whisper, toy.DIMS, export)}


@pytest.fixture(scope="module")
def flat(toy_path):
    return schema.ModelT.InitFromPackedBuf(toy_path.read_bytes(), 0)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch's own, of the converter
def test_scores_in_parts_stay_apart(modules, tmp_path, monkeypatch):
    """The converter joins products that go into one tensor, which would hold the scores of all heads."""
    n_frames, most = toy.ENCODE_FRAMES[0], 2 * toy.ENCODE_FRAMES[0] ** 2
    monkeypatch.setattr(fold, "MAX_SCORES", most)
    spec, module = modules[f"encode_{n_frames}"]
    assert most < toy.DIMS.n_head * n_frames**2
    path = tmp_path / "encode.tflite"
    litert_torch.signature(spec.name, module.eval(), sample_kwargs=module.examples()).convert().export(str(path))
    tensors = Interpreter(str(path)).get_tensor_details()
    of_scores = [tensor["shape"] for tensor in tensors if list(tensor["shape"][-2:]) == [n_frames, n_frames]]
    assert len(of_scores) >= toy.DIMS.n_head // 2
    assert max(np.prod(shape) for shape in of_scores) == most


def random_inputs(spec, seed=0):
    rng = np.random.default_rng(seed)
    made = {}
    for tensor in spec.inputs:
        made[tensor.name] = rng.normal(size=tensor.shape).astype(np.float32)
        if tensor.dtype == "int32":
            made[tensor.name] = rng.integers(0, 20, tensor.shape).astype(np.int32)
        elif tensor.name.endswith("mask"):
            made[tensor.name] = np.where(made[tensor.name] > 1, np.float32(-1e9), np.float32(0))
    return made


def half(folder, name, kind):
    """The file of the encoder or of the decoder, "float" or "float.int8"."""
    return folder / f"{'decode' if name.startswith('decode') else 'encode'}_{kind}.tflite"


def run(path, spec, inputs):
    return Interpreter(model_path=str(path)).get_signature_runner(spec.name)(**inputs)


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_float_file_computes_what_the_modules_compute(toy_folder, modules, name):
    spec, module = modules[name]
    inputs = random_inputs(spec)
    if "offset" in inputs:
        inputs["offset"] = np.array([17.0], np.float32)
    with torch.inference_mode():
        expected = module(**{key: torch.from_numpy(value) for key, value in inputs.items()})
    found = run(half(toy_folder, name, "float"), spec, inputs)
    assert found.keys() == expected.keys() == {tensor.name for tensor in spec.outputs}
    for tensor in spec.outputs:
        assert found[tensor.name].shape == tensor.shape == tuple(expected[tensor.name].shape)
        np.testing.assert_allclose(found[tensor.name], expected[tensor.name], atol=2e-4, err_msg=tensor.name)


@pytest.fixture(scope="module")
def merged(toy_folder, tmp_path_factory):
    """The quantised halves as one compacted file, the scales where the quantiser put them."""
    path = tmp_path_factory.mktemp("merged") / "merged.tflite"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compact, "move_scales_out", lambda *_: None)
        compact.compact([half(toy_folder, name, "float.int8") for name in ("encode", "decode")], path)
    return path


@pytest.mark.parametrize("name", SIGNATURES)
def test_compacting_changes_no_bit_of_any_output(toy_folder, merged, modules, name):
    spec, _ = modules[name]
    inputs = random_inputs(spec, seed=1)
    before, after = (run(path, spec, inputs) for path in (half(toy_folder, name, "float.int8"), merged))
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(value, after[key], err_msg=key)


@pytest.mark.parametrize("name", SIGNATURES)
def test_moving_the_scales_out_is_exact_but_for_rounding(toy_folder, modules, name):
    spec, _ = modules[name]
    inputs = random_inputs(spec, seed=1)
    before, after = (
        run(path, spec, inputs) for path in (half(toy_folder, name, "float.int8"), toy_folder / "toy.tflite")
    )
    from_float = run(half(toy_folder, name, "float"), spec, inputs)
    for key, value in before.items():
        assert parity.cosine(value, after[key]) > 0.99999, key
        assert 0.99 < parity.cosine(from_float[key], after[key]) < 1


def test_the_manifest_describes_the_graphs(toy_bundle, toy_path):
    graphs = {graph.name: graph for graph in toy_bundle.manifest.graphs}
    signature_list = Interpreter(model_path=str(toy_path)).get_signature_list()
    assert sorted(graphs) == sorted(SIGNATURES) == sorted(signature_list)
    for name, graph in graphs.items():
        assert sorted(signature_list[name]["inputs"]) == sorted(tensor.name for tensor in graph.inputs)
        assert sorted(signature_list[name]["outputs"]) == sorted(tensor.name for tensor in graph.outputs)
        own = kv_names("self", 2) if name.startswith("decode") else []
        assert graph.state == [(tensor, tensor) for tensor in own]


def test_shapes_pass_from_graph_to_graph(toy_bundle):
    """What encode puts out, and what decode carries, has one shape wherever it is taken in."""
    shapes = defaultdict(set)
    for graph in toy_bundle.manifest.graphs:
        if graph.name.startswith("stream"):
            continue
        n_cross = next(n for n in toy.CROSS_FRAMES if graph.name.endswith(f"_{n}") or graph.name == "encode_128")
        for tensor in graph.inputs + graph.outputs:
            if tensor.name.startswith("self_k") or tensor.name.startswith("self_v"):
                shapes[tensor.name].add(tensor.shape)
            elif tensor.name.startswith("cross_k") or tensor.name.startswith("cross_v"):
                shapes[tensor.name, n_cross].add(tensor.shape)
    assert len(shapes) == 4 + 2 * 4
    assert all(len(found) == 1 for found in shapes.values())


@pytest.mark.parametrize("spec", toy.STREAMS, ids=lambda spec: spec.name)
def test_shapes_of_a_stream(toy_bundle, spec):
    graph = next(graph for graph in toy_bundle.manifest.graphs if graph.name == spec.name)
    shapes = {tensor.name: tensor.shape for tensor in graph.inputs + graph.outputs}
    for kind, n in (("past", spec.context), ("new", spec.chunk), ("cross", spec.width)):
        for name in kv_names(kind, 2):
            keys, values = (toy.DIMS.n_head, n, toy.DIMS.d_head), (toy.DIMS.n_head, toy.DIMS.d_head, n)
            assert shapes.pop(name) == (keys if "_k_" in name else values)
    assert shapes == {
        "mel": (1, 2 * spec.width + 3, toy.DIMS.n_mels),
        "offset": (1,),
        "mask": (1, spec.context + spec.width),
    }


def test_every_weight_is_stored_once(flat, toy_path):
    data = toy_path.read_bytes()
    contents = [compact._content(buffer, data) for buffer in flat.buffers]
    large = Counter(content for content in contents if len(content) > 64)
    assert len(large) > 20
    assert set(large.values()) == {1}
    assert sum(map(len, large)) > 0.3 * len(data)


def test_the_embedding_is_looked_up_and_projected_from_one_buffer(flat):
    users = defaultdict(set)
    for graph in flat.subgraphs:
        for operator in graph.operators:
            code = flat.operatorCodes[operator.opcodeIndex]
            for index in operator.inputs:
                tensor = graph.tensors[index]
                if list(tensor.shape if tensor.shape is not None else []) == [toy.DIMS.n_vocab, toy.DIMS.d_model]:
                    users[tensor.buffer].add(code.builtinCode)
    assert list(users.values()) == [{schema.BuiltinOperator.EMBEDDING_LOOKUP, schema.BuiltinOperator.FULLY_CONNECTED}]


def scale_vectors(data):
    """Place in the file and bytes of every vector of scales."""
    model = schema.Model.GetRootAs(data, 0)
    for i in range(model.SubgraphsLength()):
        graph = model.Subgraphs(i)
        for j in range(graph.TensorsLength()):
            quantisation = graph.Tensors(j).Quantization()
            if quantisation is not None and quantisation.ScaleLength():
                yield quantisation._tab.Vector(quantisation._tab.Offset(8)), quantisation.ScaleAsNumpy().tobytes()


def places_by_content(data):
    places = defaultdict(set)
    for place, content in scale_vectors(data):
        places[content].add(place)
    return places


def test_equal_quantisation_is_stored_once(toy_folder, merged):
    before = places_by_content(half(toy_folder, "decode", "float.int8").read_bytes())
    assert max(len(places) for places in before.values()) > 1  # or there would be nothing to do
    after = places_by_content(merged.read_bytes())
    assert before.keys() <= after.keys()
    assert {len(places) for places in after.values()} == {1}


def test_no_scales_are_left_in_the_weights_of_linears_and_embeddings(flat):
    """The kernels of TensorFlow Lite 2.14 would yield zeros."""
    seen = Counter()
    for graph in flat.subgraphs:
        for operator in graph.operators:
            kind = flat.operatorCodes[operator.opcodeIndex].builtinCode
            weights = graph.tensors[operator.inputs[1]] if len(operator.inputs) > 1 else None
            if kind in {schema.BuiltinOperator.FULLY_CONNECTED, schema.BuiltinOperator.EMBEDDING_LOOKUP}:
                seen[kind] += 1
                scale = None if weights.quantization is None else weights.quantization.scale
                assert scale is None or len(scale) == 0 or scale.tolist() == [1.0]
    assert len(seen) == 2


def test_no_names_but_the_signatures(flat):
    assert not any(tensor.name for graph in flat.subgraphs for tensor in graph.tensors)
    assert not flat.metadata
    assert not flat.description
    assert sorted(s.signatureKey.decode() for s in flat.signatureDefs) == sorted(SIGNATURES)


def test_buffers_are_aligned_and_apart(flat, toy_bundle):
    held = sorted((buffer.offset, buffer.size) for buffer in flat.buffers if buffer.offset)
    assert not any(buffer.data is not None and len(buffer.data) for buffer in flat.buffers)
    assert len(held) > 20
    assert {offset % compact.ALIGNMENT for offset, _ in held} == {0}
    ends = [offset + size for offset, size in held]
    assert all(end <= offset for end, (offset, _) in zip(ends, held[1:], strict=False))
    assert ends[-1] <= toy_bundle.manifest.model_bytes


def test_compacting_again_changes_nothing(toy_path, toy_bundle, tmp_path):
    compact.compact([toy_path], tmp_path / "again")
    assert (tmp_path / "again").stat().st_size == toy_bundle.manifest.model_bytes


def test_what_no_tensor_refers_to_has_no_place(toy_path, tmp_path):
    def let_go(model, contents):
        largest = max(range(len(contents)), key=lambda i: len(contents[i]))
        for tensor in compact._tensors(model):
            tensor.buffer = 0 if tensor.buffer == largest else tensor.buffer

    compact.compact([toy_path], tmp_path / "less", let_go)
    data = (tmp_path / "less").read_bytes()
    buffers = schema.ModelT.InitFromPackedBuf(data, 0).buffers
    held = sorted((buffer.offset, buffer.size) for buffer in buffers if buffer.offset)
    assert all(offset + size <= later for (offset, size), (later, _) in itertools.pairwise(held))
    assert sum(held[-1]) == len(data)


def test_the_report_of_the_build(toy_folder, toy_bundle):
    report = msgspec.json.decode((toy_folder / "toy.json").read_bytes())
    assert report["bundle"] == "toy.tflite"
    assert report["bundle_bytes"] == toy_bundle.path.stat().st_size
    assert report["bundle_sha256"] == toy_bundle.sha256
    assert report["folding_max_abs"] < 1e-4
    assert sorted(row["signature"] for row in report["parity"]) == sorted(SIGNATURES)
    assert all(row["float_max_abs"] < 1e-3 < row["int8_max_abs"] for row in report["parity"])
    assert all(0.99 < row["int8_cosine"] < 1 for row in report["parity"])
    assert [text["clip"] for text in report["texts"]] == [name for name, _ in parity.golden_clips()]
    assert any(text["reference"] for text in report["texts"])


@pytest.mark.parametrize("n_tokens", [1, 16])
def test_the_decoder_is_probed_with_what_it_says_after_the_prompt(modules, n_tokens):
    """A pass that goes on takes the state and the ids that one pass over prompt and text would have and say."""
    module = modules["decode_4_1500"][1]
    prompt = [toy.SOT, toy.EN, toy.TRANSCRIBE, toy.NO_TIMESTAMPS]
    probe = parity.Probe(module.whisper, toy.DIMS, stages(toy.recipe(toy.REPOSITORY))[0], prompt)
    going_on = parity.Decode(module.whisper, toy.DIMS, n_tokens, 1500, module.watched)
    inputs = probe.inputs(going_on)
    ids = inputs["tokens"][0].tolist()
    whole = parity.Decode(module.whisper, toy.DIMS, len(prompt + ids), 1500, module.watched)
    mask = torch.full((len(prompt + ids), toy.N_TEXT_CTX), -1e9).triu(1)
    at_once = {"tokens": torch.tensor([prompt + ids], dtype=torch.int32), "position": torch.zeros(1, dtype=torch.int32)}
    expected = whole(**{**whole.examples(), **inputs, **at_once, "self_mask": mask})["logits"][0]
    assert ids == expected[len(prompt) - 1 : -1].argmax(-1).tolist()
    torch.testing.assert_close(going_on(**inputs)["logits"][0], expected[len(prompt) :], atol=1e-3, rtol=1e-3)


def test_parity_refuses_another_model(toy_folder, modules):
    """The comparison itself can fail: a checkpoint of which one bias differs is not what the file computes."""
    other = toy.make_model()
    other.model.decoder.layers[1].fc1.bias.data += 1
    probe = parity.Probe(
        FoldedWhisper(other, toy.ALIGNMENT_HEADS), toy.DIMS, stages(toy.recipe(toy.REPOSITORY))[0], [toy.SOT, toy.EN]
    )
    floats = [half(toy_folder, name, "float") for name in ("encode", "decode")]
    with pytest.raises(ModelError, match="decode_1_256 does not compute what the checkpoint does"):
        parity.compare_signatures(probe, floats, toy_folder / "toy.tflite")


ORPHANS = """
import os, sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from convert.export import _begin
if __name__ == "__main__":
    context = get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=_begin, initargs=(context.SimpleQueue(), Path(sys.argv[1]))) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600)
"""


def test_a_build_that_is_killed_leaves_no_process_behind(tmp_path):
    (tmp_path / "orphans.py").write_text(ORPHANS)
    environment = {**os.environ, "PYTHONPATH": str(toy.REPOSITORY)}
    command = [sys.executable, str(tmp_path / "orphans.py"), str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 60)
