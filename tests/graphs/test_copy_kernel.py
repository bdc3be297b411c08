"""The kernel of copy nodes: its source, how it is loaded, and what it is launched with."""

from __future__ import annotations

import ctypes
import logging
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphcache.graphs import copies, driver
from graphcache.graphs.copies import LARGEST, MAX_COPIES, CopyList, ptx
from tests.graphs import ptx as ptx_machine
from tests.graphs.fake_driver import Torch, installed


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Torch]:
    with installed(patch=monkeypatch) as fake:
        yield fake


@pytest.mark.parametrize(("waits", "entries"), [(False, 1), (True, 2)])
def test_every_label_and_register_of_the_source_is_there(waits: bool, entries: int) -> None:
    """What an assembler would say, as far as it can be said without one."""
    found = ptx(waits).split(".visible .entry ")[1:]
    assert len(found) == entries
    for entry in found:
        body = entry[entry.index("{") :]
        labels = re.findall(r"^(\w+):$", body, re.M)
        assert set(re.findall(r"bra (\w+);", body)) <= set(labels)
        assert len(set(labels)) == len(labels)
        declared = set(re.findall(r"%\w+", " ".join(re.findall(r"\.reg .*;", body))))
        special = {"%ctaid", "%ntid", "%tid", "%nctaid"}
        assert set(re.findall(r"%\w+", body)) == declared | special
        assert f"copies[{ctypes.sizeof(CopyList)}]" in entry


BASE = 1 << 40
SPAN = 1 << 16


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["graphcache_copy", "graphcache_copy_after"]),
    st.lists(
        st.tuples(st.one_of(st.integers(1, 40), st.integers(1, 300)), st.integers(0, 17), st.integers(0, 17)),
        min_size=1,
        max_size=MAX_COPIES,
    ),
    st.integers(1, 3),
    st.integers(1, 9),
)
def test_it_moves_every_byte_and_no_other(
    name: str, moves: list[tuple[int, int, int]], blocks: int, threads: int
) -> None:
    """On the CPU, instruction by instruction, for any sizes, alignments and numbers of threads."""
    memory, words, wanted = ptx_machine.Buffers(), CopyList(), []
    for index, (nbytes, at, to) in enumerate(moves):
        source, target = BASE + 2 * index * SPAN, BASE + (2 * index + 1) * SPAN
        data = bytes((7 * index + 13 * step) % 256 for step in range(nbytes))
        memory.put(source + at, data)
        margin = bytes([255]) * 32
        found = memory.put(target, margin[:to] + bytes(nbytes) + margin)
        wanted.append((found, margin[:to] + data + margin))
        words[3 * index : 3 * index + 3] = [source + at, target + to, nbytes]
    ptx_machine.run(ptx(True), name, bytes(words), memory, (blocks, len(moves)), threads)
    for found, expected in wanted:
        assert bytes(found) == expected


def test_the_machine_finds_what_a_device_would_refuse() -> None:
    memory = ptx_machine.Buffers()
    memory.put(BASE, bytes(64))
    memory.put(BASE + SPAN, bytes(64))
    source = ptx(False)

    def launch(changed: str, nbytes: int = 64, at: int = 0) -> None:
        words = CopyList(BASE + at, BASE + SPAN, nbytes)
        ptx_machine.run(changed, "graphcache_copy", bytes(words), memory, (1, 1), 4)

    launch(source)
    with pytest.raises(ptx_machine.Fault, match="where there is nothing"):
        launch(source, nbytes=65)
    with pytest.raises(ptx_machine.Fault, match="no multiple"):
        launch(source.replace("and.b64 %odd, %odd, 15;", "and.b64 %odd, %odd, 0;"), nbytes=32, at=4)
    with pytest.raises(ptx_machine.Fault, match="does not end"):
        launch(source.replace("add.s64 %at, %at, %odd;", "add.s64 %at, %at, 0;"))
    with pytest.raises(ptx_machine.Fault, match="not understood"):
        launch(source.replace("shl.b64", "shr.b64"))


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="no assembler here")
@pytest.mark.parametrize(("waits", "device"), [(False, "sm_75"), (False, "sm_89"), (True, "sm_90"), (True, "sm_100")])
def test_it_can_be_assembled(tmp_path: Path, waits: bool, device: str) -> None:
    (tmp_path / "copy.ptx").write_text(ptx(waits))
    command = ["ptxas", f"-arch={device}", "-Werror", "-o", str(tmp_path / "copy.cubin"), str(tmp_path / "copy.ptx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_only_one_kernel_waits(fake: Torch) -> None:
    first, after = ptx(True).split(".visible .entry ")[1:]
    assert "griddepcontrol" not in first
    assert after.index("griddepcontrol.wait;") < after.index("ld.global")
    assert "griddepcontrol" not in ptx(False), "no device before 9.0 knows it"


@pytest.mark.parametrize(("capability", "waits"), [((7, 5), False), ((8, 9), False), ((9, 0), True), ((12, 0), True)])
def test_what_a_device_gets(fake: Torch, capability: tuple[int, int], waits: bool) -> None:
    fake.capability = capability
    found = copies.copy_kernels(0)
    assert found is not None
    assert found.waits is waits
    assert (found.before is found.after) is not waits
    assert copies.copy_kernels(0) is found
    assert fake.driver.calls.count("cuModuleLoadData") == 1


@pytest.mark.parametrize("name", ["cuModuleLoadData", "cuModuleGetFunction"])
def test_a_driver_that_does_not_take_them_is_asked_once(
    fake: Torch, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    fake.driver.fail(name, "INVALID_VALUE")
    with caplog.at_level(logging.DEBUG, "graphcache"):
        assert [copies.copy_kernels(0) for _ in range(3)] == [None] * 3
    (record,) = caplog.records
    assert f"copies are the driver's own on device 0: {name} failed" in record.getMessage()


def memory(address: int, nbytes: int) -> Any:
    """As much of a tensor as a copy looks at."""
    return SimpleNamespace(data_ptr=lambda: address, numel=lambda: nbytes, element_size=lambda: 1)


@given(st.lists(st.integers(1, LARGEST), min_size=1, max_size=MAX_COPIES))
def test_there_is_a_thread_for_every_four_bytes(sizes: list[int]) -> None:
    with installed() as fake:
        kernels = copies.copy_kernels(0)
        assert kernels is not None
        seen: list[tuple[tuple[int, ...], tuple[int, ...], bytes]] = []

        def launch(
            function: int, arguments: list[bytes], stream: int, *, grid: object, block: object, **_: object
        ) -> None:
            seen.append((grid, block, *arguments))  # type: ignore[arg-type]

        fake.driver.launch = launch  # type: ignore[method-assign, assignment]
        pairs = [(memory(16 * index, nbytes), memory(1024 * index, nbytes)) for index, nbytes in enumerate(sizes)]
        copies.with_copies(lambda stream: True, pairs, [], kernels)(int(driver.new_stream()))
        [(grid, block, given_)] = seen
        assert grid[1:] == (len(sizes), 1)
        assert block[1:] == (1, 1)
        assert 4 * grid[0] * block[0] >= max(sizes) > 4 * (grid[0] - 1) * block[0]
        words = CopyList.from_buffer_copy(given_)
        wanted = [(1024 * index, 16 * index, nbytes) for index, nbytes in enumerate(sizes)]
        assert [tuple(words[3 * i : 3 * i + 3]) for i in range(len(sizes))] == wanted
        assert not any(words[3 * len(sizes) :])
