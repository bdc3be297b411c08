"""Two GPUs: an engine and its graphs stay on theirs, whichever device is current; one thread for each."""

import os
import threading

import pytest
import torch
from torch import nn

import graphcache
from graphcache.errors import InputDeviceError
from tests.helpers import wrap_recorded

networks = pytest.importorskip("tests.gpu.networks")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
SIZE = 64


def mlp8(x):
    y = x.double().cpu()
    for weight in networks._weights(8):
        y = (y @ weight.double()).relu().softmax(-1)
    return y


def near(got, wanted):
    return bool((got.double().cpu() - wanted).norm() <= 5e-3 * wanted.norm())


def net(device):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(SIZE, SIZE), nn.GELU(), nn.LayerNorm(SIZE), nn.Linear(SIZE, SIZE))
    return layers.to(device).eval().requires_grad_(False)


@pytest.fixture
def engines(engine_bytes):
    made = []
    for index in range(torch.cuda.device_count()):
        with torch.cuda.device(index):
            made.append(graphcache.load(engine_bytes("mlp8"), name=f"mlp8 on {index}"))
    yield made
    for engine in made:
        engine.close()


@needs_two
@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("io", ["bind", "copy"])
def test_an_engine_answers_on_its_own_device_whichever_is_current(engines, current, io):
    for index, engine in enumerate(engines[:2]):
        device = torch.device("cuda", index)
        with wrap_recorded(engine, io=io) as fast, torch.cuda.device(current), torch.inference_mode():
            stream = torch.cuda.Stream(device)
            for rows in (3, 17, 3, 17, 3):
                x = torch.randn(rows, SIZE, device=device)
                y = fast(x)
                assert (y.device, torch.cuda.current_device()) == (device, current)
                assert near(y, mlp8(x))
                # Another stream of that device, ordered after the first.
                with torch.cuda.stream(stream):
                    stream.wait_stream(torch.cuda.default_stream(device))
                    z = fast(x)
                stream.synchronize()
                assert torch.equal(y, z)
            assert (fast.cache_info().captures, fast.cache_info().hits, fast.cache_info().eager) == (2, 8, {})
            with fast.session(torch.ones(2, SIZE, device=device)) as session:
                session.run()
                assert near(session.outputs, mlp8(torch.ones(2, SIZE)))


@needs_two
def test_inputs_of_another_device_are_refused_or_moved(engines):
    x = torch.randn(4, SIZE, device="cuda:0")
    with graphcache.wrap(engines[1]) as fast, torch.inference_mode():
        for module in (engines[1], fast):
            with pytest.raises(InputDeviceError, match=r"cuda:0"):
                module(x)
        with graphcache.runtime.set_multi_device_safe_mode(True):
            for module in (engines[1], fast, fast):
                y = module(x)
                assert y.device == torch.device("cuda:1")
                assert near(y, mlp8(x))
        assert fast.cache_info().hits == 1
        with pytest.raises(InputDeviceError):
            fast(x)


@needs_two
@pytest.mark.parametrize("kind", ["engine", "torch"])
def test_a_thread_for_each_device(engines, kind):
    """As Torch-TensorRT's deployment guide has it; here the threads capture and replay at the same time."""
    devices = [torch.device("cuda", index) for index in range(2)]
    modules = engines if kind == "engine" else [net(device) for device in devices]
    on_cpu = net("cpu")
    reference = mlp8 if kind == "engine" else (lambda x: on_cpu(x.cpu()).double())
    wrong, start = [], threading.Barrier(2)

    def work(index):
        with torch.cuda.device(index), torch.inference_mode(), graphcache.wrap(modules[index], max_graphs=3) as fast:
            start.wait()
            generator = torch.Generator(devices[index]).manual_seed(index)
            for turn in range(120):
                x = torch.randn(1 + (turn * 7) % 5, SIZE, device=devices[index], generator=generator)
                y = fast(x)
                if y.device != devices[index] or not near(y, reference(x)):
                    wrong.append((index, turn))
            if fast.cache_info().eager or not fast.cache_info().evictions:
                wrong.append((index, fast.cache_info()))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@needs_two
def test_one_module_that_moves(engines):
    """The place of its parameters is looked at, so graphs of before are dropped."""
    module, reference = net("cuda:0"), net("cpu")
    with graphcache.wrap(module) as fast, torch.inference_mode():
        for device in ("cuda:0", "cuda:1", "cuda:0"):
            module.to(device)
            with torch.cuda.device(device):
                for _ in range(3):
                    x = torch.randn(4, SIZE, device=device)
                    y = fast(x)
                    assert y.device == torch.device(device)
                    assert near(y, reference(x.cpu()).double())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_is_told_that_cuda_is_gone(load):
    """A driver call in the child answers NOT_INITIALIZED; a replay must say so, not return what was in the buffer."""
    engine = load("mlp8")
    x = torch.randn(4, SIZE, device="cuda")
    with graphcache.wrap(engine) as fast, torch.inference_mode():
        for _ in range(2):
            fast(x)
        torch.cuda.synchronize()
        read, write = os.pipe()
        child = os.fork()
        if not child:
            try:
                fast(x)
                said = "no error"
            except BaseException as error:
                said = f"{type(error).__name__}: {error}"
            os.write(write, said.encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            said = pipe.read()
        os.waitpid(child, 0)
        # The driver, or PyTorch where it allocates the answer first.
        assert said.startswith(("CudaError: ", "RuntimeError: Cannot re-init", "AcceleratorError: CUDA error: init")), (
            said
        )
        assert "spawn" in said
        assert near(fast(x), mlp8(x))
