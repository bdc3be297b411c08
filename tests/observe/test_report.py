"""The page: everything is in it, nothing is fetched, whatever it is made of is escaped, and a browser shows it."""

import html.parser
import random
import re
import shutil
import struct
import subprocess
import sys
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphcache.errors import ExtraNotFoundError
from graphcache.observe.report import page
from graphcache.observe.result import Inputs, Measured, Result
from tests.observe.test_result import results

pytest.importorskip("matplotlib")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def traffic(calls=300):
    """What a GPU might give: launch-bound calls over six shapes, some of which cannot be captured."""
    choose = random.Random(0)
    inputs = tuple(Inputs(f"observation:{rows}x48", 4096 * rows) for rows in (1, 2, 4, 8, 16, 32))
    made, seen = [], set()
    for _ in range(calls):
        number = choose.choices(range(6), [1 / (rank + 1) for rank in range(6)])[0]
        eager = choose.lognormvariate(5.2, 0.1)
        if choose.random() < 0.1:
            made.append(Measured(number, "data_dependent", eager, eager))
        elif number in seen:
            made.append(Measured(number, "hit", choose.lognormvariate(3.8, 0.1), eager))
        else:
            seen.add(number)
            made.append(Measured(number, "capture", 5000.0, eager))
    return Result(
        "nets.py:policy", {"device": "a GPU", "torch": "2.13.0"}, inputs, tuple(made), {"data_dependent": "why"}
    )


class Reader(html.parser.HTMLParser):
    """Which elements there are; every one that is opened is closed."""

    VOID = frozenset({"meta", "br", "img", "link", "input"})

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(text):
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def test_everything_is_in_it():
    reader = read(page(traffic()))
    sections = [value for name, value in reader.attributes if name == "id"]
    for name in ("latencies", "cumulative", "outcomes", "memory", "inputs", "reasons"):
        assert name in sections
    assert reader.seen.count("svg") == 4
    text = "".join(reader.text)
    for said in ("nets.py:policy", "a GPU, torch 2.13.0", "observation:32x48", "data_dependent", "eager ÷ graph"):
        assert said in text
    assert sections.count("latencies") == 1
    assert len(sections) == len(set(sections)), "identifiers of one plot are not those of another"


def test_nothing_is_fetched_and_nothing_runs():
    text = page(traffic())
    reader = read(text)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(reader.seen)
    for name, value in reader.attributes:
        if name in ("href", "xlink:href", "src"):
            assert value.startswith("#"), value
        assert not name.startswith("on")
    assert "url(http" not in text
    assert "@import" not in text


def test_references_inside_plots_lead_somewhere():
    text = page(traffic())
    known = set(re.findall(r'\bid="([^"]+)"', text))
    referred = set(re.findall(r'xlink:href="#([^"]+)"|url\(#([^)]+)\)', text))
    assert referred
    assert {one or other for one, other in referred} <= known


@settings(max_examples=6)
@given(results())
def test_any_result_makes_a_page(result):
    read(page(result))


@given(st.sampled_from(["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "&amp;", "$x^2$", "a\nb"]))
@settings(max_examples=5)
def test_what_it_is_made_of_is_escaped(text):
    calls = (Measured(0, "hit", 1, 2), Measured(0, "grad", 1, 2))
    reader = read(page(Result(text, {"device": text}, (Inputs(text, 5),), calls, {"grad": text})))
    assert not {"script", "img"} & set(reader.seen)


def test_without_calls_there_is_a_page_without_plots():
    reader = read(page(Result("nothing")))
    assert "svg" not in reader.seen
    assert "never" in "".join(reader.text)


def test_the_same_result_makes_the_same_page():
    assert page(traffic(50)) == page(traffic(50))


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ExtraNotFoundError, match=r'pip install "graphcache\[plots\]"$'):
        page(traffic(5))


def pixels(path):
    """Width, height and rows of RGB bytes of a PNG as Chromium writes it: 8 bits, not interlaced."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, depth, kind = struct.unpack(">IIBB", data[16:26])
    assert depth == 8
    channels = {2: 3, 6: 4}[kind]
    packed, at = b"", 8
    while at < len(data):
        length, name = struct.unpack(">I4s", data[at : at + 8])
        packed += data[at + 8 : at + 8 + length] if name == b"IDAT" else b""
        at += 12 + length
    raw, stride = zlib.decompress(packed), width * channels
    previous, rows = bytearray(stride), []
    for index in range(height):
        start = index * (stride + 1)
        kind, line = raw[start], bytearray(raw[start + 1 : start + 1 + stride])
        for place in range(stride):
            left = line[place - channels] if place >= channels else 0
            up, corner = previous[place], previous[place - channels] if place >= channels else 0
            if kind == 4:
                guess = left + up - corner
                near = [(abs(guess - value), order, value) for order, value in enumerate((left, up, corner))]
                line[place] = line[place] + min(near)[2] & 255
            elif kind:
                line[place] = line[place] + {1: left, 2: up, 3: (left + up) // 2}[kind] & 255
        rows.append([tuple(line[at : at + 3]) for at in range(0, stride, channels)])
        previous = line
    return width, height, rows


def colour(text):
    return tuple(int(text[at : at + 2], 16) for at in (1, 3, 5))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here; its structure is tested above")
def test_a_browser_shows_it(tmp_path):
    from graphcache.observe.plots import CAPTURE, EAGER, GRAPH

    (tmp_path / "report.html").write_text(page(traffic()), encoding="utf-8")
    flags = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
        *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
        *(f"--user-data-dir={tmp_path / 'profile'}", "--window-size=480,1400"),
    ]
    address = (tmp_path / "report.html").as_uri()
    subprocess.run(
        [BROWSER, *flags, f"--screenshot={tmp_path / 'shot.png'}", address],
        check=True,
        capture_output=True,
        timeout=240,
    )
    width, height, rows = pixels(tmp_path / "shot.png")
    assert (width, height) == (480, 1400)
    found = {name: [] for name in (EAGER, GRAPH, CAPTURE)}
    for line, row in enumerate(rows):
        for name, places in found.items():
            if colour(name) in row:
                places.append(line)
    # Curves of both ways near the top, bars of hits and captures below them.
    assert min(found[EAGER]) > 100
    for name in (EAGER, GRAPH):
        assert len(found[name]) > 100, name
    assert max(found[CAPTURE]) > max(found[EAGER])
    # The page does not run over its width: below the header, the margin on the right is background to the bottom.
    margin, background = [row[width - 4] for row in rows], colour("#f3f4f6")
    header = margin.index(background)
    assert 0 < header < 300
    assert set(margin[header:]) == {background}
