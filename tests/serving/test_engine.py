"""Engines behind the batches, over a stand-in of TensorRT that computes at once and captures nothing."""

from __future__ import annotations

import pytest
import torch

from graphcache import Axis
from graphcache.errors import ConfigError, InputDtypeError, InputRankError, ProfileRangeError, Reason
from graphcache.serving.runner import Runner
from graphcache.serving.settings import Settings
from tests.engines import fake_tensorrt
from tests.standins import engines


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("GRAPHCACHE_DISABLE", "1")
    runners = []

    def get(network, **options):
        runners.append(Runner(Settings(fake_tensorrt.serialize(network), name=network, **options)))
        return runners[-1]

    with engines(monkeypatch, streams=False):
        yield get
        for runner in runners:
            runner.close()


def test_an_engine_says_what_it_takes(serve):
    spec = serve("affine").spec
    assert spec.platform == "tensorrt"
    assert [(each.name, each.dtype, each.shape) for each in spec.inputs] == [("x", "float32", (-1, 4))]
    assert [(each.name, each.dtype, each.shape) for each in spec.outputs] == [("y", "float32", (-1, 4))]


def test_rows_are_those_of_the_profiles_and_no_more_than_were_asked_for(serve):
    assert serve("affine").batcher.sizes == (1, 2, 4, 8, 16)
    assert serve("affine", max_batch_size=4).batcher.sizes == (1, 2, 4)
    assert serve("affine", rows=[3, 12]).batcher.sizes == (3, 12)
    with pytest.raises(ConfigError, match="the size 17; expected one that a profile takes"):
        serve("affine", rows=[17])


def test_answers_are_by_the_names_of_the_engine(serve):
    runner = serve("affine", rows=[1, 4])
    requests = [{"x": torch.full((1 + each % 2, 4), float(each))} for each in range(7)]
    for each, answer in enumerate(runner.answer(requests)):
        assert answer["y"].tolist() == [[each * 3.0 + 1] * 4] * (1 + each % 2)
    assert set(runner.counts.batches) <= {1, 4}
    assert set(runner.info().eager) == {Reason.DISABLED}


def test_two_inputs_two_axes_and_every_combination_of_buckets_prepared(serve):
    rows, columns = Axis([2, 4], name="rows"), Axis([3, 6], name="columns")
    runner = serve("pair", buckets={name: {0: rows, 1: columns} for name in ("a", "b")})
    assert len(runner.held) == 2
    assert [each.name for each in runner.spec.outputs] == ["sum", "product"]
    requests = [{"b": torch.full((1, size), 2.0), "a": torch.full((1, size), float(size))} for size in range(1, 7)]
    for size, answer in enumerate(runner.answer(requests), 1):
        assert (answer["sum"].tolist(), answer["product"].tolist()) == ([[size + 2.0] * size], [[size * 2.0] * size])
    assert sum(runner.counts.batches.values()) == 2


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (torch.zeros(1, 4).double(), InputDtypeError),
        (torch.zeros(1, 5), ProfileRangeError),
        (torch.zeros(17, 4), ProfileRangeError),
        (torch.zeros(4), InputRankError),
    ],
)
def test_what_an_engine_does_not_take_is_refused_before_it_sees_it(serve, x, error):
    runner = serve("affine")
    with pytest.raises(error):
        runner.check({"x": x})
    good = {"x": torch.zeros(1, 4)}
    found = runner.answer([good, {"x": x}, good])
    assert isinstance(found[1], error)
    assert found[0]["y"].tolist() == found[2]["y"].tolist() == [[1.0] * 4]


def test_engines_that_cannot_be_batched(serve):
    with pytest.raises(
        ConfigError, match="pair leaves open axis 1 of 'a'; expected buckets for it, or what to prepare"
    ):
        serve("pair")
    with pytest.raises(ConfigError, match="reads 'stop' on the host, and its values are sizes"):
        serve("head")
    assert serve("pair", prepare=({"a": (1, 5), "b": (1, 5)},)).spec.inputs[0].shape == (-1, 5)


def test_answers_that_differ_each_time_are_not_put_together(serve):
    runner = serve("unsteady", rows=[1, 4], prepare=({"x": (1,)},))
    assert all("answers differently each time" in why for why in runner.held.values())
