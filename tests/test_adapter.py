"""Adapters: what is merged is what was trained, and nothing else is merged. And what a build does with one."""

import hashlib

import msgspec
import pytest
import safetensors
import torch
import toy
from rich.progress import Progress
from safetensors.torch import load_file, save_file

from convert import adapter, distil, pipeline, recipe, streaming, wheels
from convert.graphs import Stream
from convert.recipe import Adapter
from whisperlet.bundle import StreamSpec
from whisperlet.errors import ModelError

RANK, ALPHA, SOURCE = 4, 8, "5" * 64
PADDING = toy.STREAMS[0].padding
TOLERANCE = 1e-5


def make_encoder():
    return toy.make_model().requires_grad_(requires_grad=False).model.encoder


def attached(seed=0):
    """An encoder with a random adapter, whose numbers are exact in half precision."""
    torch.manual_seed(seed)
    encoder = make_encoder()
    adapter.attach(encoder, RANK, ALPHA)
    for tensor in adapter.state(encoder).values():
        tensor.detach().normal_(std=0.1)
        tensor.detach().copy_(tensor.half().float())
    return encoder


def heard(encoder):
    power = torch.rand(1, 40, 80, generator=torch.Generator().manual_seed(1)) * 13.0 - 10.0
    with torch.no_grad():
        return streaming.full(encoder, power)


@pytest.fixture(scope="module")
def plain():
    return heard(make_encoder())


@pytest.fixture
def path(tmp_path):
    adapter.save(
        tmp_path / "toy.safetensors", attached(), rank=RANK, alpha=ALPHA, padding=PADDING, source_sha256=SOURCE
    )
    return tmp_path / "toy.safetensors"


def test_an_attached_adapter_adds_nothing_yet(plain):
    encoder = make_encoder()
    adapter.attach(encoder, RANK, ALPHA)
    assert torch.equal(heard(encoder), plain)
    assert len(adapter.state(encoder)) == 2 * 6 * len(encoder.layers)  # two a matrix, six matrices a layer


def test_only_the_adapter_is_trained():
    encoder = attached()
    trained = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    assert len(trained) == len(adapter.state(encoder))
    assert all("lora" in name for name in trained)


def test_without_it_the_encoder_is_as_before(plain):
    encoder = attached()
    before = heard(encoder)
    assert (before - plain).abs().max() > 0.1
    with adapter.without(encoder):
        assert torch.equal(heard(encoder), plain)
    assert torch.equal(heard(encoder), before)
    assert any(parameter.requires_grad for parameter in encoder.parameters())


def test_merged_equals_attached(path):
    merged = make_encoder()
    adapter.merge(merged, path, SOURCE)
    assert (heard(merged) - heard(attached())).abs().max() < TOLERANCE


def test_what_is_merged_is_the_product_of_two_matrices_to_scale(path):
    merged, plain, tensors = make_encoder(), make_encoder(), load_file(path)
    adapter.merge(merged, path, SOURCE)
    a, b = (tensors[f"layers.1.fc1.lora_{side}.weight"].float() for side in "AB")
    added = merged.layers[1].fc1.weight - plain.layers[1].fc1.weight
    assert (added - ALPHA / RANK * b @ a).abs().max() < TOLERANCE
    assert torch.equal(merged.layers[1].fc1.bias, plain.layers[1].fc1.bias)


def test_a_merged_encoder_has_the_tensors_of_any_other(path, plain):
    merged, other = make_encoder(), make_encoder()
    names = list(other.state_dict())
    adapter.merge(merged, path, SOURCE)
    assert list(merged.state_dict()) == names
    assert {type(m) for m in merged.modules()} == {type(m) for m in other.modules()}
    assert not any(parameter.requires_grad for parameter in merged.parameters())


def test_it_is_stored_in_half_precision_with_what_it_fits_to(path):
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    with safetensors.safe_open(path, "pt") as file:
        found = file.metadata()
    encoder = adapter.hash_encoder(make_encoder())
    fits = {"padding": str(PADDING), "source_sha256": SOURCE, "encoder_sha256": encoder}
    assert found == {"rank": "4", "alpha": "8", **fits}
    assert list(path.parent.iterdir()) == [path]


def test_restored_equals_saved():
    first, second = attached(1), attached(2)
    adapter.restore(second, adapter.state(first))
    assert torch.equal(heard(first), heard(second))


# refusals


def rewrite(path, change, **metadata):
    tensors = load_file(path)
    change(tensors)
    facts = {"rank": "4", "alpha": "8", "source_sha256": SOURCE, **metadata}
    save_file(tensors, path, {key: value for key, value in facts.items() if value is not None})


def nothing(_tensors):
    pass


def drop(tensors):
    tensors.popitem()


def fill(tensors):
    next(iter(tensors.values()))[0, 0] = torch.inf


def widen(tensors):
    tensors.update({name: torch.cat([x, x], 1) for name, x in tensors.items() if "fc1" in name and "lora_A" in name})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is not an adapter, or is damaged"),
        (lambda path: path.write_text("not one"), "is not an adapter, or is damaged"),
        (lambda path: rewrite(path, nothing, rank=None), "is not an adapter, or is damaged"),
        (lambda path: rewrite(path, nothing, source_sha256=None), "is not an adapter, or is damaged"),
        (lambda path: rewrite(path, nothing, alpha="much"), "is not an adapter, or is damaged"),
        (lambda path: rewrite(path, nothing, padding="some"), "is not an adapter, or is damaged"),
        (lambda path: rewrite(path, nothing, rank="5"), "not of rank 5"),
        (lambda path: rewrite(path, nothing, rank="0"), "not of rank 0"),
        (lambda path: rewrite(path, dict.clear), "not of rank 4"),
        (lambda path: rewrite(path, fill), "not finite"),
        (lambda path: rewrite(path, drop), "not those of this checkpoint's encoder"),
        (lambda path: rewrite(path, widen), "not those of this checkpoint's encoder"),
        (lambda path: rewrite(path, nothing, source_sha256="6" * 64), "was trained for another checkpoint"),
        (lambda path: rewrite(path, nothing, encoder_sha256="6" * 64), "was trained for another checkpoint"),
    ],
)
def test_what_does_not_fit_is_refused(path, damage, reason):
    damage(path)
    with pytest.raises(ModelError, match=reason) as error:
        adapter.merge(make_encoder(), path, SOURCE)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_it_fits_wherever_its_encoder_is(path):
    """Whatever became of the decoder. Older files know only their checkpoint."""
    adapter.merge(make_encoder(), path, "6" * 64)
    changed = make_encoder()
    changed.layers[0].fc1.bias[0] += 1
    with pytest.raises(ModelError, match="was trained for another checkpoint"):
        adapter.merge(changed, path, SOURCE)
    rewrite(path, nothing)
    adapter.merge(changed, path, SOURCE)


def test_it_is_found_by_path_or_by_name(path, tmp_path, monkeypatch):
    assert adapter.find(str(path)) == path
    with pytest.raises(ModelError, match=r"gone\.safetensors: no such adapter"):
        adapter.find(str(tmp_path / "gone.safetensors"))
    with pytest.raises(ModelError, match="huge: no adapter of this name ships"):
        adapter.find("huge")
    monkeypatch.setattr(adapter, "files", lambda _: tmp_path)
    (tmp_path / "adapters").mkdir()
    shipped = path.rename(tmp_path / "adapters" / path.name)
    assert adapter.find("toy") == shipped


SHIPPED = sorted((toy.REPOSITORY / "convert" / "adapters").glob("*.safetensors"))


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda path: path.stem)
def test_what_ships_was_made_for_the_pinned_checkpoint(shipped):
    record = msgspec.json.decode(shipped.with_suffix(".json").read_bytes(), type=distil.Record)
    with safetensors.safe_open(shipped, "pt") as file:
        metadata = file.metadata()
    assert adapter.find(shipped.stem).samefile(shipped)
    assert record.file == shipped.name
    assert metadata["source_sha256"] == record.source_sha256
    assert metadata["padding"] == str(record.settings.padding)
    assert record.source_sha256 == wheels.PACKAGES[record.source.removeprefix("pypi:")].tensors_sha256
    assert record.curve[-1].streamed < record.curve[0].streamed


def products(encoder):
    """What the adapter adds, by matrix."""
    tensors, scale = adapter.state(encoder), ALPHA / RANK
    names = [name.removesuffix(adapter.DOWN) for name in tensors if name.endswith(adapter.DOWN)]
    return {name: scale * tensors[name + adapter.UP] @ tensors[name + adapter.DOWN] for name in names}


def test_it_is_cut_to_the_nearest_of_a_lower_rank(path):
    whole, cut = make_encoder(), make_encoder()
    assert adapter.put(whole, path, SOURCE) == adapter.put(make_encoder(), path, SOURCE, RANK + 1) == (RANK, ALPHA)
    assert adapter.put(cut, path, SOURCE, RANK // 2) == (RANK // 2, ALPHA // 2)
    for name, full in products(whole).items():
        u, s, v = torch.linalg.svd(full, full_matrices=False)
        nearest = u[:, : RANK // 2] @ s[: RANK // 2].diag() @ v[: RANK // 2]
        assert (products(cut)[name] - nearest).abs().max() < 1e-4 * s[0]


# in a build


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Folder of the toy and the hash of its tensors."""
    from convert import model

    folder = tmp_path_factory.mktemp("checkpoint")
    toy.save_checkpoint(folder)
    return folder, model.load(str(folder)).sha256


def loaded(folder, work, *stages):
    """A build of the checkpoint after its first step."""
    plain = toy.recipe(folder)
    made = recipe.Recipe(source=str(folder), stages=[*stages, *plain.stages], name="toy")
    build = pipeline.Build(made, work, Progress(disable=True))
    build.load()
    return build


def test_a_build_merges_it_and_says_so(checkpoint, tmp_path):
    folder, source_sha256 = checkpoint
    path = tmp_path / "mine.safetensors"
    adapter.save(path, attached(), rank=RANK, alpha=ALPHA, padding=PADDING, source_sha256=source_sha256)
    build = loaded(folder, tmp_path, Adapter(file=str(path), merge=True))
    assert (heard(build.checkpoint.model.model.encoder) - heard(attached())).abs().max() < TOLERANCE
    assert build.checkpoint.sha256 == source_sha256
    said = build.manifest()
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert said.source_sha256 == source_sha256
    assert said.recipe["stages"][0] == {"stage": "adapter", "file": str(path), "sha256": sha256, "merge": True}
    assert build.adapter == str(path)
    again = loaded(folder, tmp_path, Adapter(file=str(path), sha256=sha256, merge=True))
    assert again.manifest().recipe == said.recipe
    with pytest.raises(ModelError, match="is not the adapter that the recipe names"):
        loaded(folder, tmp_path, Adapter(file=str(path), sha256="0" * 64))


def test_a_build_streams_with_the_silence_that_it_was_taught_with(checkpoint, tmp_path):
    folder, source_sha256 = checkpoint
    path = tmp_path / "mine.safetensors"
    adapter.save(path, attached(), rank=RANK, alpha=ALPHA, padding=PADDING + 1, source_sha256=source_sha256)
    words = rf"mine\.safetensors: was taught to stream with {PADDING + 1} frames .* stream_padding = {PADDING}: give"
    with pytest.raises(ModelError, match=words):
        loaded(folder, tmp_path, Adapter(file=str(path)))
    rewrite(path, nothing, source_sha256=source_sha256)  # one from before this was noted
    assert loaded(folder, tmp_path, Adapter(file=str(path))).adapter == str(path)


def parameters_differ(layers, others):
    return not all(torch.equal(a, b) for a, b in zip(layers.parameters(), others.parameters(), strict=True))


def streamed(build):
    """What the decoder gets of a first step."""
    spec = StreamSpec(chunk=5, overlap=4, padding=3, context=10)
    module = Stream(build.whisper, build.dims, spec)
    torch.manual_seed(0)
    inputs = {name: torch.zeros_like(example) for name, example in module.examples().items()}
    inputs["mel"] = torch.rand_like(inputs["mel"])
    inputs["mask"][:, : spec.context] = -1e4  # nothing is committed yet
    with torch.no_grad():
        return {name: tensor for name, tensor in module(**inputs).items() if name.startswith("cross")}


def test_merged_or_apart_it_streams_the_same_and_apart_it_leaves_the_whole_window_alone(checkpoint, tmp_path):
    folder, source_sha256 = checkpoint
    path = tmp_path / "mine.safetensors"
    adapter.save(path, attached(), rank=RANK, alpha=ALPHA, padding=PADDING, source_sha256=source_sha256)
    plain = loaded(folder, tmp_path)
    merged, apart = (loaded(folder, tmp_path, Adapter(file=str(path), merge=merge)) for merge in (True, False))
    assert plain.adapter is None
    assert parameters_differ(merged.whisper.encoder_layers, plain.whisper.encoder_layers)
    assert not parameters_differ(apart.whisper.encoder_layers, plain.whisper.encoder_layers)
    assert torch.equal(heard(apart.checkpoint.model.model.encoder), heard(plain.checkpoint.model.model.encoder))
    expected, found, untaught = streamed(merged), streamed(apart), streamed(plain)
    assert max((found[name] - expected[name]).abs().max() for name in expected) < TOLERANCE
    assert max((untaught[name] - expected[name]).abs().max() for name in expected) > 100 * TOLERANCE
