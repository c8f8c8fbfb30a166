"""A table of sensitivities comes back as it was written."""

import pytest

from convert import sensitivity
from convert.sensitivity import Row, Sensitivity
from whisperlet.errors import ConfigError

ROWS = [
    Row(name="encoder.layers.0.fc1", kind="encoder fc1", layer=0, amount=0.25, cost=0.1),
    Row(name="decoder.embed_tokens", kind="embedding", layer=None, amount=0.5, cost=-0.02),
]


def test_it_comes_back(tmp_path):
    table = Sensitivity(unit="WER, percentage points", amount_unit="share removed", rows=ROWS)
    sensitivity.write(table, tmp_path / sensitivity.FILE)
    assert sensitivity.read(tmp_path / sensitivity.FILE) == table


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nonsense", "is no table of sensitivities"),
        ('{"unit": "x", "amount_unit": "y", "rows": [{}]}', "missing required field `name`"),
    ],
)
def test_a_table_that_is_wrong(tmp_path, text, reason):
    path = tmp_path / sensitivity.FILE
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"sensitivity\.json: .*{reason}"):
        sensitivity.read(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        sensitivity.read(tmp_path / "none.json")
