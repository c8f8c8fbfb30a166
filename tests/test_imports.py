"""Who may import whom, and other rules of the house that a tool can check."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGES = ("whisperlet", "agent", "convert", "demo")
FILES = [path for package in PACKAGES for path in sorted((REPOSITORY / package).rglob("*.py"))]
AGENT = sorted(path.stem for path in (REPOSITORY / "agent").glob("*.py"))
WORKSTATION = {"torch", "transformers", "litert_torch", "ai_edge_quantizer", "convert"}
MAX_LINES = 300
MAX_FUNCTION_LINES = 60

# What a stage may import of `agent` besides messages and config. A stage may consist of several files; it reaches
# another stage only through its messages, and only `pipeline` and `__main__` know them all.
ANYTHING = None
ALLOWED = {
    "__init__": set(),
    "__main__": ANYTHING,
    "pipeline": ANYTHING,
    "messages": set(),
    "config": {"term_list"},
    "term_list": set(),
    # audio
    "sources": {"audio_files", "reopening", "ring"},
    "audio_files": {"resampling"},
    "microphone": {"quiet", "resampling", "ring"},
    "reopening": {"microphone", "ring"},
    "resampling": set(),
    "ring": set(),
    "vad": set(),
    "silero": set(),
    "confirm": {"vad", "silero"},
    # recognition
    "alignment": set(),
    "state": {"alignment"},
    "engine": {"alignment", "state"},
    "terms": {"term_list"},
    "guess": set(),
    "windows": set(),
    "preference": {"terms"},
    "reader": {"alignment", "guess", "preference"},
    "decoding": {"guess", "preference", "reader", "terms"},
    "drafting": {"alignment", "decoding", "guess", "preference", "reader", "terms"},
    "rejection": {"decoding"},
    "follower": {"alignment", "drafting", "engine", "terms"},
    "segment": {"alignment", "decoding", "rejection"},
    "transcriber": {
        "decoding",
        "engine",
        "follower",
        "memory",
        "rejection",
        "segment",
        "term_list",
        "terms",
        "windows",
    },
    "pace": set(),
    "worker": {"engine", "memory", "pace", "protocol", "quiet", "transcriber"},
    "supervisor": {"engine_process", "pace", "protocol"},
    "engine_process": {"protocol"},
    "protocol": set(),
    "quiet": set(),
    "memory": set(),
    # publishing
    "clock": set(),
    "inventory": {"sysfs"},
    "payloads": {"clock", "inventory", "measurements"},
    "identity": {"clock", "inventory", "payloads"},
    "outbox": set(),
    "spool": {"outbox"},
    "pending": {"outbox"},
    "store": {"outbox", "pending", "spool"},
    "outboxes": {"outbox", "store"},
    "broker": set(),
    "link": {"broker"},
    "patience": {"broker", "link"},
    "mqtt": {"broker", "link", "patience", "payloads"},
    # what operators ask for
    "commands": {"term_list"},
    "replies": {"payloads"},
    "dispatch": {"clock", "commands", "replies"},
    "controls": {"commands", "switches"},
    "switches": {"vad"},
    "kept": {"switches"},
    "hearing": {"sources", "vad"},
    "home_assistant": {"payloads"},
    "diagnostics": {"commands", "payloads"},
    "schemas": {"commands", "payloads", "replies"},
    # the agent about itself
    "sysfs": set(),
    "measurements": set(),
    "power": {"measurements", "sysfs"},
    "energy": {"measurements", "power"},
    "thermal": {"sysfs"},
    "monitor": {"energy", "measurements", "power", "thermal"},
    "telemetry": {"clock", "measurements", "payloads"},
    "health": set(),
    "logs": set(),
    # the doctor, who asks some of the stages
    "findings": set(),
    "machine": {"findings", "sysfs", "thermal"},
    "ear_check": {"findings", "microphone", "ring"},
    "broker_check": {"broker", "findings", "link", "payloads"},
    "doctor": {"broker_check", "ear_check", "findings", "machine"},
    "vitals": {"health", "payloads"},
}


def loaded_by(module):
    """Top-level packages that are there after importing `module` in a fresh interpreter."""
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", AGENT)
def test_the_device_never_loads_what_belongs_to_the_workstation(module):
    assert not loaded_by(f"agent.{module}") & WORKSTATION


def test_the_service_loads_nothing_that_makes_output_beautiful():
    """Memory that every device would pay for: typer, for one, imports pydantic."""
    assert not loaded_by("agent.__main__, agent.pipeline, agent.worker") & {"typer", "click", "pydantic", "rich"}


def test_a_bundle_is_looked_into_without_what_makes_one():
    """It would take seconds to load."""
    assert not loaded_by("convert.__main__, convert.inspection, convert.tables") & {"torch", "transformers"}


@pytest.mark.parametrize("module", sorted(path.stem for path in (REPOSITORY / "whisperlet").glob("*.py")))
def test_the_shared_part_loads_neither_side(module):
    assert not loaded_by(f"whisperlet.{module}") & (WORKSTATION | {"agent", "ai_edge_litert", "tflite_runtime"})


def test_the_workstation_shows_its_help_without_loading_torch():
    assert not loaded_by("convert.__main__") & {"torch", "transformers", "litert_torch"}


def imported(path):
    """Modules that a file imports, as "package.module", also inside functions."""
    package = path.parent.name
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else None, node.module]))
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imported_of_agent(path):
    names = [name.split(".") for name in imported(path) if name.startswith("agent.")]
    return {name[1] for name in names if name[1] in AGENT}


def test_the_table_knows_every_module():
    assert sorted(ALLOWED) == AGENT


@pytest.mark.parametrize("module", [module for module, allowed in ALLOWED.items() if allowed is not ANYTHING])
def test_a_stage_imports_only_what_is_allowed(module):
    found = imported_of_agent(REPOSITORY / "agent" / f"{module}.py")
    assert found <= ALLOWED[module] | {"messages", "config"}
    assert "pipeline" not in found


def test_the_table_allows_no_more_than_is_needed():
    needed = {module: imported_of_agent(REPOSITORY / "agent" / f"{module}.py") for module in ALLOWED}
    surplus = {module: allowed - needed[module] for module, allowed in ALLOWED.items() if allowed}
    assert not any(surplus.values()), surplus


def test_only_evaluation_imports_the_agent():
    importers = {path.name for path in (REPOSITORY / "convert").rglob("*.py") if imported_of_agent(path)}
    assert importers == {"entities.py", "evaluate.py", "playing.py", "reference.py", "spending.py"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name


def tracked_texts():
    """Name and text of each tracked text file."""
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, cwd=REPOSITORY, check=False)
    if listed.returncode != 0:
        pytest.skip("this is not a git checkout")
    for name in listed.stdout.decode().split("\0"):
        path = REPOSITORY / name
        if path.is_file() and b"\0" not in path.read_bytes():
            yield name, path.read_text(encoding="utf-8")


def test_nothing_tells_of_one_machine():
    """Paths of somebody's home and hosts of package indexes belong to their configuration."""
    paths = r"/(home|Users)/\w{2}|/(work|root)/\w|(?<!\w)/tmp/\w"
    hosts = r"pythonhosted\.org|pypi\.(org|io)|download\.pytorch\.org|\bregistry\.npmjs"
    texts = ((name, text) for name, text in tracked_texts() if not name.endswith(Path(__file__).name))
    found = [(name, match[0]) for name, text in texts for match in re.finditer(f"{paths}|{hosts}", text)]
    assert found == []


def needed_by(module, seen):
    """Modules of `convert` that one of them imports, and what those import."""
    if module not in seen:
        seen.add(module)
        for node in ast.walk(ast.parse((REPOSITORY / f"convert/{module}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                for name in names:
                    if (REPOSITORY / f"convert/{name}.py").is_file():
                        needed_by(name, seen)
    return seen


def test_a_kept_bundle_is_built_anew_when_a_module_that_makes_it_has_changed():
    line = next(x for x in (REPOSITORY / "Makefile").read_text().splitlines() if x.startswith("BYSTANDERS :="))
    bystanders = line.partition(":=")[2].partition("#")[0].split()
    assert all((REPOSITORY / f"convert/{name}.py").is_file() for name in bystanders)
    assert needed_by("pipeline", set()).isdisjoint(bystanders)
