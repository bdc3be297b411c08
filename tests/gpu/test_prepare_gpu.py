"""Graphs before serving, on a real engine and on a module of PyTorch."""

import time

import pytest
import torch
from torch import nn

import graphcache
from graphcache import Reason

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
networks = pytest.importorskip("tests.gpu.networks")

SIZES = range(1, 33)


def close(got, wanted, bound=5e-3):
    got, wanted = got.double().cpu(), wanted.double().cpu()
    return (got - wanted).norm() <= bound * wanted.norm()


def rows(count):
    return torch.randn(count, networks.SIZE, device="cuda")


def test_an_engine_starts_from_a_manifest_with_hits_alone(load, tmp_path):
    """Prints the time of the first 32 calls, prepared and not."""
    first = graphcache.wrap(load("mlp8"), max_graphs=32)
    start = time.perf_counter()
    with torch.inference_mode():
        for size in SIZES:
            first(rows(size))
        torch.cuda.synchronize()
        at_first_use = time.perf_counter() - start
        for size in SIZES:
            for _ in range(size):
                first(rows(size))
    manifest = first.save_manifest(tmp_path / "mlp8.json")
    assert [entry.hits for entry in manifest.entries] == sorted(SIZES, reverse=True)
    assert manifest.environment["module"]
    assert manifest.environment["driver"] != "unknown"
    first.close()

    fast = graphcache.wrap(load("mlp8"), capture="prepared", on_failure="raise")
    done = fast.prepare(tmp_path / "mlp8.json")
    assert (done.signatures, done.refused, done.left_out, done.problems) == (32, (), 0, ())
    assert done.nbytes == fast.cache_info().nbytes
    torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.inference_mode():
        answers = [(x := rows(size), fast(x)) for size in SIZES]
        torch.cuda.synchronize()
    prepared = time.perf_counter() - start
    for x, y in answers:
        assert close(y, networks.mlp8_reference(x))
    info = fast.cache_info()
    assert (info.hits, info.captures, info.eager) == (32, 32, {})
    print(f"prepared in {done.seconds:.3f} s; 32 first calls {prepared * 1e3:.2f} ms, capturing {at_first_use:.3f} s")
    assert prepared < at_first_use / 2


def test_shapes_of_an_engine(load):
    fast = graphcache.wrap(load("mlp8"), capture="prepared")
    with torch.no_grad():
        done = fast.prepare((4, networks.SIZE), {"x": (8, networks.SIZE)}, [(1, networks.SIZE)], pin=True)
        assert (done.signatures, done.refused) == (3, ())
        for size in (1, 4, 8):
            x = rows(size)
            assert close(fast(x), networks.mlp8_reference(x))
        fast(rows(2))
    info = fast.cache_info()
    assert (info.hits, info.captures, info.eager) == (3, 3, {Reason.NOT_PREPARED: 1})


def test_a_shape_outside_the_profiles_raises_and_captures_nothing(load):
    fast = graphcache.wrap(load("mlp8"))
    with pytest.raises(graphcache.errors.ProfileRangeError):
        fast.prepare((4, networks.SIZE), (65, networks.SIZE))
    assert fast.cache_info().captures == 0


def test_another_engine_is_foreign(load, tmp_path):
    fast = graphcache.wrap(load("mlp8"))
    fast.prepare((4, networks.SIZE))
    fast.save_manifest(tmp_path / "m.json")
    other = graphcache.wrap(load("two_outputs"))
    done = other.prepare(tmp_path / "m.json")
    assert done.signatures == 0
    assert [problem.field for problem in done.problems] == ["environment['module']"]


def test_a_module_of_pytorch_from_a_manifest(tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).cuda().eval().requires_grad_(False)

    first = graphcache.wrap(make())
    with torch.inference_mode():
        for size in SIZES:
            first(rows(size))
    first.save_manifest(tmp_path / "m.json")
    fast = graphcache.wrap(make(), capture="prepared")
    done = fast.prepare(tmp_path / "m.json")
    assert (done.signatures, done.refused, done.problems) == (32, (), ())
    with torch.inference_mode():
        for size in SIZES:
            x = rows(size)
            assert close(fast(x), fast.module(x))
    assert (fast.cache_info().hits, fast.cache_info().eager) == (32, {})


def test_a_budget_in_bytes_holds_while_preparing(load):
    probe = graphcache.wrap(load("mlp8"))
    each = probe.prepare((64, networks.SIZE)).nbytes
    probe.close()
    fast = graphcache.wrap(load("mlp8"), max_bytes=4 * each)
    done = fast.prepare(*[(size, networks.SIZE) for size in SIZES])
    assert 0 < done.nbytes <= 4 * each
    assert done.signatures + len(done.refused) == 32
    assert {refused.cause.reason for refused in done.refused} <= {Reason.OVER_BUDGET}
