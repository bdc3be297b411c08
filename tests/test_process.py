"""The end of a process, and its beginning: graphs that are still there, and processes that are forked."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BEGIN = """
import torch
from torch import nn
from tests.helpers import dispatcher_of
import graphcache

def net():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU()).requires_grad_(False)

x = torch.ones(2, 4)
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Another Python, in which nothing is left over from these tests."""
    return subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(BEGIN) + textwrap.dedent(code)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


LEFT = {
    "a graph": "fast = graphcache.wrap(net()); fast(x); fast(x)",
    "a session": "fast = graphcache.wrap(net()); session = fast.session(x); session.run()",
    "an answer": "fast = graphcache.wrap(net()); fast(x); y = fast(x)",
    "a cycle": "fast = graphcache.wrap(net()); fast(x); fast.itself = fast; del fast",
    "an open block": "made = graphcache.runtime.enable_cudagraphs(net()); fast = made.__enter__(); fast(x)",
}


def test_what_is_left_at_the_end_of_a_process_says_nothing_together() -> None:
    cases = list(LEFT.values())
    ended = run(
        f"""
        kept = [dict(globals()) for _ in {cases}]
        for names, code in zip(kept, {cases}):
            exec(code, names)
        """
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


@pytest.mark.full
@pytest.mark.parametrize("left", LEFT.values(), ids=LEFT)
def test_what_is_left_at_the_end_of_a_process_says_nothing(left: str) -> None:
    ended = run(left)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_an_exception_ends_a_process_as_without_graphs() -> None:
    ended = run("fast = graphcache.wrap(net()); fast(x); fast(x); raise KeyError('mine')")
    assert ended.returncode == 1
    assert ended.stderr.strip().endswith("KeyError: 'mine'")


def test_an_exit_in_the_middle_of_a_call() -> None:
    ended = run(
        """
        import sys

        class Leaves(nn.Module):
            def forward(self, x):
                sys.exit(7)

        graphcache.wrap(Leaves())(x)
        """
    )
    assert (ended.returncode, ended.stderr) == (7, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_fork_waits_for_no_capture_of_the_process_before() -> None:
    """What was being captured beside the calls when the process was forked is captured by nobody in the fork."""
    ended = run(
        """
        import os, signal, threading, warnings
        torch.set_num_threads(1)
        # Python 3.12 warns of a fork beside threads, which is what is tried here.
        warnings.simplefilter("ignore", DeprecationWarning)
        module = net()
        fast = graphcache.wrap(module, capture_in="background")
        record, reached, go = dispatcher_of(fast).target.recorder.record, threading.Event(), threading.Event()

        def slow(*args, **kwargs):
            reached.set()
            go.wait(60)
            return record(*args, **kwargs)

        dispatcher_of(fast).target.recorder.record = slow
        fast(x)
        assert reached.wait(60)
        children = {}
        for then in ("close", "clear", "call"):
            child = os.fork()
            if not child:
                signal.alarm(60)
                dispatcher_of(fast).target.recorder.record = record
                if then == "call":
                    right = torch.equal(fast(x), module(x))
                    (later,) = dispatcher_of(fast).queue._pending.values()
                    right = right and later.done.wait(30) and torch.equal(fast(x), module(x))
                    os._exit(0 if right and fast.cache_info().hits == 1 else 1)
                getattr(fast, then)()
                os._exit(0)
            children[then] = child
        ended = {then: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for then, child in children.items()}
        go.set()
        assert set(ended.values()) == {0}, ended
        """
    )
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_has_host_graphs_of_its_own() -> None:
    ended = run(
        """
        import os

        # Torch's own threads do not survive a fork.
        torch.set_num_threads(1)
        module = net()
        fast = graphcache.wrap(module)
        fast(x)
        fast(x)
        child = os.fork()
        if not child:
            right = torch.equal(fast(x * 2), module(x * 2)) and torch.equal(fast(x[:1]), module(x[:1]))
            info = fast.cache_info()
            os._exit(0 if right and (info.hits, info.captures) == (2, 2) else 1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert torch.equal(fast(x * 3), module(x * 3))
        assert (fast.cache_info().hits, fast.cache_info().captures) == (2, 1)
        """
    )
    assert (ended.returncode, ended.stderr) == (0, "")
