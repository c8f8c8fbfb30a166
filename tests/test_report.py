"""The report: what it takes from files, that it does without what is missing, and that a browser shows it."""

import base64
import io
import json
import queue
import re
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from xml.etree import ElementTree as ET

import msgspec
import numpy as np
import pytest
import results as made
import soundfile
from matplotlib.image import imread
from typer.testing import CliRunner

from convert import charts, heatmap, report, sensitivity, worst
from convert.__main__ import app
from convert.charts import Point
from convert.intervals import Interval
from convert.results import gather
from convert.scored import Scored
from convert.sensitivity import Row, Sensitivity
from whisperlet.errors import ConfigError

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, toy_path):
    folder = made.write(tmp_path_factory.mktemp("results"))
    shutil.copy(toy_path, folder / "toy.tflite")
    return folder


@pytest.fixture(scope="module")
def page(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "report.html"
    assert report.write(folder, out, 3) == []
    return out


def sections(html):
    return re.findall(r'<section id="(\w+)">', html)


# ---- what is in it


def test_every_section_is_there(page):
    assert sections(page.read_text()) == list(report.SECTIONS)


def test_figures_are_those_of_the_files(page, folder):
    html = page.read_text()
    stored = json.loads((folder / "small.tflite.scores.json").read_text())
    span = stored["intervals"]["wer"]
    assert f"{stored['wer']:.2f} %" in html
    assert f"{span['low']:.2f} to {span['high']:.2f}" in html
    assert "410.0" in html  # seconds of a stage
    assert f"{(folder / 'toy.tflite').stat().st_size:,} bytes" in html
    assert "0.94 %" in html  # relative loss


def test_it_is_the_same_every_time(page, folder, tmp_path):
    report.write(folder, tmp_path / "again.html", 3)
    assert (tmp_path / "again.html").read_text() == page.read_text()


def test_nothing_is_fetched(page):
    html = page.read_text()
    links = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert links
    assert all(link.startswith(("#", "data:")) for link in links), links
    assert "://" not in re.sub(r'data:[^"]*', "", html)
    assert "url(" not in re.sub(r"url\(#\w+\)", "", html)


def test_texts_cannot_break_the_page(tmp_path):
    made.write_evaluation(tmp_path / "a.json", "<script>alert(1)</script>", "set", 1_000_000, 0.2, n=5)
    report.write(tmp_path, tmp_path / "report.html", 3)
    assert "<script" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("missing", ["evaluations", "builds", "bundles", "sensitivity"])
def test_parts_may_be_missing(folder, tmp_path, missing):
    patterns = {
        "evaluations": ["*.scores.json", "original.json", "paced.json"],
        "builds": ["small.json"],
        "bundles": ["*.tflite"],
        "sensitivity": [sensitivity.FILE],
    }
    gone = {
        "evaluations": {"accuracy", "differences", "pareto", "latency", "worst"},
        "builds": {"stages"},
        "bundles": {"sizes"},
        "sensitivity": {"sensitivity"},
    }
    less = shutil.copytree(folder, tmp_path / "less", ignore=shutil.ignore_patterns(*patterns[missing]))
    said = report.write(less, tmp_path / "report.html", 3)
    html = (tmp_path / "report.html").read_text()
    assert set(sections(html)) == report.SECTIONS.keys() - gone[missing] | {"missing"}
    assert {sentence.partition(":")[0] for sentence in said} == {report.SECTIONS[key][0] for key in gone[missing]}
    assert all(sentence in html for sentence in said)


def test_a_damaged_file_is_named(folder, tmp_path):
    more = shutil.copytree(folder, tmp_path / "more")
    (more / "broken.json").write_text('{"model": 1, "utterances": 2}')
    (more / "half.json").write_text('{"model": ')
    (more / "broken.tflite").write_text("nonsense")
    said = "\n".join(report.write(more, tmp_path / "report.html", 3))
    for name in ("broken.json", "half.json", "broken.tflite"):
        assert name in said
        assert name in (tmp_path / "report.html").read_text()


def test_a_comparison_holds_two_evaluations(folder, tmp_path):
    one, other = (json.loads((folder / f"{name}.tflite.scores.json").read_text()) for name in ("large", "small"))
    (tmp_path / "c.json").write_text(json.dumps({"a": one, "b": other, "differences": []}))
    assert [found.model for _, found in gather(tmp_path).evaluations] == ["small.tflite", "large.tflite"]


# ---- its parts


def test_the_worst_come_first_and_their_audio_is_theirs(folder):
    found = next(found for path, found in gather(folder).evaluations if path.name == "odd.tflite.scores.json")
    utterances = worst.worst(found, 3)
    assert len(utterances) == 3
    assert [u.faults for u in utterances] == sorted((u.faults for u in utterances), reverse=True)
    data = base64.b64decode(utterances[0].audio.removeprefix("data:audio/flac;base64,"))
    expected, _ = soundfile.read(folder / "dev" / f"{utterances[0].clip.id}.flac")
    assert np.array_equal(soundfile.read(io.BytesIO(data))[0], expected)


def test_audio_that_is_gone_is_said(folder, tmp_path):
    made.write_evaluation(tmp_path / "a.json", "m.tflite", tmp_path / "none", 1_000_000, 0.3, n=5)
    report.write(tmp_path, tmp_path / "report.html", 2)
    html = (tmp_path / "report.html").read_text()
    assert html.count("No audio: ") == 2
    assert "manifest.jsonl" in html or "none: cannot be read" in html


def clip(ref, hyp, language="en"):
    return Scored(
        id="c", ref=ref, hyp=hyp, duration_s=1.0, finalise_ms=None, end_to_final_ms=None, language=language, rejected=[]
    )


@pytest.mark.parametrize(
    ("ref", "hyp", "language", "expected"),
    [
        ("The cat sat.", "the cat sat", "en", [("equal", "the cat sat")]),
        ("the cat sat", "the bat sat", "en", [("equal", "the"), ("missed", "cat"), ("invented", "bat"), ("equal", "sat")]),
        ("the cat", "the big cat", "en", [("equal", "the"), ("invented", "big"), ("equal", "cat")]),
        ("the cat", "", "en", [("missed", "the cat")]),
        ("这个听说", "这听说", "zh", [("equal", "这"), ("missed", "个"), ("equal", "听说")]),
    ],
)  # fmt: skip
def test_words(ref, hyp, language, expected):
    assert [(word.kind, word.text) for word in worst.difference(clip(ref, hyp, language))] == expected


def test_slots_that_were_missed():
    command = msgspec.structs.replace(clip(None, "a large coffee"), slots=["large", " iced mocha"])
    assert [(slot.kind, slot.text) for slot in worst._slots(command)] == [("equal", "large"), ("missed", "iced mocha")]


def test_the_frontier():
    points = [
        Point(name, size, error, None)
        for name, size, error in (("a", 10, 9), ("b", 20, 5), ("c", 30, 5), ("d", 15, 10))
    ]
    assert [point.label for point in charts.frontier(points)] == ["a", "b"]


def test_pictures_follow_the_page():
    points = [Point(name, size, 5.0, Interval(4, 7)) for name, size in (("a <b>", 10.0), ("c", 20.0))]
    for svg in (
        charts.pareto(points, "word error rate"),
        charts.forest(points, "word error rate"),
        charts.histogram({"x": [1.0, 2.0, 3.0], "y": [5.0]}),
        charts.bars({"a": 1.0}, "MB"),
    ):
        tree = ET.fromstring(svg.replace("xlink:href", "href"))
        assert tree.get("aria-label")
        assert "var(--ink)" in svg
        drawn = set(re.findall(r"#[0-9a-f]{6}", svg)) - {"#000000", "#ffffff"}
        assert not drawn, drawn  # no colour of its own


def test_the_heat_map_has_every_row_in_its_place():
    rows = [
        Row(name="x", kind="heads", layer=1, amount=0.5, cost=2.0),
        Row(name="y", kind="heads", layer=1, amount=0.5, cost=3.0),
        Row(name="z", kind="heads", layer=0, amount=0.5, cost=-0.1),
        Row(name="e", kind="embedding", layer=None, amount=0.25, cost=0.0),
    ]
    found = heatmap.heat_map(Sensitivity(unit="u", amount_unit="a", rows=rows))
    assert found.columns == ["0", "1", "whole"]
    texts = [(band.kind, band.amount, [cell and cell.text for cell in band.cells]) for band in found.bands]
    assert texts == [("embedding", "0.25", [None, None, "0"]), ("heads", "0.5", ["-0.1", "3", None])]
    assert found.bands[1].cells[1].hint == "y: 3, the dearest of 2"
    assert found.bands[1].cells[1].background == found.scale[-1][0] != found.scale[0][0]


# ---- what is wrong


def test_nothing_to_report(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds no bundle, no report of a build"):
        report.write(tmp_path, tmp_path / "report.html", 3)
    with pytest.raises(ConfigError, match="no such folder"):
        report.write(tmp_path / "none", tmp_path / "report.html", 3)


def test_a_page_that_cannot_be_written(folder, tmp_path):
    with pytest.raises(ConfigError, match="cannot be written"):
        report.write(folder, tmp_path / "none" / "report.html", 0)


def test_the_command(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["report", str(folder), "--out", "page.html", "--worst", "0"])
    assert result.exit_code == 0
    assert "not in the report: Worst utterances" in result.output
    assert (tmp_path / "page.html").is_file()


# ---- in a browser


needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium; `make system` installs it")


def browse(page, folder, *options):
    """Return what the browser makes of a page, and what it has to say of it."""
    settings = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=20000"]
    command = [BROWSER, *settings, f"--user-data-dir={folder / 'profile'}", *options, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@needs_browser
def test_a_browser_shows_it(page, tmp_path):
    dom, complaints = browse(page, tmp_path)
    assert complaints == []
    assert sections(dom) == list(report.SECTIONS)
    assert [title for title, _ in report.SECTIONS.values() if f"<h2>{title}</h2>" not in dom] == []
    assert dom.count("<svg") == page.read_text().count("<svg") == 5


@needs_browser
@pytest.mark.parametrize(
    "addition",
    ['<img src="https://nowhere.invalid/a.png">', '<link rel="stylesheet" href="a.css">', "<script>1</script>"],
)
def test_the_page_forbids_itself_to_fetch_and_to_run(page, tmp_path, addition):
    (tmp_path / "more.html").write_text(page.read_text().replace("</main>", f"{addition}</main>"))
    _, complaints = browse(tmp_path / "more.html", tmp_path)
    assert "Content Security Policy" in "".join(complaints)


PROBE = """<script>
addEventListener("load", async () => {
  const context = new OfflineAudioContext(1, 16000, 16000);
  const audio = [];
  for (const {src, error} of document.querySelectorAll("audio")) {
    const bytes = Uint8Array.from(atob(src.split(",")[1]), c => c.charCodeAt(0));
    const decoded = await context.decodeAudioData(bytes.buffer).catch(fault => ({fault: String(fault)}));
    audio.push({seconds: decoded.duration, error: decoded.fault || (error && error.message)});
  }
  const fetched = performance.getEntriesByType("resource").map(entry => entry.name);
  const overflow = document.documentElement.scrollWidth - innerWidth;
  const body = JSON.stringify({audio, fetched: fetched.filter(name => !name.startsWith("data:")), overflow});
  await fetch("/found", {method: "POST", body});
});
</script></body>"""


def probe(html, folder, width):
    """Return what PROBE finds in a page; it posts that, for decoding runs beside the clock that --dump-dom waits by."""
    found = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/" else 204)
            self.end_headers()
            if self.path == "/":
                self.wfile.write(html.replace("</body>", PROBE).encode())

        def do_POST(self):
            found.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"http://127.0.0.1:{server.server_port}/"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        options += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900", where]
        browser = subprocess.Popen([BROWSER, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            return found.get(timeout=120)
        finally:
            browser.terminate()
            browser.wait(30)
            server.shutdown()


@needs_browser
@pytest.mark.parametrize("width", [1100, 500])
def test_its_audio_decodes_and_nothing_sticks_out(page, tmp_path, width):
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    found = probe(html, tmp_path, width)
    assert len(found["audio"]) == 3
    assert all(audio["error"] is None and 0.99 < audio["seconds"] < 1.01 for audio in found["audio"])
    assert found["fetched"] == []
    assert found["overflow"] <= 0


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_drawn_on_light_and_on_dark(page, tmp_path, scheme):
    shot = tmp_path / "report.png"
    html = page.read_text().replace("(prefers-color-scheme: dark)", "all" if scheme == "dark" else "not all")
    (tmp_path / "page.html").write_text(html)
    browse(tmp_path / "page.html", tmp_path, f"--screenshot={shot}", "--window-size=1100,3000")
    picture = imread(shot)[..., :3]
    assert picture.shape[:2] == (3000, 1100)
    assert (np.median(picture) > 0.5) == (scheme == "light")
    assert (np.abs(picture - np.median(picture, (0, 1))).max(-1) > 0.3).mean() > 0.02  # something stands on it
