"""What goes where: results to stdout, progress to stderr and only where somebody watches."""

import io
import os
import sys

import click
import pytest
import torch
from rich.text import Text
from torch import nn

import graphcache
from graphcache import Cause, Reason
from graphcache.cli.output import (
    Causes,
    check_writable,
    described,
    environment,
    one_line,
    progress,
    stdout,
    table,
    writing,
)
from graphcache.files import TEMPORARY


@pytest.mark.parametrize("watched", [True, False])
def test_progress_is_drawn_on_a_terminal_only_and_wiped_at_the_end(capsys, monkeypatch, watched):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: watched)
    with pytest.raises(KeyError), progress("one") as show:
        show("two" * 100)
        raise KeyError
    seen = capsys.readouterr()
    assert seen.out == ""
    lines = seen.err.split("\r\x1b[2K")
    assert lines[0] == ""
    assert (lines[1:2], lines[-1], len(lines)) == ((["one"], "", 4) if watched else ([], "", 1))
    assert all(len(line) < 100 for line in lines)


def test_lines_and_cells():
    assert one_line("a\n  b\tc") == "a b c"
    assert described({"device": "CPU", "torch": "2"}) == "CPU, torch 2"
    assert table("name", "p50").columns[1].justify == "right"


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_is_explained(reason):
    why = Causes().explain(reason.value)
    assert why.startswith(f"{reason.value}: {reason.sentence}")
    assert reason.remedy in why


def test_the_first_cause_of_a_reason_is_told_with_its_detail():
    fast = graphcache.wrap(nn.ReLU())
    causes = Causes(fast)
    for detail in ("one\nof", "two"):
        fast.ledger.ran_eagerly(Cause(Reason.CAPTURE_FAILED, "relu", detail))
    assert causes.explain(Reason.CAPTURE_FAILED.value).startswith(
        "capture_failed: the capture failed (at relu): one of. To"
    )


def test_the_device_and_the_versions_are_told():
    found = environment(torch.device("cpu"))
    assert list(found) == ["device", "graphcache", "torch", "python"]
    assert found["device"].startswith("CPU, ")


@pytest.mark.parametrize("colours", [True, False])
def test_colours_only_where_they_are_wanted(monkeypatch, colours):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not colours:
        monkeypatch.setenv("NO_COLOR", "1")
    stdout().print(Text("seen", style="red"))
    assert ("\x1b[31m" in stream.getvalue()) == colours
    assert "seen" in stream.getvalue()


def test_a_file_takes_its_place_in_one_step_or_not_at_all(tmp_path):
    target = tmp_path / "result"
    target.write_bytes(b"old")
    with pytest.raises(KeyError), writing(target, "--output") as file:
        file.write(b"half")
        raise KeyError
    assert target.read_bytes() == b"old"
    with writing(target, "--output") as file:
        file.write(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_file_is_written_by_the_one_atomic_writer(tmp_path):
    with writing(tmp_path / "result", "--output"):
        [temporary] = tmp_path.iterdir()
        assert temporary.name.startswith(TEMPORARY)


def test_a_disk_that_is_full_is_told_with_the_option(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    match = r"result cannot be written \(No space left on device\); choose another --output"
    with pytest.raises(click.ClickException, match=match), writing(tmp_path / "result", "--output"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", [".", "nowhere/file"])
def test_a_place_that_cannot_be_written(tmp_path, place):
    with pytest.raises(click.ClickException, match=r"; choose another --output"):
        check_writable(tmp_path / place, "--output")
    with pytest.raises(click.ClickException, match=r"; choose another --output"), writing(tmp_path / place, "--output"):
        pytest.fail("it was opened")
    check_writable(None, "--output")
    check_writable(tmp_path / "file", "--output")
    assert list(tmp_path.iterdir()) == []
