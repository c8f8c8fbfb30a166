"""A Whisper of 0.2 M parameters: random, quick, and varied in what it says. Heavy libraries only where it is made."""

import hashlib
import shutil
import warnings
from importlib.metadata import version
from pathlib import Path

import msgspec
import numpy as np
import pytest
from filelock import FileLock

from whisperlet.audio import SAMPLE_RATE, to_pcm16
from whisperlet.bundle import FORMAT_VERSION, Dims, Manifest, StreamSpec, Vocabulary

REPOSITORY = Path(__file__).parents[1]
ENCODE_FRAMES, CROSS_FRAMES, DECODE_TOKENS, N_TEXT_CTX = (128, 1500), (256, 1500), (1, 4), 32
STREAMS = [StreamSpec(chunk=15, overlap=overlap, padding=9, context=60) for overlap in (40, 10)]
ALIGNMENT_HEADS = [(0, 1), (1, 0), (1, 2)]
EOT, SOT, EN, HAW, TRANSCRIBE, NO_SPEECH, NO_TIMESTAMPS = 256, 257, 258, 259, 261, 264, 265
FREQUENT = [222, 77, 55, 147, 123]  # what this model would say all day

VOCABULARY = Vocabulary(
    sot=SOT,
    eot=EOT,
    no_timestamps=NO_TIMESTAMPS,
    no_speech=NO_SPEECH,
    transcribe=TRANSCRIBE,
    languages={"en": EN, "haw": HAW},
    suppress=[1, 7],
    suppress_begin=[32, EOT],
)
DIMS = Dims(n_mels=80, d_model=64, n_head=4, n_audio_layer=2, n_text_layer=2, n_vocab=280, n_text_ctx=N_TEXT_CTX)


def make_manifest(**changes):
    """Return a manifest for tests that need no graphs."""
    plain = Manifest(
        format_version=FORMAT_VERSION,
        name="toy",
        dims=DIMS,
        vocabulary=VOCABULARY,
        alignment_heads=ALIGNMENT_HEADS,
        encode_frames=list(ENCODE_FRAMES),
        cross_frames=list(CROSS_FRAMES),
        decode_tokens=list(DECODE_TOKENS),
        streams=STREAMS,
        silence_frames={"default": 64},
        graphs=[],
        source="toy",
        source_sha256="",
        recipe={},
        tools={},
    )
    return msgspec.structs.replace(plain, **changes)


def make_model(n_layers=2):
    """Return a Whisper with every value random, gains and biases too, that stops talking now and then."""
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(2)
    config = WhisperConfig(
        vocab_size=DIMS.n_vocab,
        d_model=DIMS.d_model,
        encoder_layers=n_layers,
        decoder_layers=n_layers,
        encoder_attention_heads=DIMS.n_head,
        decoder_attention_heads=DIMS.n_head,
        encoder_ffn_dim=96,
        decoder_ffn_dim=80,
        max_target_positions=224,
        pad_token_id=EOT,
        bos_token_id=EOT,
        eos_token_id=EOT,
        decoder_start_token_id=SOT,
        suppress_tokens=VOCABULARY.suppress,
        begin_suppress_tokens=VOCABULARY.suppress_begin,
    )
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "model.encoder.embed_positions.weight":
                parameter.normal_(mean=float("norm.weight" in name), std=0.2)
        _make_talkative(model.model.decoder)
    model.generation_config.alignment_heads = [list(head) for head in ALIGNMENT_HEADS]
    return model


def _make_talkative(decoder):
    """Let text depend on place and sound rather than on the last token alone."""
    decoder.embed_positions.weight *= 2
    words = decoder.embed_tokens.weight
    words *= 1.6 / words.norm(dim=1, keepdim=True)
    words[EOT] = 0.24 * words[FREQUENT].sum(0)
    for layer in decoder.layers:
        layer.encoder_attn.out_proj.weight *= 4
        layer.encoder_attn.q_proj.weight *= 3


def save_checkpoint(folder):
    from test_model import make_tokenizer

    make_model().save_pretrained(folder)
    make_tokenizer().save(str(folder / "tokenizer.json"))


def recipe(folder, name="toy"):
    from convert.recipe import Export, Package, Quantise, Recipe

    export = Export(
        n_text_ctx=N_TEXT_CTX,
        encode_frames=ENCODE_FRAMES,
        cross_frames=CROSS_FRAMES,
        decode_tokens=DECODE_TOKENS,
        stream_chunk=STREAMS[0].chunk,
        stream_overlaps=tuple(spec.overlap for spec in STREAMS),
        stream_padding=STREAMS[0].padding,
        stream_context=STREAMS[0].context,
    )
    package = Package(silence_frames={"default": 64, "haw": 96})
    return Recipe(source=str(folder / "checkpoint"), stages=[export, Quantise(), package], name=name)


def build(folder):
    """Make checkpoint, bundle and report in `folder`; keep the .tflite files of the steps before the bundle."""
    from rich.console import Console

    from convert import compact, pipeline

    save_checkpoint(folder / "checkpoint")

    def keep(sources, target):
        for path in target.parent.glob("*.tflite"):
            shutil.copy(path, folder)
        plain(sources, target)

    plain = compact.compact
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's libraries about each other
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(compact, "compact", keep)
        pipeline.build(recipe(folder), folder, Console(quiet=True))


def fingerprint():
    """Return a hash of everything that the toy bundle is made by."""
    digest = hashlib.sha256()
    for path in [
        *(p for name in ("whisperlet", "convert") for p in sorted((REPOSITORY / name).glob("*.py"))),
        __file__,
    ]:
        digest.update(Path(path).read_bytes())
    for tool in ("torch", "transformers", "litert-torch", "ai-edge-quantizer", "ai-edge-litert"):
        digest.update(version(tool).encode())
    return digest.hexdigest()[:16]


def built_once(cache, scratch):
    """Return the folder of the toy bundle; half a minute of tracing is spent anew only when the code has changed."""
    kept = cache / fingerprint()
    with FileLock(cache / "lock"):  # more than one process may be testing
        if not kept.is_dir():
            build(scratch)
            for old in cache.glob("*/"):
                shutil.rmtree(old, ignore_errors=True)
            partial = cache / "partial"
            shutil.copytree(scratch, partial)
            partial.rename(kept)
    return kept


def babble(duration_s, seed=0):
    """Return noise that comes and goes, as speech does; 16-bit PCM."""
    rng = np.random.default_rng(seed)
    n = int(duration_s * SAMPLE_RATE)
    time_s = np.arange(n) / SAMPLE_RATE
    pitch = 120 + 60 * np.sin(2 * np.pi * rng.uniform(0.5, 2) * time_s + seed)
    voice = np.sin(2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE) ** 9 + 0.1 * rng.standard_normal(n)
    return to_pcm16(0.3 * voice * (1 + np.sin(2 * np.pi * rng.uniform(2, 5) * time_s)) / 2)


class TokenState:
    """What a made-up decoder holds: the tokens so far, and how many came in each pass."""

    def __init__(self):
        self.tokens, self.passes = [], []

    @property
    def position(self):
        return len(self.tokens)

    @position.setter
    def position(self, value):
        assert 0 <= value <= len(self.tokens)
        del self.tokens[value:]
