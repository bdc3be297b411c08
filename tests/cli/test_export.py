"""``graphcache export``."""

import json

import pytest

import graphcache
from tests.engines.fake_tensorrt import serialize
from tests.standins import engines


@pytest.fixture
def fake(monkeypatch):
    with engines(monkeypatch) as fake:
        yield fake


@pytest.fixture
def package(fake, folder):
    graphcache.EngineModule(serialize("affine")).save(folder / "policy.gcache")
    return folder / "policy.gcache"


def test_a_folder_for_triton(cli, package, folder):
    found = cli("export", "triton", package, "--out", folder / "policy", "--shapes", "x:2x4", "--shapes", "x:3x4")
    assert found.exit_code == 0, found.stderr
    assert "policy: inputs: x float32[-1, 4]; outputs: y float32[-1, 4]. Signatures to prepare: 2." in found.stdout
    assert (folder / "policy" / "1" / "model.gcache").read_bytes() == package.read_bytes()
    assert r"\"prepare\": [{\"x\": [2, 4]}, {\"x\": [3, 4]}]" in (
        folder / "policy" / "config.pbtxt"
    ).read_text().replace(r"\042", r"\"")


def test_json(cli, package, folder):
    found = cli("export", "triton", package, "--out", "policy", "--json")
    assert json.loads(found.stdout) == {
        "folder": "policy",
        "name": "policy",
        "prepare": 0,
        "inputs": [{"name": "x", "dtype": "float32", "shape": [-1, 4]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": [-1, 4]}],
    }


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("policy.gcache",), 2, "Missing option '--out'"),
        (("policy.gcache", "--out", "."), 1, "is there already; choose another folder"),
        (("nothing.gcache", "--out", "p"), 1, "nothing.gcache cannot be read: No such file or directory"),
        (("nothing.engine", "--out", "p"), 1, "nothing.engine cannot be read (No such file or directory)"),
        (("policy.gcache", "--out", "p", "--shapes", "x:2x5"), 1, "the shape [2, 5] of 'x' does not fit [-1, 4]"),
        (("policy.gcache", "--out", "p", "--shapes", "z:2"), 1, "shapes name 'z', which is no input"),
        (("policy.gcache", "--out", "p", "--shapes", "x:[2,4]:float16"), 2, ""),
    ],
)
def test_what_cannot_be_exported(cli, package, folder, args, code, message):
    found = cli("export", "triton", *args)
    assert (found.exit_code, found.stdout) == (code, "")
    assert message in found.stderr
    assert not (folder / "p").exists()


def test_examples_are_right_but_for_the_gpu(cli, folder, package):
    help_ = cli("export", "triton", "--help")
    assert "graphcache export triton policy.gcache --out models/policy" in help_.stdout
    assert all(len(line) <= 80 for line in help_.stdout.splitlines())
    (folder / "models").mkdir()
    ran = cli("export", "triton", "policy.gcache", "--out", "models/policy", "--shapes", "x:1x4", "--shapes", "x:8x4")
    assert ran.exit_code == 0, ran.stderr
    assert {each.name for each in (folder / "models" / "policy").iterdir()} == {"1", "config.pbtxt"}
