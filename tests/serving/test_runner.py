"""One model behind graphs: what is captured, what is put together, what is not, and that answers are right."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphcache
from graphcache import Axis, Mask
from graphcache.errors import (
    ClosedError,
    ConfigError,
    InputDtypeError,
    InputRankError,
    ProfileRangeError,
    ServingError,
)
from graphcache.serving.runner import Runner
from graphcache.serving.settings import Settings
from tests.helpers import in_threads
from tests.serving import nets

X = {"x": torch.zeros(1, nets.WIDTH)}


@pytest.fixture
def make():
    runners = []

    def made(source, **options):
        runners.append(Runner(Settings(source, **options)))
        return runners[-1]

    yield made
    for runner in runners:
        runner.close()


def checked(count, start=0):
    found = []
    for index in range(start, start + count):
        x = torch.randn(1 + index % 3, nets.WIDTH)
        x[:, 0] = torch.arange(len(x)) / 4 + index
        found.append({"x": x})
    return found


def test_everything_is_captured_before_the_first_request_and_every_call_is_a_hit(make):
    runner = make(nets.first, rows=[1, 2, 4, 8], prepare=(X,))
    assert runner.info().captures == 4
    requests = checked(50)
    answers = runner.answer(requests)
    module = nets.Checked()
    for request, answer in zip(requests, answers, strict=True):
        wanted = module(request["x"])
        assert torch.equal(answer["check"], wanted["check"])
        assert torch.allclose(answer["y"], wanted["y"], atol=1e-5)
    info = runner.info()
    assert (info.captures, info.eager) == (4, {})
    assert info.hits == sum(runner.counts.batches.values())
    assert set(runner.counts.batches) <= {1, 2, 4, 8}
    assert info.hits < 50


def test_what_it_says_of_itself(make):
    spec = make(nets.first, name="net", rows=[1, 4], prepare=(X,)).spec
    assert (spec.name, spec.versions, spec.platform) == ("net", ("1",), "pytorch")
    assert [(each.name, each.dtype, each.shape) for each in spec.inputs] == [("x", "float32", (-1, 8))]
    assert [(each.name, each.shape) for each in spec.outputs] == [
        ("y", (-1, 4)),
        ("check", (-1, 1)),
        ("version", (-1, 1)),
    ]
    spec = make(nets.Sums, buckets={"x": {1: Axis([4, 8], fill=0)}}, prepare=({"x": (1, 4)},)).spec
    assert (spec.name, spec.inputs[0].shape, [each.shape for each in spec.outputs]) == (
        "Sums",
        (-1, -1),
        [(-1,), (-1,)],
    )


def test_inputs_may_come_in_any_order(make):
    class Minus(nn.Module):
        def forward(self, b, a):
            return a - b

    runner = make(Minus, rows=[1, 2], prepare=({"b": (1, 3), "a": (1, 3)},))
    a, b = torch.full((1, 3), 5.0), torch.full((1, 3), 2.0)
    for request in ({"a": a, "b": b}, {"b": b, "a": a}):
        assert runner.answer([request])[0]["output_0"].tolist() == [[3.0, 3.0, 3.0]]
    assert (runner.info().hits, runner.info().eager) == (2, {})
    assert [each.name for each in runner.spec.inputs] == ["b", "a"]


def test_rows_that_depend_on_one_another_are_never_put_together(make, caplog):
    runner = make(nets.Running, rows=[1, 4], prepare=({"x": (1, 3)},))
    assert "output 'output_0' of a request depends on the requests beside it" in caplog.text
    requests = [{"x": torch.full((2, 3), float(each))} for each in range(5)]
    for each, answer in enumerate(runner.answer(requests)):
        assert answer["output_0"].tolist() == [[each] * 3, [2 * each] * 3]
    assert (runner.counts.apart, dict(runner.counts.batches)) == (5, {})


def test_an_axis_that_must_not_be_padded_is_not(make, caplog):
    class Mean(nn.Module):
        def forward(self, x):
            return x.mean(1)

    runner = make(Mean, rows=[1, 4], buckets={"x": {1: [4, 8]}}, prepare=({"x": (1, 4)},))
    assert "padding x[1] from" in caplog.text
    requests = [{"x": torch.full((1, length), 2.0)} for length in (3, 4, 7)]
    assert [answer["output_0"].tolist() for answer in runner.answer(requests)] == [[2.0]] * 3


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(100, 16).requires_grad_(False)

    def forward(self, ids, *, mask=None):
        weights = torch.ones_like(ids, dtype=torch.float32) if mask is None else mask.float()
        hidden = self.embedding(ids) * weights[..., None]
        return {"tags": hidden.tanh(), "mean": hidden.sum(1) / weights.sum(1, keepdim=True)}


@pytest.fixture(scope="module")
def tagger():
    batch, length = Axis([1, 4, 16], name="batch"), Axis([4, 16], name="length")
    buckets = {"ids": {0: batch, 1: length}, "mask": Mask(["batch", "length"])}
    prepare = tuple({"ids": torch.zeros(1, size, dtype=torch.int64)} for size in (4, 16))
    with_mask = Runner(Settings(Tagger, buckets=buckets, prepare=prepare))
    yield with_mask
    with_mask.close()


@given(st.lists(st.tuples(st.integers(1, 16), st.integers(1, 16)), min_size=1, max_size=12), st.integers(0, 99))
@settings(max_examples=40)
def test_sequences_of_any_length_with_a_mask_answer_as_alone(tagger, drawn, seed):
    generator = torch.Generator().manual_seed(seed)
    requests = [{"ids": torch.randint(100, shape, generator=generator)} for shape in drawn]
    module = Tagger()
    for request, answer in zip(requests, tagger.answer(requests), strict=True):
        wanted = module(**request)
        assert answer["tags"].shape == wanted["tags"].shape
        assert torch.allclose(answer["tags"], wanted["tags"], atol=1e-5)
        assert torch.allclose(answer["mean"], wanted["mean"], atol=1e-5)
    assert tagger.info().eager == {}


def test_a_value_that_the_module_refuses_fails_alone(make):
    runner = make(nets.Lookup, rows=[1, 4, 8], prepare=({"ids": torch.zeros(1, 1, dtype=torch.int64)},))
    answers = runner.answer([{"ids": torch.tensor([[index]])} for index in (1, 2, 99, 4)])
    assert isinstance(answers[2], IndexError)
    assert [answers[place]["ids"].item() for place in (0, 1, 3)] == [1, 2, 4]
    assert (runner.counts.failed, runner.counts.apart) == (1, 4)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(1, 8, dtype=torch.float64), InputDtypeError, "is torch.float64; the model takes torch.float32"),
        (torch.zeros(1, 8, 1), InputRankError, "has 3 dimensions (1, 8, 1); the model takes (-1, 8)"),
        (torch.zeros(1, 9), ProfileRangeError, "has the shape (1, 9); the model takes (-1, 8)"),
        (torch.zeros(9, 8), ProfileRangeError, "more than its largest bucket, 8"),
    ],
)
def test_what_the_model_does_not_take(make, x, error, message):
    runner = make(nets.first, rows=[8], prepare=(X,))
    with pytest.raises(error) as caught:
        runner.check({"x": x})
    assert message in str(caught.value)
    bad, good = runner.answer([{"x": x}, {"x": torch.ones(1, 8)}])
    assert isinstance(bad, error)
    assert good["check"].item() == 4


def test_kinds_that_nobody_declared_are_answered_without_graphs(make):
    """An axis of any size, without buckets: clients could otherwise fill the cache with sizes that come once."""
    runner = make(nets.Sums, rows=[1, 4], prepare=({"x": (1, 4)}, {"x": (1, 6)}))
    assert runner.spec.inputs[0].shape == (-1, -1)
    captures = runner.info().captures
    answers = runner.answer([{"x": torch.ones(1, size)} for size in range(1, 30)])
    assert [answer["output_0"].item() for answer in answers] == list(range(1, 30))
    assert runner.info().captures == captures == 4
    assert len(runner.held) == 2


def test_kinds_that_were_not_used_for_long_make_room(make):
    runner = make(
        nets.Sums, rows=[1, 4], buckets={"x": {1: Axis([2, 4, 8], fill=0)}}, prepare=({"x": (1, 2)},), max_kinds=2
    )
    for length in (2, 3, 7, 2, 4):
        [answer] = runner.answer([{"x": torch.ones(1, length)}])
        assert answer["output_0"].item() == length
        assert len(runner.held) <= 2
    assert [shape for [(_, _, shape)] in runner.held] == [(2,), (4,)]


def test_a_package_brings_its_options_and_weights(tmp_path, make):
    with graphcache.wrap(nets.first(), max_graphs=99) as fast:
        fast.save(tmp_path / "net.gcache")
    runner = make(str(tmp_path / "net.gcache"), into=nets.second, rows=[1, 2], prepare=(X,))
    assert runner.name == "net"
    assert runner.fast.config.max_graphs == 99
    x = torch.randn(2, 8)
    # The code is that of the second, the weights are the same.
    assert torch.allclose(runner.answer([{"x": x}])[0]["y"], nets.Checked(2.0)(x)["y"], atol=1e-5)


def test_threads_get_their_own_answers(make):
    runner = make(nets.first, rows=[1, 2, 4, 8], prepare=(X,))

    def work(index):
        draw = random.Random(index)
        for turn in range(30):
            requests = checked(draw.randint(1, 6), 1000 * index + 10 * turn)
            for request, answer in zip(requests, runner.answer(requests), strict=True):
                assert torch.equal(answer["check"], request["x"][:, :1] * 3 + 1)

    in_threads(work, 8)


def test_a_closed_one_says_so_and_closes_after_the_call_that_is_under_way(make):
    inside, go = threading.Event(), threading.Event()

    class Slow(nn.Module):
        def forward(self, x):
            if threading.current_thread().name == "caller":
                inside.set()
                go.wait(60)
            return x + 1

    runner = make(Slow, rows=[1], prepare=({"x": (1, 2)},), config={"capture_in": "foreground"})
    runner.fast.clear()
    found = []
    caller = threading.Thread(target=lambda: found.extend(runner.answer([{"x": torch.ones(1, 2)}])), name="caller")
    caller.start()
    assert inside.wait(60)
    closer = threading.Thread(target=runner.close)
    closer.start()
    assert closer.is_alive()
    go.set()
    caller.join(60)
    closer.join(60)
    assert found[0]["output_0"].tolist() == [[2.0, 2.0]]
    runner.close()
    with pytest.raises(ClosedError, match="Slow is closed; load it again"):
        runner.answer([])


class Words(nn.Module):
    def forward(self, x):
        return {"x": x, "word": "no tensor"}


class Open(nn.Module):
    def forward(self, *args):
        return args[0]


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        (nets.first, {}, ConfigError, "first: a module does not say what it takes; expected prepare="),
        (nets.first, {"prepare": ({"x": 5},)}, ConfigError, "prepare['x']=5: expected a tensor, or a shape, with rows"),
        (nets.first, {"prepare": ({"x": ()},)}, ConfigError, "prepare['x']=(): expected a tensor, or a shape"),
        (
            nets.first,
            {"prepare": (X,), "rows": [64]},
            ConfigError,
            "max_batch_size=32: the smallest size of the rows is 64",
        ),
        (nets.first, {"prepare": (X,), "buckets": {"z": {1: [4]}}}, ConfigError, "no argument has this name"),
        (nets.first, {"prepare": (X,), "buckets": 5}, ConfigError, "buckets=5: expected sizes of the rows"),
        (nets.first, {"prepare": ({"x": (1, 5)},)}, RuntimeError, "mat1 and mat2 shapes cannot be multiplied"),
        (Words, {"prepare": ({"x": (1, 5)},)}, ConfigError, "answers with 'no tensor' as 'word'; expected tensors"),
        (Open, {"prepare": ({"x": (1, 5)},)}, ConfigError, "names no input; expected buckets="),
        (nets.broken, {}, ServingError, "raised OSError: no such weights; expected an nn.Module"),
        (lambda: 5, {}, ServingError, "gave an object of type int; expected an nn.Module"),
        (5, {}, ServingError, "5 is no model; expected an engine, a package, or a function of a module"),
        ("nowhere.nets:mlp", {}, ServingError, "nowhere.nets cannot be imported: ModuleNotFoundError"),
        ("nowhere.py:mlp", {}, ServingError, "there is no file nowhere.py"),
        ("tests.serving.nets:none", {}, ServingError, "tests.serving.nets has no 'none'; expected a function"),
    ],
)
def test_what_cannot_be_served(source, options, error, message):
    with pytest.raises(error) as caught:
        Runner(Settings(source, **options))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size=0: expected a whole number, 1 or more"),
        ({"max_kinds": True}, "max_kinds=True: expected a whole number"),
        ({"prepare": {"x": (1, 2)}}, "expected requests, each a mapping from input to shape"),
        ({"prepare": [5]}, "prepare=[5]: expected requests"),
        ({"name": 5}, "name=5: expected text"),
        ({"config": 5}, "config=5: expected options of graphcache.GraphConfig by name"),
        ({"config": {"buckets": {}}}, "config['buckets']: requests are padded before they are put together"),
        ({"config": {"max_graphs": 0}}, "max_graphs=0: expected a whole number"),
        ({"config": {"colour": 1}}, "unknown option 'colour'"),
    ],
)
def test_bad_settings_are_told_before_anything_is_loaded(options, message):
    with pytest.raises(ConfigError) as caught:
        Settings(nets.broken, **options)
    assert message in str(caught.value)
