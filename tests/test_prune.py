"""The stage `prune` on the toy: it meets its target, it knows what is worth little, and fitting wins accuracy back."""

import json

import msgspec
import pytest
import torch
import toy
from rich.console import Console
from rich.progress import Progress
from test_corpus import write

from convert import importance, model, probing, prune, pruned, refit, search, sensitivity, sublayers
from convert.corpus import Corpus
from convert.prune import Prune
from convert.search import Cut
from convert.speechset import Source
from convert.utterances import Lessons
from whisperlet.errors import ConfigError

HALF_ENCODER = Cut("encoder.0.ffn", "encoder.0", 48, 1000, 0.5)


def save_toy(folder):
    """Write a toy that mostly finds an end, as a teacher does."""
    toy.save_checkpoint(folder)
    checkpoint = model.load(str(folder))
    checkpoint.model.model.decoder.embed_tokens.weight[toy.EOT] *= 1.3
    model.save_directory(checkpoint, folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_toy(tmp_path_factory.mktemp("toy") / "whisper-toy")


@pytest.fixture(scope="module")
def parent(folder):
    return model.load(str(folder))


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    return write(tmp_path_factory.mktemp("audio") / "babble", *(0.6 + 0.02 * i for i in range(36)))


@pytest.fixture(scope="module")
def lessons(parent, audio):
    return Lessons(Corpus([Source(audio)], 80), parent)


@pytest.fixture(scope="module")
def probe(parent, lessons):
    return probing.Probe(parent.model, lessons.held_out())


def progress():
    return Progress(console=Console(quiet=True))


def stage(audio, **changes):
    plain = {"keep": 0.6, "audio": (str(audio),), "n_clips": 12, "channels": 8, "levels": 4}
    return Prune(**plain | changes)


@pytest.fixture(scope="module")
def result(folder, audio, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return out, prune.run(stage(audio), folder, out, progress())


def test_the_target_is_met(result):
    out, report = result
    small = model.load(str(out)).model
    sizes = pruned.sizes_of(small)
    assert 0.4 < report.details["kept"] <= 0.6
    assert sizes.weights(64, 16) == report.details["weights"] < report.details["weights_before"]
    assert msgspec.convert(report.details["sizes"], pruned.Sizes) == sizes
    for layer in (*sizes.encoder, *sizes.decoder):
        assert layer.ffn % 8 == 0
        assert min(layer.heads, layer.cross_heads or 2) >= 2


def test_fitting_wins_back(result):
    details = result[1].details
    assert 0 < details["kl_fitted"] < 0.8 * details["kl_cut"]


def test_the_parent_lies_beside_it(folder, result):
    out, _ = result
    assert model.load(str(out / prune.TEACHER)).sha256 == model.load(str(folder)).sha256


def test_a_teacher_is_handed_on(result, folder, tmp_path):
    prune.hand_on_teacher(result[0], tmp_path)
    assert model.load(str(tmp_path / prune.TEACHER)).sha256 == model.load(str(folder)).sha256


def test_the_table_names_every_cut(result):
    table = sensitivity.read(result[0] / sensitivity.FILE)
    assert {row.kind for row in table.rows} == {
        *("encoder heads", "encoder channels", "encoder layers"),
        *("decoder heads", "decoder cross heads", "decoder channels", "decoder layers"),
    }
    assert all(row.cost >= 0 and 0 < row.amount <= 1 for row in table.rows)
    names = [(row.name, row.amount) for row in table.rows]
    assert len(set(names)) == len(names)
    assert max(row.cost for row in table.rows) > 0.01


def test_what_was_measured_before_an_interruption_is_not_measured_again(folder, audio, result, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    calls = []

    def cost(self, *args):
        calls.append(args)
        if len(calls) == 20:
            raise Killed
        return plain(self, *args)

    plain = probing.Probe.cost
    monkeypatch.setattr(probing.Probe, "cost", cost)
    with pytest.raises(Killed):
        prune.run(stage(audio), folder, tmp_path, progress())
    report = prune.run(stage(audio), folder, tmp_path, progress())
    n_rows = len(sensitivity.read(tmp_path / sensitivity.FILE).rows)
    assert n_rows < len(calls) < n_rows + 10
    assert report.details == result[1].details
    assert model.load(str(tmp_path)).sha256 == model.load(str(result[0])).sha256


def test_an_impossible_target_names_the_nearest(folder, audio, tmp_path):
    with pytest.raises(ConfigError, match=r"keep = 0\.02: no allowed cut goes that far; the nearest keeps 0\.[12]\d\d"):
        prune.run(stage(audio, keep=0.02), folder, tmp_path, progress())


@pytest.mark.parametrize("wrong", [{"keep": 1.0}, {"keep": 0}, {"channels": 0}, {"audio": ()}, {"nonsense": 1}])
def test_settings_that_cannot_be(audio, wrong):
    plain = {"stage": "prune", "keep": 0.6, "audio": [str(audio)]}
    msgspec.convert(plain, Prune)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(plain | wrong, Prune)


def test_recordings_that_are_not_there(tmp_path):
    assert stage(tmp_path / "nothing:5").problems() == [f"{tmp_path / 'nothing'}: no such file or folder"]


# What the search does


def test_the_search_takes_the_cheapest_by_weight():
    cuts = [
        HALF_ENCODER,
        Cut("encoder.1.ffn", "encoder.1", 48, 500, 0.1),
        Cut("encoder.1.ffn", "encoder.1", 16, 1500, 0.6),
        Cut("decoder.0.self", "decoder.0", 2, 200, 0.9),
    ]
    assert [(cut.part, cut.kept) for cut in search.search(cuts, 10_000, 0.95)] == [("encoder.1.ffn", 48)]
    deep = search.search(cuts, 10_000, 0.75)
    assert {(cut.part, cut.kept) for cut in deep} == {("encoder.1.ffn", 16), ("encoder.0.ffn", 48)}
    with pytest.raises(ConfigError, match=r"the nearest keeps 0\.730"):
        search.search(cuts, 10_000, 0.7)


def test_the_last_cut_is_cheap_rather_than_cheap_by_weight():
    cuts = [Cut("encoder.0.ffn", "encoder.0", 8, 5000, 1.0), Cut("encoder.1.ffn", "encoder.1", 48, 600, 0.3)]
    assert search.search(cuts, 10_000, 0.95) == [cuts[1]]
    assert search.search(cuts, 10_000, 0.9) == [cuts[0]]


def test_a_deeper_cut_costs_what_it_adds_to_the_one_that_was_made():
    cuts = [
        Cut("encoder.0.ffn", "encoder.0", 48, 1000, 0.1),
        Cut("encoder.0.ffn", "encoder.0", 16, 2000, 0.25),
        Cut("encoder.1.ffn", "encoder.1", 48, 1000, 0.2),
    ]
    assert search.search(cuts, 10_000, 0.8) == [cuts[1]]


def test_a_layer_takes_its_parts_along_and_the_last_one_stays():
    cuts = [
        HALF_ENCODER,
        Cut("encoder.0", "encoder.0", 0, 4000, 0.55),
        Cut("encoder.1", "encoder.1", 0, 4000, 0.7),
    ]
    assert search.search(cuts, 10_000, 0.6) == [cuts[1]]
    with pytest.raises(ConfigError, match=r"the nearest keeps 0\.600"):
        search.search(cuts, 10_000, 0.5)


def test_a_deeper_cut_is_never_cheaper():
    cuts = [Cut("a.0.ffn", "a.0", 3, 30, 0.2), Cut("a.0.ffn", "a.0", 5, 10, -0.1), Cut("a.0.ffn", "a.0", 4, 20, 0.3)]
    assert [(cut.kept, cut.cost) for cut in search.monotone(cuts)] == [(5, 0.0), (4, 0.3), (3, 0.3)]


def test_heads_that_follow_the_audio_are_not_cut_one_by_one(parent, audio, tmp_path):
    job = prune._Job(stage(audio, levels=8), parent, tmp_path, progress())
    assert parent.generation.alignment_heads == ((0, 1), (1, 0), (1, 2))
    assert [job._protected(f"decoder.{n}.{kind}") for n in (0, 1) for kind in ("cross", "self")] == [
        [1],
        [],
        [0, 2],
        [],
    ]
    assert job._protected("encoder.0.self") == []


# What parts are worth


def test_a_dead_part_is_worth_least(folder, lessons):
    whisper = model.load(str(folder)).model
    dead = {"encoder.1.ffn": [17], "decoder.0.cross": [2], "encoder.0.self": [3]}
    with torch.no_grad():
        for sublayer in sublayers.every(whisper):
            if sublayer.name in dead:
                sublayer.closing.weight[:, probing.columns(sublayer, dead[sublayer.name])] = 0
    worth = importance.fisher(whisper, lessons.sample(6))
    for name, (part,) in dead.items():
        assert importance.order(worth[name])[-1] == part
        assert worth[name][part] == 0 < worth[name].sort().values[1]
        assert importance.order(worth[name], [part])[0] == part


def test_sublayers_compute_what_transformers_does(parent, lessons):
    batch = lessons.held_out()[0]
    encoded = sublayers.encode(parent.model, batch.power)
    ours = parent.model.proj_out(sublayers.decode(parent.model, batch.read, encoded))
    theirs = parent.model(encoder_outputs=(encoded,), decoder_input_ids=batch.read).logits
    assert (ours - theirs).abs().max() < 1e-3
    from convert import streaming

    assert (encoded - streaming.full(parent.model.model.encoder, batch.power)).abs().max() < 1e-4


def test_no_change_costs_nothing_and_a_change_something(parent, probe):
    assert probe.cost(0) == pytest.approx(0, abs=1e-3)
    assert probe.distance(parent.model) == pytest.approx(0, abs=1e-3)
    for first in (0, len(probe.row) - 1):
        assert probe.cost(first, [probe.row[first]]) > 0.01


def test_a_refit_is_the_least_squares_solution():
    torch.manual_seed(1)
    values, closing = torch.randn(400, 6), torch.nn.Linear(6, 3).requires_grad_(requires_grad=False)
    values[:, 5] = values[:, 0] - 2 * values[:, 2] + 1  # which the others can stand in for
    moments = importance.gram(importance.with_constant(values))
    found = refit.without(closing, torch.tensor([0, 1, 2, 4]), moments)
    assert found.shape == (7, 3)
    assert found[[3, 5]].abs().max() == 0
    expected = values @ closing.weight.T + closing.bias
    masked = closing.weight.clone()
    masked[:, [3, 5]] = 0
    errors = [
        (x - expected).square().mean()
        for x in (importance.with_constant(values) @ found, values @ masked.T + closing.bias)
    ]
    third = (
        expected
        - importance.with_constant(values)[:, [0, 1, 2, 4, 6]]
        @ torch.linalg.lstsq(importance.with_constant(values)[:, [0, 1, 2, 4, 6]], expected).solution
    )
    assert errors[0] < 0.5 * errors[1]
    assert float(errors[0]) == pytest.approx(float(third.square().mean()), rel=0.02)


def test_a_solution_is_put_in_place_with_its_bias():
    closing = torch.nn.Linear(6, 3).requires_grad_(requires_grad=False)
    found = torch.randn(7, 3)
    refit.put(closing, found)
    assert torch.equal(refit.affine(closing), found)
    assert torch.equal(closing.bias, found[6])


def test_what_is_not_seen_keeps_its_weights():
    """Values that are nearly always zero: the ridge draws what they are multiplied with to what it was."""
    values, before = torch.zeros(50, 2), torch.tensor([[3.0], [5.0], [0.0]])
    values[:, 0] = torch.linspace(-1, 1, 50)
    seen = importance.with_constant(values)
    found = refit.solve(importance.gram(seen), importance.gram(seen, 2 * values[:, :1]), before)
    assert float(found[0]) == pytest.approx(2.0, abs=0.1)
    assert float(found[1]) == pytest.approx(5.0)


def test_teachers_repeat_themselves_only_where_they_find_no_end(parent, lessons):
    generation = parent.generation
    known = [tokens for tokens in lessons._tokens.values() if tokens]
    assert 24 < len(known) < len(lessons._tokens)
    assert len({len(tokens) for tokens in known}) > 5
    for tokens in known:
        assert tokens[:4] == [toy.SOT, tokens[1], toy.TRANSCRIBE, toy.NO_TIMESTAMPS]
        assert tokens[1] in generation.lang_ids.values()
        assert tokens[-1] == toy.EOT not in tokens[4:-1]
        assert not set(tokens[4:]) & set(generation.suppress_tokens)


def test_transcripts_are_kept(parent, audio, lessons, tmp_path, monkeypatch):
    from convert import utterances as module

    kept = tmp_path / "work" / "transcripts.json"
    first = Lessons(Corpus([Source(audio)], 80), parent, kept)
    monkeypatch.setattr(module, "transcribe", None)
    again = Lessons(Corpus([Source(audio)], 80), parent, kept)
    assert list(again._tokens.values()) == list(first._tokens.values()) == list(lessons._tokens.values())
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"made_by": ["another"]}))
    with pytest.raises(TypeError):
        Lessons(Corpus([Source(audio)], 80), parent, kept)
