"""The live view: what it shows, where it draws, and that it draws nothing by itself."""

import io
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import graphcache
from graphcache.cli import watch
from graphcache.cli.watch import Watch, view
from tests.helpers import Fn


@pytest.fixture
def fast():
    made = graphcache.wrap(Fn(lambda m, x: x[x > 0] if x.dim() > 1 else x + 1), max_graphs=2)
    for x in (torch.ones(1), torch.ones(1), torch.ones(2), torch.ones(3), torch.ones(2, 2)):
        made(x)
    return made


def shown(table, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def test_a_row_for_each_signature(fast):
    text = shown(view(fast))
    lines = [line.rstrip() for line in text.splitlines()]
    assert lines[0].startswith("Fn: 1 hits, 3 captures, 1 evictions, 1 eager; 2 of 2 graphs, ")
    assert len(lines) == 2 + 4
    assert sum("replays" in line for line in lines) == 2
    assert sum("is captured" in line for line in lines) == 1
    assert sum("eager: data_dependent" in line for line in lines) == 1


def test_many_rows_are_cut():
    fast = graphcache.wrap(Fn(lambda m, x: x + 1), max_graphs=64)
    for size in range(1, 31):
        fast(torch.ones(size))
    text = shown(view(fast))
    assert "and 14 more" in text
    assert len(text.splitlines()) == 2 + 17


def test_on_a_terminal_it_is_drawn_between_calls(fast, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    clock = iter(range(1, 100))
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    threads = threading.active_count()
    with Watch(fast, enabled=True) as seen:
        assert threading.active_count() == threads
        seen.update()
        drawn = len(stream.getvalue())
        assert "data_dependent" in stream.getvalue()
        monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: 0.0))
        seen.update()
        assert len(stream.getvalue()) == drawn, "not before a fifth of a second has passed"
    assert len(stream.getvalue()) > drawn


@pytest.mark.parametrize("enabled", [True, False])
def test_elsewhere_there_is_one_table_at_the_end(fast, monkeypatch, enabled):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with Watch(fast, enabled=enabled) as seen:
        seen.update()
        assert stream.getvalue() == ""
    assert stream.getvalue().count("signature") == int(enabled)
    assert "\x1b" not in stream.getvalue()


def test_an_error_is_not_hidden_by_a_table(fast, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(KeyError), Watch(fast, enabled=True):
        raise KeyError("mine")
    assert stream.getvalue() == ""
