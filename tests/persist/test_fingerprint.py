"""What tells one environment from another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphcache
from graphcache.errors import CudaError
from graphcache.modules.wrapped import device_of
from graphcache.persist import fingerprint
from graphcache.persist.fingerprint import environment
from tests.engine_modules import fake, load  # noqa: F401 - the fixture is used by its name
from tests.graphs.fake_driver import Torch
from tests.helpers import mlp


def test_the_same_module_in_another_process_with_other_weights() -> None:
    one, other = mlp(), mlp()
    assert not torch.equal(one[0].weight, other[0].weight)
    assert environment(one) == environment(other)
    assert environment(one)["torch"] == str(torch.__version__)
    assert environment(one)["graphcache"] == graphcache.__version__
    assert all(type(value) is str for value in environment(one).values())


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.append(nn.ReLU()),
        lambda net: net.__setitem__(1, nn.GELU()),
        lambda net: net.double(),
        lambda net: net[0].register_buffer("more", torch.zeros(1)),
        lambda net: net[0].register_parameter("bias", None),
        lambda net: setattr(net[2], "weight", nn.Parameter(torch.zeros(4, 5))),
    ],
)
def test_another_structure_is_another_module(change: Callable[[Any], Any]) -> None:
    net = mlp()
    before = environment(net)
    change(net)
    after = environment(net)
    assert [name for name in before if before[name] != after[name]] == ["module"]


def test_a_lazy_module_and_an_odd_name_have_one_too() -> None:
    assert environment(nn.LazyLinear(3)) != environment(nn.LazyConv1d(3, 1))
    odd = nn.Module()
    odd.add_module("\ud800", nn.ReLU())
    assert environment(odd)["module"].startswith("Module ")


def test_an_engine_is_known_by_its_bytes_wherever_it_is(fake: Torch) -> None:  # noqa: F811
    one, again, other = load("affine"), load("affine"), load("pair")
    assert environment(one) == environment(again)
    assert environment(one)["tensorrt_rtx"] == "1.5.0.114"
    assert environment(one)["module"] != environment(other)["module"]
    inside = [environment(nn.Sequential(engine))["module"] for engine in (one, again, other)]
    assert inside[0] == inside[1] != inside[2]


def test_the_device_of_parameters_buffers_or_else() -> None:
    assert device_of(nn.Linear(1, 1, device="meta")) == torch.device("meta")
    assert device_of(nn.BatchNorm1d(1, affine=False, device="meta")) == torch.device("meta")
    assert device_of(nn.ReLU()).type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    fingerprint._driver.cache_clear()
    monkeypatch.setattr(fingerprint, "_DRIVER_VERSION_FILE", str(tmp_path / "version"))
    yield tmp_path / "version"
    fingerprint._driver.cache_clear()


@pytest.mark.parametrize(
    ("text", "serves", "expected"),
    [
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.03  Release\nGCC 13.2",
            13000,
            "580.159.03, CUDA 13.0",
        ),
        ("NVRM version: something else\n", 12090, "CUDA 12.9"),
        ("", None, "unknown"),
        (None, 12090, "CUDA 12.9"),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15", None, "550.54.15"),
    ],
)
def test_the_driver_as_far_as_the_system_tells(
    said: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, serves: int | None, expected: str
) -> None:
    def call(name: str) -> int:
        assert name == "cuDriverGetVersion"
        if serves is None:
            raise CudaError("no driver")
        return serves

    monkeypatch.setattr(fingerprint.driver, "call", call)
    if text is not None:
        said.write_text(text)
    assert fingerprint._driver() == expected
