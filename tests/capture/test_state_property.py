"""Random modules that keep state in random Python structures: answers and state are those of a twin that runs eagerly.

A program is drawn from a seed (see ``programs``), executed twice, and one of the two modules is wrapped. After every
call the answers, the arguments and everything that can be reached from the two modules are compared.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import graphcache
from graphcache import CachedModule
from tests.capture import actions, changing, places
from tests.capture.changing import ACTIONS
from tests.capture.places import ARGUMENTS, KINDS
from tests.capture.programs import STYLES, Drive, Outcome, Program, Recipe, explain
from tests.helpers import dispatcher_of

CALLS = 20
BLOCKS = 10
PROGRAMS = 100
"""In one block; with the call of the bare modules at the end, 21 000 steps in all."""
CHANGES = 0.15

ANY = Recipe()
QUIET = Recipe(actions.QUIET, styles=("inline", "method", "closure", "part", "hook", "object", "lambda"))
PARTS = Recipe((*actions.QUIET, actions.reads_what_its_class_defines), styles=("part",))
SETTLING = Recipe((*actions.QUIET, *actions.SETTLING))
# State that is restored within a call is seen by whoever looks in the middle of a capture beside it.
STILL = Recipe(actions.QUIET, any_thread=True)
BESIDE = Recipe(tuple(a for a in ACTIONS if a is not actions.restores_what_it_sets), any_thread=True)

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """One core, no log, and the dataclass known to pytree."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    places.register()
    yield
    places.unregister()
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


def bare(module: nn.Module) -> nn.Module:
    return module


def drive(seed: int, recipe: Recipe, changes: float = CHANGES, calls: int = CALLS) -> tuple[Outcome, CachedModule]:
    """Drive a program behind ``wrap``; fails with the smallest program that goes wrong."""
    found = Drive(Program(seed, recipe), graphcache.wrap, changes)
    if found.run(calls).wrong:
        pytest.fail(explain(seed, recipe, graphcache.wrap, changes, calls), pytrace=False)
    return found.outcome, found.fast


@pytest.mark.parametrize("block", range(BLOCKS))
def test_answers_and_state_are_those_of_a_twin(block: int, request: pytest.FixtureRequest) -> None:
    count = PROGRAMS * (10 if request.config.getoption("--full", default=False) else 1)
    # Half of the programs change nothing, or not for long, and are captured.
    seeds = range(block * count, (block + 1) * count)
    outcomes = [drive(seed, SETTLING if seed % 2 else ANY)[0] for seed in seeds]
    assert sum(outcome.steps for outcome in outcomes) == count * (CALLS + 1)
    assert sum(outcome.raised for outcome in outcomes) < 0.1 * count * CALLS


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_place_by_itself(name: str) -> None:
    kind = KINDS[name]
    path = ("attribute", name) if kind.put else ("attribute", name, "list")
    numbers = (actions.reads_a_number, changing.counts)
    others = (actions.builds_a_table, actions.reads_a_tensor, changing.rebinds_a_tensor, changing.keeps_a_history)
    for make in numbers if kind.numbers else (*numbers, *others):
        for seed in range(3):
            drive(seed, Recipe((make,), most=1, argument=0.0, styles=("inline", "method"), at=path), 2 * CHANGES)


def test_every_kind_of_state_is_driven_often() -> None:
    seen: Counter[str] = Counter()
    for seed in range(BLOCKS * PROGRAMS):
        seen.update(Program(seed, ANY).kinds)
    expected = {*(action.__name__ for action in ACTIONS), *STYLES, *KINDS, *places.ROOTS}
    expected |= {f"argument: {name}" for name in ARGUMENTS}
    assert {name: seen[name] for name in expected if seen[name] < 20} == {}


def test_the_twins_of_a_program_agree_without_a_cache() -> None:
    for seed in range(60):
        found = Drive(Program(seed, ANY), bare, CHANGES)
        assert not found.run(CALLS).wrong, found.report()


def test_a_difference_in_any_kind_of_place_is_found() -> None:
    """What is changed of only one twin shows after the next call: the comparison sees what it walks over."""
    seen: set[str] = set()
    for seed in range(300):
        program = Program(seed, Recipe((actions.reads_a_number,), most=1, argument=1.0))
        for index in range(len(program.actions[0].changes)):
            found = Drive(program, bare, 0.0)
            assert found.step()
            with torch.no_grad():
                found.left.changes[index](found.left.net, found.left.cache)
            assert not found.step(), found.report()
        seen |= program.kinds
    assert seen >= {*KINDS, *places.ROOTS}


def test_parts_that_are_captured_one_by_one() -> None:
    def wrap(module: nn.Module) -> CachedModule:
        return graphcache.wrap(module, strategy="per_submodule", include=[name for name, _ in module.named_children()])

    hits = 0
    for seed in range(PROGRAMS):
        found = Drive(Program(seed, PARTS), wrap, CHANGES)
        assert not found.run(CALLS).wrong, found.report()
        hits += sum(dispatcher_of(part).captures.hits for part in dispatcher_of(found.fast).submodules.named().values())
    assert hits > PROGRAMS / 2


def test_modules_whose_state_stays_are_captured() -> None:
    shares = []
    for seed in range(60):
        outcome, fast = drive(seed, QUIET, changes=0.0)
        program = Program(seed, QUIET)
        if all(action.effect == "none" for action in program.actions) and not outcome.raised:
            shares.append(fast.cache_info().hits > CALLS // 3)
    assert len(shares) > 30
    assert sum(shares) >= 0.9 * len(shares)


def test_modules_whose_state_settles_are_captured_then() -> None:
    shares = []
    for seed in range(60):
        outcome, fast = drive(seed, SETTLING, changes=0.0, calls=3 * CALLS)
        program = Program(seed, SETTLING)
        effects = {action.effect for action in program.actions}
        if "settles" in effects and effects <= {"none", "settles"} and not outcome.raised:
            shares.append(fast.cache_info().hits > 0)
    assert len(shares) > 20
    assert sum(shares) >= 0.8 * len(shares)


def test_two_threads_while_captures_are_made_beside_them(request: pytest.FixtureRequest) -> None:
    """Callers take turns, so that a twin can follow them; captures are made whenever they are.

    Only modules that change nothing are changed from outside, and not within a run of such a capture: whoever empties a
    table that it is filling, or lets a batch norm count that it is running, races with it.
    """

    def wrap(module: nn.Module) -> CachedModule:
        return graphcache.wrap(module, capture_in="background")

    hits = 0
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        for seed in range(1000 if request.config.getoption("--full", default=False) else 100):
            recipe, changes = (STILL, CHANGES) if seed % 2 else (BESIDE, 0.0)
            found = Drive(Program(seed, recipe), wrap, changes, lambda fast: dispatcher_of(fast).gate.shared())
            for call in range(CALLS):
                if not (other if call % 2 else one).submit(found.step).result():
                    pytest.fail(found.report(), pytrace=False)
            hits += found.fast.cache_info().hits
            found.fast.close()
    assert hits > 0
