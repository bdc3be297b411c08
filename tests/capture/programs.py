"""Random modules as text, made of actions; and two twins of each, one behind ``wrap``, driven side by side."""

from __future__ import annotations

import builtins
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from textwrap import indent
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.capture import places
from tests.capture.actions import Action, Draw
from tests.capture.changing import ACTIONS
from tests.capture.comparing import difference
from tests.capture.places import ARGUMENTS, Place, drawn, place_at

SECTIONS = ("globals", "enclosing", "base", "class", "init", "argument")
STYLES = ("inline", "inline", "method", "closure", "function", "part", "hook", "object", "lambda")
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "grad": torch.enable_grad,
}
NAMES = {"__builtins__": builtins, **places.names()}


@dataclass(frozen=True)
class Recipe:
    """Which modules are drawn.

    Args:
        actions: Out of what.
        most: How many actions a module has at most.
        argument: How likely a second argument is.
        styles: Where actions may stand.
        any_thread: Whether only places are used that all threads share.
        at: The place of everything, root and kinds; drawn as well if it is empty.
    """

    actions: Sequence[Callable[[Draw], Action]] = ACTIONS
    most: int = 4
    argument: float = 0.3
    styles: tuple[str, ...] = STYLES
    any_thread: bool = False
    at: tuple[str, ...] = ()


class Program:
    """The text of one random module.

    Args:
        seed: Everything follows from it.
        recipe: Out of what.
        only: Of the actions, the one that is kept; for a smaller program that fails as well.
    """

    def __init__(self, seed: int, recipe: Recipe, only: int | None = None) -> None:
        rng = random.Random(seed)
        self.seed = seed
        self.argument = rng.choice(list(ARGUMENTS)) if rng.random() < recipe.argument else ""
        self._recipe = recipe
        self.mode = rng.choice(("no_grad", "no_grad", "no_grad", "inference_mode", "grad"))
        self.names: list[str] = []
        self.actions: list[Action] = []
        self._styles: list[str] = []
        self._sections: dict[str, list[str]] = {section: [] for section in SECTIONS}
        self._calls: list[str] = []
        self._changes: list[list[str]] = []
        self._answer = rng.choice(("y", "y", "y", "(y, y * 2)", "{'y': y, 'n': [1, None]}"))
        count = rng.randint(1, recipe.most)
        for number in range(count):
            make, style = rng.choice(recipe.actions), rng.choice(recipe.styles)
            action = self._draw(random.Random(rng.random()), number, make, style)
            if only in (None, number):
                self._add(number, make.__name__, action, style)

    @cached_property
    def kinds(self) -> set[str]:
        """What was drawn: actions, styles, and kinds of places."""
        found = {kind for action in self.actions for place in action.places for kind in place.kinds}
        return {*found, *self.names, *self._styles, *([f"argument: {self.argument}"] if self.argument else [])}

    @cached_property
    def source(self) -> str:
        """The text."""
        part = {name: "\n".join(lines) for name, lines in self._sections.items()}
        changes = [
            f"def change{index}(self, cache):\n{indent(chr(10).join(lines), '    ')}\n"
            for index, lines in enumerate(self._changes)
        ]
        changes.append(f"return Net, [{', '.join(f'change{index}' for index in range(len(changes)))}]")
        forward = "\n".join([*self._calls, f"return {self._answer}"])
        cache = (ARGUMENTS[self.argument][0] % ("{" + part["argument"] + "}")) if self.argument else "None"
        return (
            f"{part['globals']}\n"
            f"def make_cache():\n    return {cache}\n"
            "def build():\n"
            f"{indent(part['enclosing'], '    ')}\n"
            f"    class Base(nn.Module):\n        pass\n{indent(part['base'], ' ' * 8)}\n"
            f"    class Net(Base):\n        pass\n{indent(part['class'], ' ' * 8)}\n"
            f"        def __init__(self):\n            super().__init__()\n{indent(part['init'], ' ' * 12)}\n"
            f"        def forward(self, x, cache=None):\n            y = x * 1.0\n{indent(forward, ' ' * 12)}\n"
            f"{indent(chr(10).join(changes), '    ')}\n"
            "Net, CHANGES = build()\n"
        )

    def _draw(self, rng: random.Random, number: int, make: Callable[[Draw], Action], style: str) -> Action:
        def place(index: int, value: str, numbers: bool) -> Place:
            local = style in ("part", "hook", "object") or not self.argument
            while True:
                path = self._recipe.at or drawn(rng, numbers=numbers, local=local)
                made = place_at(path, index, value, self.argument or "dict")
                if made.any_thread or not self._recipe.any_thread:
                    return made

        return make(Draw(rng, number, place))

    def _add(self, number: int, name: str, action: Action, style: str) -> None:
        """Put the action into the program."""
        if action.arguments and style in ("part", "hook", "object"):
            style = "inline"
        if style == "object" and any(word in line for line in (*action.init, *action.changes) for word in _OF_MODULES):
            style = "part"
        self.names.append(name)
        self._styles.append(style)
        self.actions.append(action)
        init = [*action.init]
        for place in action.places:
            for section, lines in place.sections.items():
                (init if section == "init" else self._sections[section]).extend(lines)
        self._sections["globals"] += action.above
        declare = sorted({place.declare for place in action.places} - {""})
        owner = _STYLES[style](self, number, init, declare, action.body)
        for change in action.changes:
            self._changes.append([*declare, *([f"self = self.{owner}"] if owner else []), change])

    # ---- where the body stands; each answers with the attribute that has the state, if it is not the module

    def _inline(self, number: int, init: list[str], declare: list[str], body: list[str]) -> str:
        self._sections["init"] += init
        self._calls = [*[line for line in declare if line not in self._calls], *self._calls, *body]
        return ""

    def _method(self, number: int, init: list[str], declare: list[str], body: list[str]) -> str:
        self._sections["init"] += init
        self._sections["class"].append(_function(f"act{number}(self, x, y, cache)", [*declare, *body]))
        self._calls.append(f"y = self.act{number}(x, y, cache)")
        return ""

    def _closure(self, number: int, init: list[str], declare: list[str], body: list[str]) -> str:
        self._sections["init"] += init
        self._sections["enclosing"].append(_function(f"act{number}(self, x, y, cache)", [*declare, *body]))
        self._calls.append(f"y = act{number}(self, x, y, cache)")
        return ""

    def _function(self, number: int, init: list[str], declare: list[str], body: list[str]) -> str:
        if (
            any(line.startswith("nonlocal") for line in declare)
            or "Net." in (text := "\n".join(body))
            or "Base." in text
        ):
            return self._closure(number, init, declare, body)
        self._sections["init"] += init
        self._sections["globals"].append(_function(f"act{number}(self, x, y, cache)", [*declare, *body]))
        self._calls.append(f"y = act{number}(self, x, y, cache)")
        return ""

    def _lambda(self, number: int, init: list[str], declare: list[str], body: list[str]) -> str:
        function = _function(f"act{number}(x, y, cache, self=self)", [*declare, *body])
        self._sections["init"] += [*init, *function.splitlines(), f"self.f{number} = act{number}"]
        self._calls.append(f"y = self.f{number}(x, y, cache)")
        return ""

    def _part(self, number: int, init: list[str], declare: list[str], body: list[str]) -> str:
        lines = [f"class Part{number}(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        {line}" for line in init]
        lines += indent(_function("forward(self, y)", [*declare, *body]), "    ").splitlines()
        self._sections["enclosing"] += lines
        self._sections["init"].append(f"self.part{number} = Part{number}()")
        self._calls.append(f"y = self.part{number}(y)")
        return f"part{number}"

    def _object(self, number: int, init: list[str], declare: list[str], body: list[str]) -> str:
        lines = [f"class Act{number}:", "    training = True", "    def __init__(self):", "        pass"]
        lines += [f"        {line}" for line in init]
        lines += indent(_function("__call__(self, y)", [*declare, *body]), "    ").splitlines()
        self._sections["enclosing"] += lines
        self._sections["init"].append(f"self.object{number} = Act{number}()")
        self._calls.append(f"y = self.object{number}(y)")
        return f"object{number}"

    def _hook(self, number: int, init: list[str], declare: list[str], body: list[str]) -> str:
        function = _function(f"act{number}(module, args, y, self=self)", [*declare, *body])
        self._sections["init"] += [*init, *function.splitlines(), f"self.h{number} = nn.Identity()"]
        self._sections["init"].append(f"self.h{number}.register_forward_hook(act{number})")
        self._calls.append(f"y = self.h{number}(y)")
        return ""


_OF_MODULES = ("register_", "add_module", "nn.", "train(", "eval(")
"""What an object cannot do that is no module."""

_STYLES: dict[str, Callable[..., str]] = {
    "inline": Program._inline,
    "method": Program._method,
    "closure": Program._closure,
    "function": Program._function,
    "lambda": Program._lambda,
    "part": Program._part,
    "object": Program._object,
    "hook": Program._hook,
}


def _function(head: str, body: list[str]) -> str:
    return "\n".join([f"def {head}:", *(f"    {line}" for line in body), "    return y"])


# ---- two twins


class Twin:
    """A program that was executed: a module, the program's globals and the second argument."""

    def __init__(self, code: Any, seed: int) -> None:
        _seed(seed)
        self.globals: dict[str, Any] = dict(NAMES)
        exec(code, self.globals)
        self.net: nn.Module = self.globals["Net"]().requires_grad_(False)
        self.changes: list[Callable[[Any, Any], Any]] = self.globals["CHANGES"]
        self.new_cache()

    def new_cache(self) -> None:
        self.cache = self.globals["make_cache"]()

    def state(self) -> Any:
        own = {name: value for name, value in self.globals.items() if name not in NAMES}
        return {**own, "net": self.net, "cache": self.cache}


def call(function: Callable[..., Any], twin: Twin, x: Tensor, seed: int) -> Any:
    """The answer or the type of the exception, and what was left of the generators."""
    _seed(seed)
    try:
        answer = function(x) if twin.cache is None else function(x, twin.cache)
    except Exception as error:
        answer = ("raised", type(error), str(error) if isinstance(error, GRAVE) else "")
    return {"answer": answer, "drawn": [random.random(), np.random.rand(), torch.rand(()).item()]}


GRAVE = (NameError, SyntaxError, AttributeError, TypeError)
"""Exceptions that a wrong program raises."""


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


@dataclass
class Outcome:
    """What a drive found.

    Args:
        steps: Calls made.
        wrong: The first difference, empty if there was none.
        raised: Calls that raised.
    """

    steps: int = 0
    wrong: str = ""
    raised: int = 0


class Drive:
    """Calls of both twins of one program, compared after each.

    Args:
        program: What is run.
        wrap: What the first twin's module is put behind.
        changes: How likely something is changed from outside before a call.
        changing: Entered for that with the wrapped module.
    """

    def __init__(
        self,
        program: Program,
        wrap: Callable[[nn.Module], Any],
        changes: float,
        changing: Callable[[Any], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._rng = random.Random(program.seed + 1)
        self._program = program
        self._changes = changes
        self._changing = changing
        code = compile(program.source, f"<program {program.seed}>", "exec")
        self.left, self.right = Twin(code, program.seed), Twin(code, program.seed)
        self.fast = wrap(self.left.net)
        self._mode = program.mode
        self.outcome = Outcome()
        self._log: list[str] = []

    def run(self, steps: int) -> Outcome:
        """Make so many calls, or fewer if one goes wrong."""
        for _ in range(steps):
            if not self.step():
                break
        else:
            self._step(self.left.net, torch.ones(2, 3), torch.ones(2, 3))
        return self.outcome

    def step(self) -> bool:
        """One call of each; whether they agree."""
        rng = self._rng
        if rng.random() < 0.05 and self._program.mode != "inference_mode":
            self._mode = rng.choice(("no_grad", "grad"))
        if self.left.changes and rng.random() < self._changes:
            self._change(rng.randrange(len(self.left.changes)))
        if rng.random() < self._changes / 3:
            self.left.new_cache()
            self.right.new_cache()
            self._log.append("new cache")
        x = torch.tensor([[rng.choice((-1.0, 0.5, 2.0)) for _ in range(3)] for _ in range(rng.choice((2, 2, 2, 1, 4)))])
        return self._step(self.fast, x, x.clone())

    def _change(self, index: int) -> None:
        seed = self._rng.randrange(1 << 30)
        found = []
        for twin in (self.left, self.right):
            _seed(seed)
            with torch.no_grad(), self._changing(self.fast):
                try:
                    twin.changes[index](twin.net, twin.cache)
                    twin.net.requires_grad_(False)
                    found.append("")
                except GRAVE:
                    raise
                except Exception as error:
                    found.append(f" ({type(error).__name__})")
        self._log.append(f"change{index}{found[0]}")
        assert found[0] == found[1], self._log

    def _step(self, function: Callable[..., Any], x: Tensor, y: Tensor) -> bool:
        seed = self._rng.randrange(1 << 30)
        self._log.append(f"{self._mode} {tuple(x.shape)}")
        self.outcome.steps += 1
        with self._context():
            left = call(function, self.left, x, seed)
            right = call(self.right.net, self.right, y, seed)
        raised = isinstance(right["answer"], tuple) and right["answer"][0] == "raised"
        assert not (raised and right["answer"][2]), f"{right['answer']}\n{self._program.source}"
        self.outcome.raised += raised
        # One walk, so that tensors which the answer shares with the state are found to be shared in both.
        left |= {"x": x, "state": self.left.state()}
        right |= {"x": y, "state": self.right.state()}
        self.outcome.wrong = difference(left, right)
        return not self.outcome.wrong

    def _context(self) -> AbstractContextManager[Any]:
        return MODES[self._mode]()

    def report(self) -> str:
        """What went wrong, the program and the calls made."""
        calls = ", ".join(self._log)
        return f"seed {self._program.seed}: {self.outcome.wrong}\n{self._program.source}\ncalls: {calls}"


def explain(seed: int, recipe: Recipe, wrap: Callable[[nn.Module], Any], changes: float, steps: int) -> str:
    """Of a program that goes wrong, or its smallest part that does too, what there is to know."""
    for only in (*range(recipe.most), None):
        program = Program(seed, recipe, only)
        if program.actions:
            drive = Drive(program, wrap, changes)
            if drive.run(steps).wrong:
                return drive.report()
    raise AssertionError(f"seed {seed} goes wrong only sometimes")
