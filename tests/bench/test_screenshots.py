"""The pictures of the README: made of real runs, complete in themselves, and small."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from bench import screenshots

DOCS = Path(screenshots.DOCS)


@pytest.mark.parametrize("name", screenshots.VIEWS)
def test_a_view_is_drawn_and_refers_to_nothing_outside(name):
    text = screenshots.drawn(screenshots.VIEWS[name](), name)
    ElementTree.fromstring(text)
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "").replace("https://www.textualize.io", "")
    assert "@font-face" not in text
    said = {"explain": "dim&#160;0:&#160;77&#160;→&#160;78", "doctor": "screenshots.py:"}
    assert said[name] in text


def test_a_command_prints_what_it_prints():
    line = next(
        number
        for number, text in enumerate(Path(screenshots.__file__).read_text().splitlines(), 1)
        if "action = action[action[:, 0] > 0]" in text
    )
    found = screenshots.run("doctor", "bench.screenshots:Tracker", "--shapes", "observation:3x48")
    assert found.startswith(f"bench/screenshots.py:{line}: data_dependent: Tensor.__getitem__\n")


def test_without_a_browser_one_line_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(screenshots.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="no browser here; install one of chromium"):
        screenshots.shoot(tmp_path / "a.html", tmp_path / "a.png")


def test_one_view_alone(tmp_path):
    screenshots.main(["--only", "explain", "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["explain.svg"]


def test_those_in_the_pages_are_there_and_small():
    page = (DOCS / "observing.md").read_text(encoding="utf-8")
    names = re.findall(r"!\[.*\]\(([\w.]+)\)", page)
    assert set(names) == {f"{name}.svg" for name in screenshots.VIEWS} | {"report.png"}
    assert all((DOCS / name).stat().st_size < 300_000 for name in names)
