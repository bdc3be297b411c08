import json
from pathlib import Path

import pytest

from bench import readme
from tests.bench.fakes import figures

FILE = Path("bench/results/suite.json")
HERE = {
    "device": "NVIDIA H100",
    "tensorrt": "tensorrt_rtx 1.4.0.76",
    "torch": "2.11.0",
    "commit": "5101a9c6034c588e1b70",
    "date_utc": "2026-01-02T03:04:05+00:00",
}


def payload():
    wrong = {"kind": "engine", "rival": "graphcache", "exact": False, "reason": "8 of 8 answers were wrong"}
    absent = {**wrong, "reason": "not installed: aitune"}
    one = {
        "raw": figures(41.74, 1.94, 41.74, exact=True, nodes=[16, 16]),
        "graphcache": figures(50.0, 8.04, 40.0, exact=True),
        "tensorrt": figures(182.4, 172.4, 40.0, rival="graphcache"),
        "aitune": absent,
    }
    several = {**one, "graphcache": figures(121.0, 9.0, 100.0, exact=True), "tensorrt": wrong}
    several["raw"] = figures(89.4, 1.9, 89.4, exact=True, nodes=[16, 12])
    return {
        "benchmark": "suite",
        "environment": HERE,
        "results": [
            {"engine": "mlp8", "sizes": [8], "systems": one},
            {"engine": "mlp8", "sizes": [1, 9, 64], "systems": several},
        ],
    }


def test_every_figure_and_where_it_is_from():
    source, *lines = readme.lines(payload(), FILE)
    assert source == (
        "Median call + synchronise in µs; in brackets, over that of the raw launch in turn with it, "
        "and the CPU time of the call in µs. NVIDIA H100, tensorrt_rtx 1.4.0.76, torch 2.11.0, commit 5101a9c6034c, "
        "2026-01-02: [suite.json](bench/results/suite.json)."
    )
    assert lines == [
        "",
        "| System | mlp8 (16 nodes), one shape | mlp8, 3 shapes in turn |",
        "|---|---:|---:|",
        "| `raw` | 41.7 (1.00, 1.9) | 89.4 (1.00, 1.9) |",
        "| `graphcache` | 50.0 (1.25, 8.0) | 121 (1.21, 9.0) |",
        "| `tensorrt` | 182 (4.56, 172) | wrong |",
        "| `aitune` | - | - |",
        "",
        "| Times as long | mlp8 (16 nodes), one shape | mlp8, 3 shapes in turn |",
        "|---|---:|---:|",
        "| `tensorrt` / `graphcache` | 3.65 | wrong |",
        "| `aitune` / `graphcache` | - | - |",
    ]


@pytest.mark.parametrize(
    ("chosen", "rows"),
    [
        ({"counts": [3], "systems": ["raw"]}, ["| `raw` | 89.4 (1.00, 1.9) |"]),
        ({"engines": ["mlp8"], "counts": [1], "systems": ["graphcache"]}, ["| `graphcache` | 50.0 (1.25, 8.0) |"]),
    ],
)
def test_a_part_can_be_chosen(chosen, rows):
    lines = readme.lines(payload(), FILE, **chosen)
    assert lines[4:] == rows


@pytest.mark.parametrize("chosen", [{"engines": ["none"]}, {"counts": [5]}, {"systems": ["raw-torch"]}])
def test_nothing_chosen_is_an_error(chosen):
    with pytest.raises(SystemExit, match=r"suite\.json has no figures of these engines"):
        readme.lines(payload(), FILE, **chosen)


def test_every_row_has_as_many_cells():
    lines = [line for line in readme.lines(payload(), FILE) if line.startswith("|")]
    assert {line.count("|") for line in lines} == {4}


def test_what_another_program_wrote_is_refused(tmp_path):
    file = tmp_path / "x.json"
    for text, said in (("{", "cannot be read"), ('{"benchmark": "hit"}', "was not written by"), ("[1]", "not written")):
        file.write_text(text)
        with pytest.raises(SystemExit, match=said):
            readme.read(file)
    with pytest.raises(SystemExit, match="cannot be read"):
        readme.read(tmp_path / "missing.json")


def test_what_the_suite_wrote_is_read(tmp_path):
    file = tmp_path / "suite.json"
    file.write_text(json.dumps(payload()))
    assert readme.lines(readme.read(file), FILE) == readme.lines(payload(), FILE)
