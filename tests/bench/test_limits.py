import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import limits, peers
from tests.bench.fakes import figures


def result(engine="mlp8", count=1, **systems):
    """Systems by name, with ``_`` for ``-``; what is not given is as good as it must be."""
    given_ = {name.replace("_", "-"): found for name, found in systems.items()}
    perfect = {name: figures(10.0, 1.0, exact=True) for name in limits.LIMITS}
    return {"engine": engine, "sizes": list(range(1, count + 1)), "systems": perfect | given_}


def test_a_run_as_good_as_it_must_be_falls_short_of_nothing():
    assert limits.shortfalls([result(), result(count=8), result("policy", 128)]) == []


def test_the_limits_are_the_ones_that_were_set():
    as_data = {name: (each.cpu_us, each.over_raw, each.over_raw_long) for name, each in limits.LIMITS.items()}
    assert as_data == {
        "graphcache": (8, 1.10, 1.03),
        "graphcache-into": (4, 1.04, 1.04),
        "graphcache-session": (4, 1.04, 1.04),
        "graphcache-isolated": (12, 1.20, 1.06),
    }
    assert limits.FURTHER_AHEAD == {("torch-tensorrt-cpp", "mlp8"): (1.5, 10.0)}
    assert set(limits.LIMITS) | {name for name, _ in limits.FURTHER_AHEAD} <= set(peers.SYSTEMS)


@given(
    st.sampled_from(sorted(limits.LIMITS)),
    st.sampled_from([1, 8, 128]),
    st.floats(0.5, 20),
    st.floats(0.9, 1.5),
    st.sampled_from([40.0, 99.9, 100.0, 400.0]),
)
def test_each_mode_is_held_to_its_own_limits(name, count, cpu, ratio, raw):
    limit = limits.LIMITS[name]
    systems = {each: figures(raw, 1.0, raw, exact=True) for each in limits.LIMITS}
    systems[name] = figures(ratio * raw, cpu, raw, exact=True)
    found = limits.shortfalls([{"engine": "net", "sizes": list(range(count)), "systems": systems}])
    most = limit.over_raw_long if raw >= 100 else limit.over_raw
    over = [cpu > limit.cpu_us, systems[name]["total_over_raw"] > most]
    assert len(found) == sum(over)
    assert all(f"net, {count} shapes, {name}: " in text for text in found)
    if over[0]:
        assert f"the limit is {limit.cpu_us:g}" in found[0]
    if over[1]:
        assert f"times raw, the limit is {most:g}" in found[-1]


def test_an_engine_is_long_by_its_raw_launch_with_a_fixed_shape():
    slow = {name: figures(105.0 * 1.09, 1.0, 105.0, exact=True) for name in limits.LIMITS}
    in_turn = {"engine": "net", "sizes": [1, 2], "systems": {**slow, "graphcache-into": figures(105, 1, 105)}}
    in_turn["systems"]["graphcache-session"] = figures(105, 1, 105)
    in_turn["systems"]["graphcache-isolated"] = figures(105, 1, 105)
    [short] = limits.shortfalls([in_turn])
    assert short.startswith("net, 2 shapes, graphcache: 1.09 times raw")
    # Known to be short, the same figures are within the wide limits; whichever comes first in the file.
    assert limits.shortfalls([in_turn, result("net")]) == limits.shortfalls([result("net"), in_turn]) == []


@pytest.mark.parametrize(("p50", "ahead"), [(10.01, True), (30.0, True), (10.0, False), (9.0, False)])
def test_every_peer_must_take_longer_than_the_mode_it_is_compared_with(p50, ahead):
    peer = figures(p50, rival="graphcache")
    found = limits.shortfalls([result("policy", aitune=peer)])
    assert (found == []) is ahead
    if not ahead:
        assert found == [
            f"policy, 1 shapes, aitune: {p50 / 10:.2f} times as long as graphcache; it must be more than 1"
        ]


@pytest.mark.parametrize(
    ("engine", "count", "p50", "enough"),
    [
        ("mlp8", 1, 15.0, True),
        ("mlp8", 1, 14.9, False),
        ("mlp8", 8, 100.0, True),
        ("mlp8", 8, 99.0, False),
        ("policy", 8, 10.5, True),
    ],
)
def test_torch_tensorrts_cpp_runtime_must_be_further_behind_on_mlp8(engine, count, p50, enough):
    peer = figures(p50, rival="graphcache")
    assert (limits.shortfalls([result(engine, count, torch_tensorrt_cpp=peer)]) == []) is enough


def test_a_peer_that_cannot_run_is_no_shortfall():
    absent = {"kind": "engine", "rival": "graphcache", "exact": False, "reason": "not installed: aitune"}
    assert limits.shortfalls([result(aitune=absent)]) == []


def test_a_peer_whose_rival_was_not_measured_is_not_passed_by():
    found = result(graphed_callables=figures(50, rival="graphcache-torch", kind="torch"))
    assert limits.shortfalls([found]) == [
        "mlp8, 1 shapes, graphed-callables: not compared, since graphcache-torch was not measured"
    ]


def test_what_was_left_out_or_failed_is_not_met():
    about = {"kind": "engine", "exact": True, "rival": None}
    short = limits.shortfalls(
        [
            result(
                graphcache={**about, "reason": "left out, since 9 s were over", "left_out": True},
                graphcache_isolated={**about, "reason": "RuntimeError: no", "failed": True},
                aitune={**about, "rival": "graphcache", "reason": "left out, since 9 s were over", "left_out": True},
            )
        ]
    )
    assert short == [
        "mlp8, 1 shapes, graphcache: left out, since 9 s were over",
        "mlp8, 1 shapes, graphcache-isolated: not measured (RuntimeError: no)",
        "mlp8, 1 shapes, aitune: left out, since 9 s were over",
    ]


def test_nothing_measured_is_nothing_shown():
    assert len(limits.shortfalls([])) == len(limits.LIMITS)
    only = {"engine": "net", "sizes": [1], "systems": {"graphcache": figures(10, exact=True)}}
    assert sorted(text.split()[0] for text in limits.shortfalls([only])) == sorted(set(limits.LIMITS) - {"graphcache"})


def test_a_raw_launch_too_fast_to_be_seen_breaks_nothing():
    peer = figures(0.0, rival="graphcache")
    found = limits.shortfalls([result("policy", graphcache=figures(0.0, exact=True), aitune=peer)])
    assert len(found) == 1
    assert math.isfinite(float(found[0].split()[4]))
