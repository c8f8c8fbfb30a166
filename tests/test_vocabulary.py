"""A smaller vocabulary: what is kept is said and spelled as before, and nothing becomes unspeakable."""

import json
import random
import re
import zlib

import msgspec
import pytest
import torch
import toy
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from convert import model, reference, vocabulary, words
from convert.tokens import Bpe, deflatable
from convert.vocabulary import Vocabulary
from whisperlet.errors import ConfigError, ModelError
from whisperlet.tokenizer import Tokenizer as DeviceTokenizer

CORPUS = [
    "the wizard had vanished behind the curtain on the left",
    "the wise woman went over the water, and the winter was there",
    "sie war den ganzen winter über dort und das wasser war kalt",
    "He had 25 curtains; she had 7!",
]
SPECIAL = [
    *("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|zh|>", "<|translate|>", "<|transcribe|>"),
    *("<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>", "<|0.00|>", "<|0.02|>"),
]
N_TEXT = 400
N_KEPT = 295  # fewer than the list needs
LIST = {"the": 0.5, "wizard": 0.2, "had": 0.1, "vanished": 0.1, "water": 0.05, "curtain": 0.05}


def make_tokenizer():
    """Byte-level BPE with real merges, and special tokens after them, as Whisper's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=N_TEXT, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    around = [(token, tokenizer.token_to_id(token)) for token in ("<|startoftranscript|>", "<|endoftext|>")]
    template = "<|startoftranscript|> $A <|endoftext|>"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=around)
    return tokenizer


def save_checkpoint(folder):
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    tokenizer = make_tokenizer()
    ids = tokenizer.get_vocab()
    eot, space, moved = ids["<|endoftext|>"], ids["Ġ"], ids["Ġhad"]  # which gets another id
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=len(ids) + 5,  # rows that no token names
        d_model=64,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=96,
        decoder_ffn_dim=80,
        max_target_positions=64,
        pad_token_id=eot,
        bos_token_id=eot,
        eos_token_id=eot,
        decoder_start_token_id=eot + 1,
    )
    whisper = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in whisper.named_parameters():
            if name != "model.encoder.embed_positions.weight":
                parameter.normal_(mean=float("norm.weight" in name), std=0.2)
    folder.mkdir()
    whisper.generation_config.suppress_tokens = [ids["!"], moved]
    whisper.generation_config.begin_suppress_tokens = [space, eot]
    whisper.generation_config.alignment_heads = [[1, 0]]
    whisper.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary") / "checkpoint"
    save_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def before(folder):
    return model.load_directory(folder, "toy")


@pytest.fixture(autouse=True)
def short_list(monkeypatch):
    monkeypatch.setattr(words, "listed", lambda language: LIST)


def cut(folder, out, **settings):
    """The checkpoint after the stage, and its report."""
    out.mkdir()
    with Progress(disable=True) as progress:
        report = vocabulary.run(Vocabulary(**settings), folder, out, progress)
    return model.load_directory(out, "toy"), report


@pytest.fixture(scope="module")
def trimmed(folder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "listed", lambda language: LIST)
        return cut(folder, tmp_path_factory.mktemp("trimmed") / "out", languages=("en", "de"), max_tokens=N_KEPT)


def names(checkpoint):
    """Tokens by their ids."""
    vocab = json.loads(checkpoint.tokenizer_json)
    special = {token["id"]: token["content"] for token in vocab["added_tokens"]}
    return {i: token for token, i in vocab["model"]["vocab"].items()} | special


def test_it_is_as_small_as_was_asked_for(before, trimmed):
    checkpoint, report = trimmed
    assert checkpoint.model.config.vocab_size == len(names(checkpoint)) == N_KEPT
    assert sorted(names(checkpoint)) == list(range(N_KEPT))
    assert checkpoint.model.model.decoder.embed_tokens.weight.shape == (N_KEPT, 64)
    had = before.model.config.vocab_size
    assert (report.stage, report.details["n_tokens_before"], report.details["n_tokens"]) == ("vocabulary", had, N_KEPT)


def test_every_kept_row_gives_the_logit_that_it_gave(before, trimmed):
    after = trimmed[0]
    had, old = names(after), {token: i for i, token in names(before).items()}
    rows = [old[had[i]] for i in range(len(had))]
    features = torch.randn(1, 80, 3000)
    prompt = [after.generation.sot, after.generation.lang_ids["en"], after.generation.transcribe, 40, 270]
    with torch.no_grad():
        after_logits = after.model(input_features=features, decoder_input_ids=torch.tensor([prompt])).logits
        old_prompt = torch.tensor([[rows[i] for i in prompt]])
        before_logits = before.model(input_features=features, decoder_input_ids=old_prompt).logits
    assert torch.allclose(after_logits, before_logits[..., rows], atol=1e-5)


def test_all_else_stays_as_it_was(before, trimmed):
    after = trimmed[0]
    ours, theirs = after.model.state_dict(), before.model.state_dict()
    for name, tensor in theirs.items():
        if "embed_tokens" not in name and "proj_out" not in name:
            assert torch.equal(ours[name], tensor), name
    assert after.generation.alignment_heads == before.generation.alignment_heads
    assert model.hash_tensors(after.model.model.encoder) == model.hash_tensors(before.model.model.encoder)


def test_what_steers_decoding_is_found_under_its_new_id(before, trimmed):
    after = trimmed[0]
    ours, theirs = names(after), names(before)
    for role in ("sot", "eot", "transcribe", "translate", "no_timestamps", "no_speech"):
        assert ours[getattr(after.generation, role)] == theirs[getattr(before.generation, role)]
    assert {code: ours[i] for code, i in after.generation.lang_ids.items()} == {"en": "<|en|>", "de": "<|de|>"}
    assert [ours[i] for i in after.generation.suppress_tokens] == ["!", "Ġhad"]
    assert after.generation.suppress_tokens != before.generation.suppress_tokens
    assert [ours[i] for i in after.generation.begin_suppress_tokens] == ["Ġ", "<|endoftext|>"]
    config = after.model.config
    assert config.eos_token_id == config.pad_token_id == config.bos_token_id == after.generation.eot
    assert config.decoder_start_token_id == after.generation.sot
    processor = json.loads(after.tokenizer_json)["post_processor"]["special_tokens"]
    assert [ours[t["ids"][0]] for t in processor.values()] == list(processor)


def test_text_comes_before_the_end_of_text_and_what_steers_after_it(trimmed):
    after = trimmed[0]
    special = {i for i, token in names(after).items() if re.fullmatch(r"<\|.*\|>", token)}
    assert special == set(range(after.generation.eot, N_KEPT))
    assert after.generation.sot == after.generation.eot + 1
    assert not {"<|zh|>", "<|0.00|>", "<|0.02|>"} & set(names(after).values())


def test_a_suppressed_token_that_is_gone_is_not_listed(folder, tmp_path):
    after, _ = cut(folder, tmp_path / "out", corpus=(written(tmp_path, "kalt"),))
    assert [names(after)[i] for i in after.generation.suppress_tokens] == ["!"]


def test_symbols_are_kept_unless_they_are_never_said(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(words, "symbols", lambda bpe: {"Ġhad", "Ġthe"})
    after, _ = cut(folder, tmp_path / "out", corpus=(written(tmp_path, "kalt"),))
    assert {"Ġhad", "Ġthe"} & set(names(after).values()) == {"Ġthe"}


def written(folder, text, name="words.txt"):
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


# spelling


def device_tokenizer(checkpoint):
    return DeviceTokenizer(checkpoint.tokenizer_json, reference.vocabulary(checkpoint))


def test_any_bytes_can_be_said(trimmed):
    tokenizer = device_tokenizer(trimmed[0])
    rng = random.Random(0)
    for _ in range(50):
        text = "".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(0xA1, 0xD7FF)])) for _ in range(20))
        assert tokenizer.text(tokenizer.encode(text)) == text.strip()
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    assert alphabet <= set(names(trimmed[0]).values())


def test_what_is_listed_is_spelled_as_before(before, trimmed):
    old, new = Bpe(before.tokenizer_json), Bpe(trimmed[0].tokenizer_json)
    texts = [f" {word}" for word in LIST] + [" the wizard had vanished behind the water"]
    kept = [text for text in texts if set(old.encode([text])[0]) <= new.text.keys()]
    assert len(kept) >= 4
    assert new.encode(kept) == old.encode(kept)
    assert trimmed[1].details["spelled_as_before"]["en"] >= 0.8


def test_what_is_spelled_as_before_is_counted_by_how_often_it_is_said(before):
    bpe = Bpe(before.tokenizer_json)
    assert words.coverage(bpe, "en", set(bpe.bytes) | bpe.made_of("Ġthe")) == pytest.approx(LIST["the"])


def test_what_is_spelled_with_kept_tokens_is_spelled_as_before_whatever_is_kept(before):
    """Any choice that is closed under merges."""
    old, rng = Bpe(before.tokenizer_json), random.Random(1)
    texts = [" ".join(rng.sample(" ".join(CORPUS).split(), 5)) for _ in range(200)]
    n_same = 0
    for n in (270, 300, 350):
        weights = {token: rng.random() for token in old.text}
        chosen = old.choose(weights, n)
        new = Bpe(old.reduced(chosen, set(SPECIAL))[0])
        for text, before_, after in zip(texts, old.encode(texts), new.encode(texts), strict=True):
            assert new.tokenizer.decode(new.tokenizer.encode(text, add_special_tokens=False).ids) == text
            if chosen.issuperset(before_):
                assert after == before_
                n_same += 1
    assert n_same > 50


def test_a_token_comes_with_all_that_it_is_made_of(before):
    bpe = Bpe(before.tokenizer_json)
    longest = max(bpe.text, key=len)
    assert bpe.choose({longest: 1.0}, len(bpe.bytes)) == bpe.bytes  # no room
    chosen = bpe.choose({longest: 1.0}, 300)
    assert longest in chosen
    assert chosen - bpe.bytes == bpe.made_of(longest) - bpe.bytes
    assert Bpe(bpe.reduced(chosen, set(SPECIAL))[0]).encode([longest.replace("Ġ", " ")]) == [[longest]]


def test_the_heaviest_come_first(before):
    bpe = Bpe(before.tokenizer_json)
    pairs = sorted(token for token in bpe.text if len(token) == 2)[:3]
    chosen = bpe.choose(dict(zip(pairs, (0.2, 0.3, 0.1), strict=True)), 258)
    assert chosen - bpe.bytes == {pairs[0], pairs[1]}


def test_older_files_write_merges_as_one_string(before):
    parts = json.loads(before.tokenizer_json)
    parts["model"]["merges"] = [" ".join(merge) for merge in parts["model"]["merges"]]
    old, new = Bpe(before.tokenizer_json), Bpe(json.dumps(parts).encode())
    chosen = old.choose(dict.fromkeys(old.text, 1.0), 350)
    spelled = [Bpe(bpe.reduced(chosen, set(SPECIAL))[0]).encode(CORPUS) for bpe in (old, new)]
    assert spelled[0] == spelled[1]


def test_the_tokenizer_of_a_bundle_says_the_same_in_fewer_bytes(before):
    written = deflatable(before.tokenizer_json)
    assert len(zlib.compress(written, 9)) < len(zlib.compress(before.tokenizer_json, 9))
    one, other = (json.loads(Tokenizer.from_str(text.decode()).to_str()) for text in (before.tokenizer_json, written))
    assert one == other
    assert deflatable(written) == written


def test_a_merge_that_holds_a_space_is_written_in_two_parts(before):
    parts = json.loads(before.tokenizer_json)
    parts["model"]["vocab"]["a b"] = max(parts["model"]["vocab"].values()) + 1
    parts["model"]["merges"].append(["a b", "c"])
    parts["model"]["vocab"]["a bc"] = max(parts["model"]["vocab"].values()) + 1
    assert json.loads(deflatable(json.dumps(parts).encode()))["model"]["merges"] == parts["model"]["merges"]


# what a language or a corpus needs


def test_a_corpus_is_kept_whole(folder, before, tmp_path):
    after, report = cut(folder, tmp_path / "out", corpus=(written(tmp_path, "THE WISE\n\nder Winter über\n"),))
    old, new = Bpe(before.tokenizer_json), Bpe(after.tokenizer_json)
    for text in ("THE WISE", "der Winter über", " the wise", " über", "25"):
        assert new.encode([text]) == old.encode([text])
    assert after.generation.lang_ids.keys() == before.generation.lang_ids.keys()
    assert report.details["n_tokens"] < 350


def test_a_manifest_is_a_corpus(folder, tmp_path):
    (tmp_path / "a.wav").touch()
    line = {"id": "a", "audio": "a.wav", "text": "der Winter"}
    manifest = written(tmp_path, json.dumps(line), "manifest.jsonl")
    by_file, _ = cut(folder, tmp_path / "one", corpus=(manifest,))
    by_folder, _ = cut(folder, tmp_path / "two", corpus=(str(tmp_path),))
    assert by_file.tokenizer_json == by_folder.tokenizer_json
    assert "Ġwinter" in names(by_file).values()
    assert Vocabulary(corpus=(str(tmp_path),)).inputs() == [tmp_path / "manifest.jsonl"]


def test_forms_of_a_word():
    assert words.forms("us", "en").keys() == {" us", " Us", " US", "us", "Us"}
    assert words.forms("winter", "de").keys() == {" winter", " Winter", "winter", "Winter"}
    assert words.forms("这里", "zh").keys() == {"这里", "這裡"} or words.forms("这里", "zh").keys() == {"这里", "這裏"}


def test_of_a_words_forms_the_one_that_was_merged_first_is_the_most_frequent(before):
    """What is not one token is rare where another form is, and in lower case after a space where none is."""
    bpe = Bpe(before.tokenizer_json)
    first, later = sorted((token for token in bpe.text if len(token) > 2), key=bpe.text.__getitem__)[:2]
    plain = [0.003, 1.0, 0.1]
    shares = words._parts(bpe, plain, [[later], ["a", "b"], [first]])
    assert shares[2] > shares[0] > 0.4
    assert shares[0] + shares[2] == pytest.approx(1.0)
    assert shares[1] == words.RARE
    assert words._parts(bpe, plain, [["a", "b"]] * 3) == plain


def test_where_no_space_parts_words_a_token_of_several_is_kept(monkeypatch):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab, merges = {char: i for i, char in enumerate(alphabet)}, []
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    one, two, other = (level.pre_tokenize_str(char)[0][0] for char in "是人我")
    for char in (one, two, other):
        merges += [(char[0], char[1]), (char[:2], char[2])]
    for left, right in [*merges, (one, two)]:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, [*merges, (one, two)]))
    tokenizer.pre_tokenizer, tokenizer.decoder = level, decoders.ByteLevel()
    bpe = Bpe(tokenizer.to_str().encode())
    monkeypatch.setattr(words, "listed", lambda language: {"是": 0.6, "人": 0.4})
    found = words.weights(bpe, "zh")
    assert found[one + two] == pytest.approx(0.4)
    assert not found.get(other)


def test_lists_are_there_for_what_ships():
    assert {"en", "zh"} <= words.available()


def test_without_a_limit_all_that_is_listed_is_kept(folder, before, tmp_path):
    after, report = cut(folder, tmp_path / "out", languages=("en",))
    old, new = Bpe(before.tokenizer_json), Bpe(after.tokenizer_json)
    written = [form for word in LIST for form in words.forms(word, "en")]
    assert new.encode(written) == old.encode(written)
    assert report.details["spelled_as_before"] == {"en": 1.0}
    assert N_KEPT < report.details["n_tokens"] < before.model.config.vocab_size - len(SPECIAL)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"languages": ("en", "fr")}, "the checkpoint does not know fr"),
        ({"languages": ("en",), "max_tokens": 200}, r"max_tokens: 200 is too few: .* take 2\d\d"),
    ],
)
def test_what_cannot_be_is_refused(folder, tmp_path, settings, reason):
    with pytest.raises(ModelError, match=reason):
        cut(folder, tmp_path / "out", **settings)


def test_settings_that_cannot_be_are_refused(tmp_path):
    from test_recipe import PLAIN
    from test_recipe import written as written_recipe

    from convert import recipe

    for text, reason in (
        ("", "needs languages, a corpus, or both"),
        ('languages = ["en", "en"]', "languages: must be distinct"),
        ('languages = ["en"]\nmax_tokens = 0', "max_tokens: must be positive"),
    ):
        stage = f'[[stages]]\nstage = "vocabulary"\n{text}\n'
        source, rest = PLAIN.split("[[stages]]", 1)
        with pytest.raises(ConfigError, match=reason):
            recipe.load(written_recipe(tmp_path, f"{source}{stage}[[stages]]{rest}"))


def test_files_and_lists_that_are_missing_are_named_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(words, "available", lambda: {"en", "nb"})
    stage = Vocabulary(languages=("en", "no", "mi"), corpus=(str(tmp_path / "gone.txt"),))
    found = stage.problems()
    assert len(found) == 2
    assert "gone.txt: no such file" in found[0]
    assert "mi has no word list, unlike en, nb" in found[1]


# on the device


def heard(checkpoint, pcm, never=()):
    """What the device's own decoding says of a clip, with some tokens forbidden besides."""
    from agent.config import RecogniserConfig
    from agent.transcriber import Transcriber
    from convert.evaluate import _heard

    made = reference.manifest(checkpoint, "toy")
    steering = msgspec.structs.replace(made.vocabulary, suppress=[*made.vocabulary.suppress, *never])
    engine = reference.TorchEngine(checkpoint.model, msgspec.structs.replace(made, vocabulary=steering))
    tokenizer = DeviceTokenizer(checkpoint.tokenizer_json, steering)
    ears = Transcriber(engine, tokenizer, RecogniserConfig(language="en", partials=False))
    return [final.text for final in _heard(ears, pcm)]


def test_the_device_hears_what_it_would_if_the_others_were_never_said(before, trimmed):
    kept = set(names(trimmed[0]).values())
    eot = before.generation.eot
    gone = [i for i, token in names(before).items() if token not in kept and i < eot]
    clips = [toy.babble(2.0, seed) for seed in range(3)]
    texts = [heard(trimmed[0], pcm) for pcm in clips]
    assert len(gone) > 50
    assert texts == [heard(before, pcm, gone) for pcm in clips]
    assert all(text for found in texts for text in found)
