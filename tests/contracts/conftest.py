"""TensorRT and the driver are the stand-ins; everything else in this folder uses public names only."""

import contextvars

import pytest

import graphcache
from graphcache import EngineModule
from graphcache.buckets import padder, padding
from graphcache.export import compiling
from tests.engines.fake_tensorrt import IO, NETWORKS, Network, serialize
from tests.standins import engines


@pytest.fixture
def fake(monkeypatch):
    """The stand-ins in the place of TensorRT and of the driver."""
    with engines(monkeypatch) as fake:
        for each in (padder, padding):
            monkeypatch.setattr(each, "torch", fake)
        yield fake


@pytest.fixture
def load(fake):
    """Loads an engine of :mod:`tests.engines.fake_tensorrt` by the name of its network."""

    def load(network, **options):
        if options:
            return EngineModule(serialize(network), name=network, **options)
        return graphcache.load(serialize(network), name=network)

    return load


@pytest.fixture
def rows(fake):
    """Makes device tensors of four columns, for the engine ``affine``."""

    def rows(count, start=0.0):
        return fake.driver.heap.tensor([[start + row + column for column in range(4)] for row in range(count)])

    return rows


@pytest.fixture
def numbers(fake):
    """Makes device tensors of one dimension."""
    return lambda *values: fake.driver.heap.tensor(values)


@pytest.fixture
def in_own_context():
    """Runs a function whose modes end with it."""
    return lambda function: contextvars.copy_context().run(function)


@pytest.fixture
def builds(monkeypatch, tmp_path):
    """Puts a builder in place whose engines compute a function, whatever the model; gives the shapes it was asked for.

    The stand-in of TensorRT has none.
    """
    onnx = pytest.importorskip("onnx", reason="compile needs the extra onnx")
    pytest.importorskip("onnxscript", reason="compile needs the extra onnx")
    monkeypatch.setenv("GRAPHCACHE_CACHE_DIR", str(tmp_path))

    def install(function):
        asked = []

        def build(model, **options):
            graph = onnx.load_from_string(model).graph
            x, y = graph.input[0].name, graph.output[0].name
            asked.append(options["shapes"])
            ranges = ((options["shapes"] or {x: ((2, 4),) * 3})[x],)
            io = IO(x, True, (-1, 4), ranges=ranges), IO(y, False, (-1, 4))
            made = Network(io, lambda shapes, _: {y: shapes[x]}, lambda given: {y: function(given[x])})
            monkeypatch.setitem(NETWORKS, "made", made)
            return serialize("made")

        monkeypatch.setattr(compiling, "build", build)
        return asked

    with engines(monkeypatch, streams=False):
        yield install
