"""Graphs before serving: ``prepare``, and manifests of what another process served."""

import pytest
import torch

import graphcache
from graphcache import Call, Manifest, Prepared, Reason
from tests.helpers import Fn, mlp, outcomes, reason, replays


def test_calls_are_captured_before_they_come():
    fast = graphcache.wrap(mlp(), capture="prepared")
    done = fast.prepare(torch.ones(1, 4), (torch.ones(2, 4),), Call((torch.ones(3, 4),)))
    assert isinstance(done, Prepared)
    assert (done.signatures, done.refused, done.left_out) == (3, (), 0)
    assert done.nbytes == fast.cache_info().nbytes > 0
    for count in (1, 2, 3):
        assert replays(fast, torch.ones(count, 4))
    assert reason(fast, torch.ones(4, 4)) is Reason.NOT_PREPARED


def test_an_engine_is_prepared_by_shapes(load, rows):
    fast = graphcache.wrap(load("affine"), capture="prepared")
    assert fast.prepare((2, 4), {"x": (3, 4)}).signatures == 2
    assert replays(fast, rows(2))
    assert replays(fast, rows(3))


def test_pinned_graphs_stay():
    fast = graphcache.wrap(mlp(), max_graphs=2)
    fast.prepare(torch.ones(1, 4), pin=True)
    for count in (2, 3, 4):
        fast(torch.ones(count, 4))
    assert replays(fast, torch.ones(1, 4))


def test_what_cannot_be_captured_is_refused_with_its_cause():
    done = graphcache.wrap(Fn(lambda _, x: x * x.sum().item())).prepare(torch.ones(2))
    assert [each.cause.reason for each in done.refused] == [Reason.HOST_READ]


def test_a_manifest_carries_calls_to_the_next_process(tmp_path):
    module = mlp()
    first, second = graphcache.wrap(module), graphcache.wrap(module)
    for count in (1, 2, 2):
        first(torch.ones(count, 4))
    manifest = first.save_manifest(tmp_path / "calls.json")
    assert isinstance(manifest, Manifest)
    assert len(manifest.entries) == 2
    assert second.prepare(tmp_path / "calls.json").signatures == 2
    for count in (1, 2):
        assert replays(second, torch.ones(count, 4))
    assert outcomes(second)[2] == {}


def test_a_damaged_manifest_is_a_problem_and_no_error(tmp_path):
    (tmp_path / "calls.json").write_text("{")
    done = graphcache.wrap(mlp()).prepare(tmp_path / "calls.json")
    assert done.signatures == 0
    assert len(done.problems) == 1


@pytest.mark.parametrize("options", [{"pin": 1}, {"deadline": 0}, {"progress": "yes"}])
def test_bad_options(options):
    with pytest.raises(ValueError):
        graphcache.wrap(mlp()).prepare(torch.ones(1, 4), **options)
