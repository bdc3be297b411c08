"""What a server has in front of an engine, on a device and without the server: batches, buckets, many callers."""

import asyncio
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from graphcache import Axis
from graphcache.errors import ConfigError, InputDtypeError, InputRankError, ProfileRangeError
from graphcache.serving.gather import Gather
from graphcache.serving.runner import Runner
from graphcache.serving.settings import Settings

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
networks = pytest.importorskip("tests.gpu.networks")


def close(got, wanted, bound=5e-3):
    got, wanted = got.double().cpu(), wanted.double().cpu()
    return got.shape == wanted.shape and bool((got - wanted).norm() <= bound * wanted.norm())


@pytest.fixture
def serve(engine_bytes):
    """Runners of engines by network name, closed afterwards."""
    runners = []

    def get(name, **options):
        runners.append(Runner(Settings(engine_bytes(name), name=name, **options)))
        return runners[-1]

    yield get
    for runner in runners:
        runner.close()


@pytest.fixture
def mlp(serve):
    return serve("mlp8", rows=[1, 4, 16, 64], max_batch_size=64)


def requests(count, seed, most=6):
    """Rows that differ from request to request, so that somebody else's answer is a wrong one."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(draw.randint(1, most), networks.SIZE, generator=generator)} for _ in range(count)]


def is_own(request, answer):
    return list(answer) == ["y"] and close(answer["y"], networks.mlp8_reference(request["x"]))


def test_nothing_of_ray_is_needed():
    code = "import sys; sys.modules['ray'] = None; import graphcache.serving.gather, graphcache.serving.runner"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_engine_tells_what_it_takes_and_is_captured_before_the_first_request(mlp):
    assert (mlp.spec.platform, mlp.spec.inputs[0].shape, mlp.spec.outputs[0].shape) == ("tensorrt", (-1, 64), (-1, 64))
    assert (mlp.spec.inputs[0].name, mlp.spec.outputs[0].name) == ("x", "y")
    assert mlp.info().captures == 4
    assert list(mlp.held.values()) == [""], mlp.held


def test_batches_have_captured_sizes_and_answers_equal_eager(mlp):
    given = requests(200, 0)
    answers = mlp.answer(given)
    for request, answer in zip(given, answers, strict=True):
        assert is_own(request, answer)
        assert answer["y"].device.type == "cpu"
        assert close(answer["y"], mlp.module(request["x"].cuda()))
    info = mlp.info()
    assert (info.captures, info.eager) == (4, {})
    assert info.hits == sum(mlp.counts.batches.values()) < 30
    assert set(mlp.counts.batches) <= {1, 4, 16, 64}


def test_32_threads_get_their_own(mlp):
    with Gather(mlp, wait_s=0.0005) as gather, ThreadPoolExecutor(32) as pool:

        def work(index):
            return all(is_own(each, gather.submit(each).result(60)) for each in requests(25, index))

        assert all(pool.map(work, range(32)))
    assert mlp.info().eager == {}
    assert sum(mlp.counts.batches.values()) < 800, "nothing went together"


def test_32_tasks_get_their_own(mlp):
    async def all_of_them(gather):
        async def work(index):
            for each in requests(25, 100 + index):
                assert is_own(each, await asyncio.wrap_future(gather.submit(each)))

        await asyncio.gather(*(work(index) for index in range(32)))

    with Gather(mlp) as gather:
        asyncio.run(all_of_them(gather))
    assert (mlp.counts.requests, mlp.counts.failed, mlp.info().eager) == (800, 0, {})


def test_bad_requests_fail_alone_and_never_reach_the_engine(mlp):
    good = requests(6, 1)
    bad = [
        ({"x": torch.zeros(1, 63)}, ProfileRangeError),
        ({"x": torch.zeros(65, 64)}, ProfileRangeError),
        ({"x": torch.zeros(1, 64).double()}, InputDtypeError),
        ({"x": torch.zeros(64)}, InputRankError),
        ({"x": torch.zeros(0, 64)}, ProfileRangeError),
    ]
    answers = mlp.answer(
        [each for pair in zip(good, [*(each for each, _ in bad), good[0]], strict=True) for each in pair]
    )
    assert all(is_own(request, answer) for request, answer in zip(good, answers[::2], strict=True))
    assert [type(each) for each in answers[1:-1:2]] == [error for _, error in bad]
    assert mlp.counts.failed == 5


def test_two_axes_and_two_outputs(serve):
    """What has two axes with buckets is padded request by request, and cropped likewise."""
    rows, columns = Axis([4, 16, 32], name="n"), Axis([8, 32], name="m")
    runner = serve("two_outputs", buckets={name: {0: rows, 1: columns} for name in ("a", "b")})
    assert len(runner.held) == 2
    draw = random.Random(3)
    given = []
    for _ in range(100):
        shape = draw.randint(1, 5), draw.randint(1, 32)
        given.append({"a": torch.randn(shape), "b": torch.randn(shape)})
    for request, answer in zip(given, runner.answer(given), strict=True):
        wanted = (request["a"] + request["b"], request["a"] * request["b"])
        for got, right in zip(answer.values(), wanted, strict=True):
            assert torch.equal(got, right)
    assert runner.info().eager == {}
    assert sum(runner.counts.batches.values()) < 30


def test_a_new_engine_takes_over_beside_the_old_one(serve, mlp):
    given = requests(20, 4)
    other = serve("mlp8", rows=[8], max_batch_size=8)
    assert all(is_own(*pair) for pair in zip(given, mlp.answer(given), strict=True))
    mlp.close()
    assert all(is_own(*pair) for pair in zip(given, other.answer(given), strict=True))


def test_rows_that_no_profile_takes(engine_bytes):
    with pytest.raises(ConfigError, match="the size 65; expected one that a profile takes"):
        Runner(Settings(engine_bytes("mlp8"), rows=[8, 65], max_batch_size=128))
