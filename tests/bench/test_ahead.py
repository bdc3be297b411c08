import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import ahead
from tests.bench.fakes import figures


def result(engine="mlp8", count=1, **systems):
    named = {name.replace("_", "-"): found for name, found in systems.items()}
    return {"engine": engine, "sizes": list(range(count)), "systems": named}


def absent(reason="not installed: x", **more):
    return {"kind": "engine", "rival": "graphcache", "also": [], "exact": False, "reason": reason, **more}


times = st.floats(1, 1000)


@given(times, st.dictionaries(st.sampled_from(["tensorrt", "aitune", "inference-models"]), times, min_size=1))
def test_every_peer_must_take_longer(ours, theirs):
    systems = {name: figures(each, rival="graphcache") for name, each in theirs.items()}
    (found,) = ahead.compare([result(graphcache=figures(ours), **systems)])
    assert found.ahead is all(each > ours for each in theirs.values())
    assert found.times == {(name, "graphcache"): pytest.approx(each / ours) for name, each in theirs.items()}


@given(times, times, times)
def test_a_mode_that_promises_less_is_shown_and_decides_nothing(into, session, peer):
    rtx = figures(peer, rival="graphcache-into", also=["graphcache-session"])
    ours = {"graphcache_into": figures(into), "graphcache_session": figures(session)}
    (found,) = ahead.compare([result(rtx_graphs=rtx, **ours)])
    assert found.ahead is (peer > into)
    assert found.times["rtx-graphs", "graphcache-session"] == pytest.approx(peer / session)
    assert list(found.times) == [("rtx-graphs", "graphcache-into"), ("rtx-graphs", "graphcache-session")]


def test_a_peer_that_could_not_be_measured_is_not_in_the_way():
    both = result(graphcache=figures(10), tensorrt=figures(20, rival="graphcache"), aitune=absent())
    (found,) = ahead.compare([both])
    assert found.ahead is True
    assert found.times["aitune", "graphcache"] is None


def test_nobody_is_ahead_of_nobody():
    (found,) = ahead.compare([result(graphcache=figures(10), aitune=absent())])
    assert found.ahead is None


def test_whoever_was_not_measured_is_not_ahead():
    peer = figures(20, rival="graphcache")
    for systems in ({"tensorrt": peer}, {"tensorrt": peer, "graphcache": absent(rival=None)}):
        (found,) = ahead.compare([result(**systems)])
        assert found.ahead is False
        assert found.times == {("tensorrt", "graphcache"): None}


def test_kinds_are_compared_apart_engines_first():
    torch = figures(9, kind="torch", rival="graphcache-torch")
    rows = [
        result(
            "one", compiled=torch, graphcache_torch=figures(8, kind="torch"), tensorrt=figures(9, rival="graphcache")
        ),
        result("two", tensorrt=figures(9, rival="graphcache")),
        result("three", raw=figures(9)),
    ]
    assert [(each.engine, each.kind) for each in ahead.compare(rows)] == [
        ("one", "engine"),
        ("two", "engine"),
        ("one", "torch"),
    ]


def test_cells_tell_wrong_answers_from_none():
    wrong = absent("56 of 64 answers were wrong before timing, by up to 1.1e+00", failed=True)
    row = result(graphcache=figures(8), tensorrt=figures(10, rival="graphcache"), aitune=absent(), ttrt=wrong)
    (found,) = ahead.compare([row])
    assert [ahead.cell(found, pair) for pair in ahead.pairs([found])] == ["1.25", "-", "wrong"]
    assert ahead.cell(found, ("rtx-graphs", "graphcache-into")) == "-"


def test_pairs_are_those_of_all_rows_in_order():
    rows = [
        result(graphcache=figures(8), a=figures(9, rival="graphcache")),
        result("two", graphcache=figures(8), b=figures(9, rival="graphcache"), a=figures(9, rival="graphcache")),
    ]
    assert ahead.pairs(ahead.compare(rows)) == [("a", "graphcache"), ("b", "graphcache")]


def test_a_mode_that_took_no_time_at_all_divides_by_none():
    (found,) = ahead.compare([result(graphcache=figures(0.0), a=figures(9, rival="graphcache"))])
    assert found.ahead is True
