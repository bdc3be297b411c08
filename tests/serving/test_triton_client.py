"""What Triton's own client says to a real server on the loopback."""

from __future__ import annotations

import threading

import pytest
import torch

import graphcache
from graphcache.serving.app import make_app
from graphcache.serving.limits import Limits
from graphcache.serving.local import LocalBackend
from graphcache.serving.protocol.dtypes import DTYPES
from tests.serving.asgi import served
from tests.serving.models import ECHO, POLICY, Echo, Held, policy

np = pytest.importorskip("numpy")
pytest.importorskip("starlette")
client_of = pytest.importorskip("tritonclient.http")

TOKEN = "a.token"


@pytest.fixture(scope="module")
def server():
    """A wrapped model and one of all datatypes, behind a token."""
    torch.manual_seed(0)
    module = policy()
    fast = graphcache.wrap(module)
    with LocalBackend({"policy": fast, "echo": Echo()}, specs={"policy": POLICY, "echo": ECHO}) as backend:
        backend.prepare("policy", (torch.zeros(2, 4),))
        backend.prepare("echo")
        with served(make_app(backend, limits=Limits(max_request_bytes=100_000), token=TOKEN)) as address:
            yield address, module, fast


@pytest.fixture
def client(server):
    with client_of.InferenceServerClient("{}:{}".format(*server[0])) as made:
        yield made


def auth():
    """New ones each time: the client adds its own to what it is given."""
    return {"Authorization": f"Bearer {TOKEN}"}


def given(name, array, datatype, *, binary=True):
    made = client_of.InferInput(name, list(array.shape), datatype)
    return made.set_data_from_numpy(array, binary_data=binary)


def wanted(*names, binary=True):
    return [client_of.InferRequestedOutput(name, binary_data=binary) for name in names]


def test_health_and_metadata(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("policy", headers=auth())
    assert client.is_model_ready("policy", "1", headers=auth())
    assert not client.is_model_ready("other", headers=auth())
    assert not client.is_model_ready("policy", "2", headers=auth())
    assert client.get_server_metadata(headers=auth()) == {
        "name": "graphcache",
        "version": graphcache.__version__,
        "extensions": ["binary_tensor_data", "model_configuration", "statistics"],
    }
    assert client.get_model_metadata("policy", headers=auth()) == {
        "name": "policy",
        "versions": ["1"],
        "platform": "pytorch",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [
            {"name": "action", "datatype": "FP32", "shape": [-1, 2]},
            {"name": "best", "datatype": "INT64", "shape": [-1]},
        ],
    }
    assert [each["name"] for each in client.get_model_repository_index(headers=auth())] == ["policy", "echo"]


def test_what_a_load_generator_asks_for(client):
    assert client.get_model_config("policy", headers=auth()) == {
        "name": "policy",
        "platform": "pytorch",
        "max_batch_size": 0,
        "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [-1, 4]}],
        "output": [
            {"name": "action", "data_type": "TYPE_FP32", "dims": [-1, 2]},
            {"name": "best", "data_type": "TYPE_INT64", "dims": [-1]},
        ],
    }
    [before] = client.get_inference_statistics("policy", headers=auth())["model_stats"]
    for _ in range(3):
        client.infer("policy", [given("x", np.zeros((2, 4), np.float32), "FP32")], headers=auth())
    [after] = client.get_inference_statistics("policy", "1", headers=auth())["model_stats"]
    assert after["inference_count"] - before["inference_count"] == 3
    stats = after["inference_stats"]
    assert 0 < stats["compute_infer"]["ns"] < stats["success"]["ns"]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_answers_are_those_of_the_module(server, client, batch, binary):
    _, module, fast = server
    x = torch.randn(batch, 4)
    found = client.infer(
        "policy",
        [given("x", x.numpy(), "FP32", binary=binary)],
        outputs=wanted("action", "best", binary=binary),
        request_id="seven",
        headers=auth(),
    )
    action, best = module(x)
    assert torch.equal(torch.from_numpy(found.as_numpy("action").copy()), action)
    assert torch.equal(torch.from_numpy(found.as_numpy("best").copy()), best)
    assert found.get_response()["id"] == "seven"
    assert found.get_response()["model_version"] == "1"
    assert fast.cache_info().captures >= 1


def test_graphs_answer(server, client):
    fast = server[2]
    before = fast.cache_info()
    for _ in range(3):
        client.infer("policy", [given("x", np.zeros((2, 4), np.float32), "FP32")], headers=auth())
    after = fast.cache_info()
    assert (after.hits - before.hits, after.captures - before.captures) == (3, 0)


def test_outputs_are_chosen_and_all_are_given_else(client):
    x = given("x", np.ones((1, 4), np.float32), "FP32")
    assert client.infer("policy", [x], outputs=wanted("best"), headers=auth()).as_numpy("action") is None
    found = client.infer("policy", [x], headers=auth())
    assert (found.as_numpy("action").shape, found.as_numpy("best").shape) == ((1, 2), (1,))


@pytest.mark.parametrize("sent", ["gzip", "deflate", None])
@pytest.mark.parametrize("received", ["gzip", "deflate", None])
def test_both_ways_may_be_compressed(server, client, sent, received):
    x = torch.randn(300, 4)
    found = client.infer(
        "policy",
        [given("x", x.numpy(), "FP32")],
        headers=auth(),
        request_compression_algorithm=sent,
        response_compression_algorithm=received,
    )
    assert torch.equal(torch.from_numpy(found.as_numpy("action").copy()), server[1](x)[0])


def test_every_datatype_goes_and_comes_back(client):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    kinds = {"BOOL": np.bool_, "BF16": ml_dtypes.bfloat16}
    for letter, name in (("FP", "float"), ("INT", "int"), ("UINT", "uint")):
        kinds |= {f"{letter}{bits}": getattr(np, f"{name}{bits}", None) for bits in (8, 16, 32, 64)}
    arrays = {name: np.array([[0, 1, 1], [1, 0, 127]], dtype=np.int8).astype(kinds[name]) for name in DTYPES}
    found = client.infer("echo", [given(name, each, name) for name, each in arrays.items()], headers=auth())
    for name, each in arrays.items():
        assert found.as_numpy(f"{name}_OUT").dtype == each.dtype
        assert np.array_equal(found.as_numpy(f"{name}_OUT"), each)


def test_requests_may_mix_binary_data_and_json(client):
    arrays = {name: np.array([[3]]) for name in ECHO_KINDS}
    inputs = [
        given(name, each.astype(ECHO_KINDS[name]), name, binary=index % 2 == 0)
        for index, (name, each) in enumerate(arrays.items())
    ]
    names = [f"{name}_OUT" for name in arrays]
    outputs = [wanted(name, binary=index % 3 == 0)[0] for index, name in enumerate(names)]
    rest = [given("BOOL", np.array([[True]]), "BOOL", binary=False), bf16()]
    found = client.infer("echo", inputs + rest, outputs=outputs, headers=auth())
    assert [found.as_numpy(name).item() for name in names] == [3] * len(names)


ECHO_KINDS = {
    **{f"{sign}INT{bits}": f"{sign.lower()}int{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": f"float{bits}" for bits in (16, 32, 64)},
}


def bf16():
    return given("BF16", np.array([[3]], pytest.importorskip("ml_dtypes").bfloat16), "BF16")


@pytest.mark.parametrize(
    ("model", "shape", "datatype", "status", "message"),
    [
        ("other", (1, 4), "FP32", 404, "there is no model 'other'; the models are policy, echo"),
        ("policy", (1, 5), "FP32", 400, "input 'x' of policy has the shape [1, 5]; expected [-1, 4]"),
        ("policy", (1, 4), "FP64", 400, "input 'x' of policy has the datatype FP64; expected FP32"),
        ("policy", (10_000, 4), "FP32", 413, "the body has more than 100000 bytes, which is the limit"),
    ],
)
def test_errors_come_as_the_client_expects_them(client, model, shape, datatype, status, message):
    array = np.zeros(shape, np.float64 if datatype == "FP64" else np.float32)
    with pytest.raises(client_of.InferenceServerException) as raised:
        client.infer(model, [given("x", array, datatype)], headers=auth())
    assert raised.value.status() == str(status)
    assert raised.value.message().startswith(message)


@pytest.mark.parametrize("headers", [None, {"Authorization": "Bearer another"}])
def test_without_the_token_only_health_is_told(client, headers):
    assert client.is_server_live(headers=headers)
    assert client.is_server_ready(headers=headers)
    with pytest.raises(client_of.InferenceServerException) as raised:
        client.get_server_metadata(headers=headers)
    assert raised.value.status() == "401"
    assert "token" in raised.value.message()


def test_a_full_server_says_so_at_once_and_answers_what_it_took():
    backend = Held()
    answers = []

    def ask():
        with client_of.InferenceServerClient(where) as client:
            answers.append(client.infer("held", [given("x", np.zeros(3, np.float32), "FP32")]).as_numpy("y").tolist())

    with served(make_app(backend, limits=Limits(max_concurrency=1, max_queue=0))) as address:
        where = "{}:{}".format(*address)
        first = threading.Thread(target=ask)
        first.start()
        assert backend.begun.acquire(timeout=20)
        with pytest.raises(client_of.InferenceServerException) as raised:
            ask()
        assert raised.value.status() == "503"
        assert raised.value.message().startswith("1 requests are being answered, which is the limit")
        backend.go.set()
        first.join()
        ask()
    assert answers == [[1, 1, 1]] * 2
