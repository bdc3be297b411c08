import sys

import pytest

from bench import peers, record, tables
from tests.bench.fakes import figures


def row(engine="mlp8", count=2, **systems):
    return {
        "engine": engine,
        "sizes": list(range(1, count + 1)),
        "systems": {n.replace("_", "-"): f for n, f in systems.items()},
    }


def test_rows_hold_what_is_known():
    memory = {"device_bytes": 2048, "torch_bytes": 1}
    (one, two) = tables.rows(
        row(a=figures(12.5, 3.0, memory_per_shape=memory), gone={"reason": "x"}, b=figures(9.0, steady_seconds=None))
    )
    assert one == ["a", 12.5, 12.5, 12.5, 0.0, 1.25, 3.0, 1.0, 2.0, 2.0]
    assert two == ["b", 9.0, 9.0, 9.0, 0.0, 0.9, 1.0, 1.0, "never", ""]


def test_each_reason_is_said_once_with_all_its_rows():
    absent = {"reason": "not installed: aitune"}
    found = [row(aitune=absent, raw=figures(10)), row(aitune=absent), row(aitune={"reason": "RuntimeError: other"})]
    assert tables.reasons(found) == [
        "not measured: aitune (mlp8 x 2, mlp8 x 2): not installed: aitune",
        "not measured: aitune (mlp8 x 2): RuntimeError: other",
    ]


def everything(engine, count, factor=1234.5):
    """A row with every system there is, with figures as wide as they get."""
    made = {}
    for name, make in peers.SYSTEMS.items():
        peer = make()
        about = {"kind": peer.kind, "rival": peer.rival, "also": list(peer.also), "exact": peer.exact}
        wide = {"device_bytes": 99_999 << 10, "torch_bytes": 0}
        made[name] = figures(factor, 999.9, 99.9, first_answer_seconds=99.9, memory_per_shape=wide, **about)
        made[name]["steady_seconds"] = 99.9
    return {"engine": engine, "sizes": list(range(count)), "systems": made}


@pytest.mark.parametrize("rich", [True, False])
def test_everything_fits_into_120_columns(capsys, monkeypatch, rich):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    tables.show([everything("mobilenet", 128), everything("minilm", 32), everything("mlp8", 1)])
    out, _ = capsys.readouterr()
    assert max(map(len, out.splitlines())) <= 120
    for name in peers.SYSTEMS:
        # A name that was folded or cut off would not be found whole.
        assert out.count(f" {name} " if rich else f"{name} ") >= 3
    assert "mobilenet, 128 shapes in turn: call + synchronise" in out
    assert "mlp8, one shape: call + synchronise" in out
    assert "mobilenet x 128" in out


def test_what_is_not_in_the_tables_follows_them_then_who_is_ahead(capsys):
    ours = {"graphcache": figures(10.0), "graphcache_into": figures(5.0), "graphcache_session": figures(4.0)}
    slow, absent = (
        figures(20.0, rival="graphcache"),
        {"kind": "engine", "rival": "graphcache", "reason": "not installed"},
    )
    quick = figures(6.0, rival="graphcache-into", also=["graphcache-session"])
    tables.show([row(count=1, **ours, tensorrt=slow, rtx_graphs=quick, aitune=absent)])
    lines = capsys.readouterr().out.splitlines()
    end = lines.index("not measured: aitune (mlp8 x 1): not installed")
    assert any("over raw" in line for line in lines[:end])
    assert lines[end + 1].startswith("ahead of every peer?")
    (verdict,) = [line for line in lines[end + 1 :] if "mlp8 x 1" in line]
    assert [cell.strip() for cell in verdict.strip("│").split("│")] == ["mlp8 x 1", "yes", "2.00", "1.20", "1.50", "-"]


def test_a_run_of_one_kind_has_no_table_of_the_other(capsys):
    tables.show(
        [row(graphcache_torch=figures(5, kind="torch"), compiled=figures(9, kind="torch", rival="graphcache-torch"))]
    )
    out, _ = capsys.readouterr()
    assert out.count("ahead of every peer?") == 1
    assert "torch x shapes" in out


def test_a_run_without_figures_has_no_empty_tables(capsys):
    tables.show([row(aitune={"kind": "engine", "rival": "graphcache", "reason": "not installed: x"})])
    out, _ = capsys.readouterr()
    assert "call + synchronise" not in out
    assert out.startswith("not measured: aitune")


@pytest.mark.parametrize("rich", [True, False])
def test_headings_may_have_several_lines_and_numbers_are_set_to_the_right(capsys, monkeypatch, rich):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    record.table("title", ["a\nname", "number"], [["x", 1.0], ["longer", 1234.5]])
    lines = [line.strip("│┃ ") for line in capsys.readouterr().out.splitlines()]
    assert lines[0].strip() == "title"
    (short, long) = [line for line in lines if line.startswith(("x", "longer"))]
    assert short.endswith(" 1.000")
    assert long.endswith("1234")
    assert any(line.startswith("name") for line in lines)
