"""``graphcache doctor`` on a device: the canary runs on CUDA graphs, and finds memory that is not a graph's own."""

from __future__ import annotations

import gc
import json
import math

import pytest
import torch
from click.testing import CliRunner

from graphcache.cli import canary as cage
from graphcache.cli import main
from graphcache.cli.canary import Products, canary, overwrite

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


@pytest.fixture
def device():
    return torch.device("cuda", torch.cuda.current_device())


def test_the_command_on_this_device():
    found = CliRunner().invoke(main, ["doctor", "--json"])
    assert found.exit_code == 0, found.output
    checks = {each["check"]: each for each in json.loads(found.stdout)["checks"]}
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    assert checks["versions"]["seen"].endswith(f"(built for CUDA {torch.version.cuda})")
    assert f"{name}, compute capability {major}.{minor}" in checks["CUDA devices"]["seen"]
    assert "the driver serves CUDA up to " in checks["CUDA devices"]["seen"]
    assert checks["cuda-python"]["verdict"] == "ok"
    rtx = checks["TensorRT"]["seen"].startswith("tensorrt_rtx")
    meant = (major, minor) == (7, 5) or major in (8, 12)
    assert (checks["TensorRT"]["verdict"] == "warning") == (rtx and not meant)
    assert checks["canary"]["verdict"] == "ok"
    assert checks["canary"]["seen"].startswith(f"CUDA graphs on {name}: 3 graphs evicted")


def test_every_answer_is_a_replay_on_the_device(device):
    for _ in range(3):
        found = canary(device)
        assert (found.info.hits, found.info.captures, found.wrong, found.reasons) == (found.asked, 4, [], {})


def test_much_of_the_free_memory_is_overwritten_and_given_back(device):
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    taken = overwrite(device)
    free, _ = torch.cuda.mem_get_info(device)
    assert sum(block.nbytes for block in taken) >= min(1 << 29, free // 8)
    assert all(math.isnan(block[0]) and math.isnan(block[-1]) for block in taken)
    del taken
    assert torch.cuda.memory_allocated(device) == before


def test_memory_that_graphs_still_read_is_found_when_overwritten(monkeypatch, device):
    made = []
    make = Products.__init__
    monkeypatch.setattr(Products, "__init__", lambda self, generator: (make(self, generator), made.append(self))[0])

    def damaging(where):
        for module in made:
            module.weights[1].fill_(float("nan"))
        return overwrite(where)

    monkeypatch.setattr(cage, "overwrite", damaging)
    found = canary(device)
    assert (found.info.hits, len(found.wrong)) == (3, 3)
    assert CliRunner().invoke(main, ["doctor"]).exit_code == 3


def test_a_replay_that_writes_into_memory_of_others_is_found(monkeypatch, device):
    def stained(where):
        taken = overwrite(where)
        taken[-1][-1:].zero_()
        return taken

    monkeypatch.setattr(cage, "overwrite", stained)
    assert [each.split(": ")[1] for each in canary(device).wrong] == [
        "replays wrote into 1 blocks of memory that are not theirs"
    ] * 2
