"""What a deployment is told before any process is started for it."""

from __future__ import annotations

import importlib.util
import json
import pickle
import socket
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from graphcache.cli import main
from graphcache.errors import ConfigError, ExtraNotFoundError, ServingError
from graphcache.serving.deployment import deployment
from graphcache.serving.settings import Settings, from_folder
from tests.serving import nets

pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning")
with_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra ray is not installed")


def test_ray_is_not_imported_before_it_is_needed():
    imports = "import graphcache.serving.deployment, graphcache.cli"
    code = f"import sys; {imports}; print([name for name in ('ray', 'starlette') if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    with pytest.raises(ExtraNotFoundError, match=r'serving on Ray needs ray .*pip install "graphcache\[ray\]"'):
        deployment(nets.first)


@with_ray
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_replicas": 0}, "num_replicas=0: expected a whole number, 1 or more"),
        ({"num_replicas": "2"}, "num_replicas='2': expected a whole number"),
        ({"num_fronts": 0}, "num_fronts=0: expected a whole number, 1 or more"),
        ({"batch_wait_timeout_s": -1}, "batch_wait_timeout_s=-1: expected seconds from 0 to 60"),
        ({"batch_wait_timeout_s": True}, "batch_wait_timeout_s=True: expected seconds from 0 to 60"),
        ({"batch_wait_timeout_s": float("nan")}, "batch_wait_timeout_s=nan"),
        ({"max_batch_size": 0}, "max_batch_size=0"),
        ({"config": {"isolation": "magic"}}, "isolation='magic' is not an option"),
        ({"prepare": [5]}, "prepare=[5]: expected requests"),
        ({"token": "two words"}, "token is of type str"),
        ({"replicas": 2}, "'replicas' is no option of deployment; expected fields of Scale or Settings"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError) as caught:
        deployment(nets.first, **options)
    assert message in str(caught.value)


@with_ray
def test_no_model_at_all():
    with pytest.raises(ConfigError, match=r"model=\{\}: expected at least one"):
        deployment({})


@with_ray
def test_a_port_that_is_taken_is_told_before_ray_starts():
    from graphcache.serving.server import ray_here

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        expected = rf"127\.0\.0\.1:{port} cannot be served \(.*\); choose another port"
        with pytest.raises(ServingError, match=expected), ray_here(port=port):
            raise AssertionError("it began")


def test_a_folder_of_models(tmp_path):
    for version in (2, 10):
        (tmp_path / "policy" / str(version)).mkdir(parents=True)
        (tmp_path / "policy" / str(version) / "model.engine").write_bytes(b"engine")
    config = {
        "options": {"max_graphs": 7},
        "buckets": {"x": {"0": [1, 8]}},
        "prepare": [{"x": [1, 64]}],
    }
    (tmp_path / "policy" / "config.json").write_text(json.dumps(config))
    (tmp_path / "detector.gcache").write_bytes(b"package")
    found = from_folder(tmp_path, {"max_batch_size": 8})
    assert set(found) == {"policy", "detector"}
    policy = found["policy"]
    assert (policy.version, policy.name, policy.max_batch_size) == (10, "policy", 8)
    assert policy.source.endswith("10/model.engine")
    assert (policy.config, policy.buckets, policy.prepare) == ({"max_graphs": 7}, {"x": {0: [1, 8]}}, ({"x": (1, 64)},))
    assert found["detector"].version == 1


def test_folders_that_cannot_be_served(tmp_path):
    with pytest.raises(ServingError, match="holds no models; expected NAME/1/model"):
        from_folder(tmp_path, {})
    (tmp_path / "policy" / "1").mkdir(parents=True)
    (tmp_path / "policy" / "1" / "model.engine").write_bytes(b"engine")
    (tmp_path / "policy" / "config.json").write_text("[")
    with pytest.raises(ServingError, match="is no JSON that could be read"):
        from_folder(tmp_path, {})
    if not torch.cuda.is_available():
        found = CliRunner().invoke(main, ["serve", str(tmp_path)])
        assert (found.exit_code, found.stdout) == (1, "")
        assert "needs a CUDA device" in found.stderr


def test_settings_travel():
    made = Settings(nets.first, rows=[1, 2], prepare=({"x": torch.zeros(1, 8)},), config={"max_graphs": 3})
    again = pickle.loads(pickle.dumps(made))
    assert (again.source, again.rows, again.config, again.name) == (nets.first, [1, 2], {"max_graphs": 3}, "first")
