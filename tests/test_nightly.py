"""What runs at night is made of targets that exist."""

import re
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def test_every_command_of_the_night_exists():
    script = (REPOSITORY / ".ci/nightly").read_text()
    commands = re.findall(r"^make .+$", script, re.MULTILINE)
    assert commands
    for command in commands:
        subprocess.run([*command.split(), "--dry-run"], cwd=REPOSITORY, check=True, capture_output=True)
