"""Everything here needs a CUDA device and a TensorRT that can build and run on it."""

import pytest
import torch

import graphcache
from tests.shared import alone


def pytest_collection_modifyitems(items):
    for item in items:
        if "/gpu/" in str(item.path):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="module", autouse=True)
def one_at_a_time():
    """No two workers use the device at once: tests count its memory and its time."""
    with alone("gpu"):
        yield


@pytest.fixture(scope="session")
def engine_bytes():
    """Engine bytes by network name, each built once."""
    networks = pytest.importorskip("tests.gpu.networks")
    built = {}

    def get(name):
        if name not in built:
            onnx_model, shapes, *options = getattr(networks, name)()
            built[name] = graphcache.build(onnx_model, shapes=shapes, **(options[0] if options else {}))
        return built[name]

    return get


@pytest.fixture
def load(engine_bytes):
    """Loads engines by network name and closes them afterwards."""
    modules = []

    def get(name):
        modules.append(graphcache.load(engine_bytes(name), name=name))
        return modules[-1]

    yield get
    for module in modules:
        module.close()


@pytest.fixture(autouse=True)
def device_is_sound(request):
    """After every test the device still computes, it is the current one, and nothing is left capturing."""
    yield
    if torch.cuda.is_available():
        current = torch.cuda.current_device()
        torch.cuda.set_device(0)
        assert current == 0
        torch.cuda.synchronize()
        assert not torch.cuda.is_current_stream_capturing()
        x = torch.arange(8.0, device="cuda")
        assert (x * 2).sum().item() == 56.0
