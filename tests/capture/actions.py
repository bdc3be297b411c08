"""What generated modules do with their state within a call, and what is changed of it between calls."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from tests.capture.places import Place

Effect = Literal["none", "settles", "changes", "reads"]
"""Nothing is changed; nothing any more after some calls; something is at every call; nothing, but the host reads."""

TENSOR = "torch.full((3,), 0.5)"


@dataclass
class Action:
    """One thing that a module does in a call.

    Args:
        body: Statements over ``self``, ``x``, ``y`` and ``cache``, which leave a new ``y``.
        effect: What they do besides.
        changes: Statements for somebody outside, over ``self`` and ``cache``; each is one change between calls.
        places: Where the state is.
        init: Further lines for ``__init__``.
        above: Further lines for the globals.
        threads: Whether calls may be made from any thread.
        arguments: Whether ``x`` is used, so that the body has to stand where the arguments are at hand.
    """

    body: list[str]
    effect: Effect
    changes: list[str] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    init: list[str] = field(default_factory=list)
    above: list[str] = field(default_factory=list)
    threads: bool = True
    arguments: bool = False


class Draw:
    """Chance, and new places."""

    def __init__(self, rng: random.Random, number: int, place: Callable[[int, str, bool], Place]) -> None:
        self.rng = rng
        self.number = number
        self._place = place
        self._places = 0

    def place(self, value: str, numbers: bool = False) -> Place:
        self._places += 1
        return self._place(10 * self.number + self._places, value, numbers)

    def one(self, *options: str) -> str:
        return self.rng.choice(options)


def _puts(place: Place, *values: str) -> list[str]:
    """Changes from outside: another value, and another structure with another value."""
    return [(place.put if index % 2 else place.whole) % value for index, value in enumerate((*values, values[0]))]


# ---- nothing changes


def reads_a_number(draw: Draw) -> Action:
    p = draw.place("1.5", True)
    return Action([f"y = y * {p.get}"], "none", _puts(p, f"{p.get} + 1", f"-{p.get}", "0.25"), [p])


def reads_what_its_class_defines(draw: Draw) -> Action:
    name = f"self.k{draw.number}"
    changes = [f"{name} = 3.0", f"vars(self).pop('k{draw.number}', None)", f"type(self).k{draw.number} = 4.0"]
    return Action([f"y = y * {name}"], "none", changes, init=[f"type(self).k{draw.number} = 2.0"])


def reads_a_tensor(draw: Draw) -> Action:
    p = draw.place(TENSOR)
    changes = [f"{p.get}.data = {p.get} * 2", f"{p.get}.mul_(2)", f"{p.get}[0] = 3", f"{p.get}.numpy()[1] = 4"]
    changes += [
        f"{p.get}.set_(torch.full((3,), 7.0))",
        *_puts(p, f"{p.get} + 1", "torch.ones(3, 2)[:, 0]", f"{p.get}.clone()"),
    ]
    return Action([f"y = y + {p.get}"], "none", changes, [p])


def reads_an_attribute_that_may_be_there(draw: Draw) -> Action:
    p = draw.place(TENSOR)
    changes = [f"{p.get}.scale = 2.0", f"vars({p.get}).pop('scale', None)"]
    return Action([f"y = y * getattr({p.get}, 'scale', 1.0)"], "none", changes, [p])


def reads_a_choice(draw: Draw) -> Action:
    p = draw.place("'a'")
    body = f"y = y * {{'a': 2.0, 'b': 3.0, True: 4.0, None: 5.0}}[{p.get}]"
    return Action([body], "none", _puts(p, "'b'", "None", "True", "'a'"), [p])


def reads_a_size(draw: Draw) -> Action:
    value, change = draw.rng.choice(
        [("[0]", "append(1)"), ("{0}", "add(len({e}))"), ("{'k': 0}", "__setitem__(len({e}), 0)"), ("[3, 4]", "pop()")]
    )
    p = draw.place(value)
    return Action([f"y = y * len({p.get})"], "none", [p.get + "." + change.format(e=p.get)], [p])


def reads_an_order(draw: Draw) -> Action:
    value, read, change = draw.rng.choice(
        [
            ("[1.0, 2.0, 3.0]", "{}[0]", "{}.reverse()"),
            ("deque([1.0, 2.0, 3.0])", "{}[0]", "{}.rotate()"),
            ("{'a': 1.0, 'b': 2.0}", "next(iter({}.values()))", "{0}['a'] = {0}.pop('a')"),
            ("OrderedDict(a=1.0, b=2.0)", "next(iter({}.values()))", "{0}.move_to_end(next(iter({0})))"),
        ]
    )
    p = draw.place(value)
    return Action([f"y = y * {read.format(p.get)}"], "none", [change.format(p.get)], [p])


def compares_two_places(draw: Draw) -> Action:
    p, q = draw.place("None"), draw.place("None")
    return Action([f"y = y * (2.0 if {p.get} is {q.get} else 3.0)"], "none", _puts(p, "'b'", "None"), [p, q])


def runs_a_layer(draw: Draw) -> Action:
    n = draw.number
    init = [f"self.l{n} = nn.Linear(3, 3)", f"self.k{n} = nn.Linear(3, 3)"]
    changes = [
        f"self.l{n}.weight.data = self.l{n}.weight.data * 2",
        f"self.l{n}.weight.mul_(0.5)",
        f"self.l{n}, self.k{n} = self.k{n}, self.l{n}",
        f"self.l{n} = nn.Linear(3, 3).requires_grad_(False)",
        f"a, b = self.l{n}._parameters, self.k{n}._parameters; a['weight'], b['weight'] = b['weight'], a['weight']",
        f"self.l{n}.bias = None",
        f"self.l{n}.load_state_dict(self.k{n}.state_dict(), strict=False)",
        f"self.l{n}.register_forward_hook(lambda module, args, y: y * 2)",
        f"self.l{n}.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True)",
        f"self.l{n}._forward_hooks.clear()",
        f"self.l{n}.forward = lambda x: x * 3",
        f"self.l{n}.__class__ = type('Other', (nn.Linear,), {{'forward': lambda self, x: F.linear(x, self.weight)}})",
        f"self.l{n}.__dict__ = {{**self.l{n}.__dict__, '_parameters': dict(self.k{n}._parameters)}}",
    ]
    return Action([f"y = self.l{n}(y)"], "none", changes, init=init)


def reads_the_training_flag(draw: Draw) -> Action:
    n = draw.number
    body, init = draw.rng.choice(
        [("y = y * (2.0 if self.training else 1.0)", []), (f"y = self.n{n}(y)", [f"self.n{n} = nn.BatchNorm1d(3)"])]
    )
    return Action([body], "none" if not init else "changes", ["self.eval()", "self.train()"], init=init)


def reads_an_array(draw: Draw) -> Action:
    value = draw.one("np.array([1.0, 2.0])", "bytearray(b'abc')", "array('d', [1.0])")
    p = draw.place(value)
    return Action([f"y = y + float({p.get}[0])"], "none", [f"{p.get}[0] = 5"], [p])


# ---- something changes until it has settled


def restores_what_it_sets(draw: Draw) -> Action:
    p = draw.place("1.5", True)
    body = [f"kept = {p.get}", p.put % "kept + x.shape[0]", f"y = y * {p.get}", p.put % "kept"]
    return Action(body, "settles", [p.put % f"{p.get} + 1"], [p], arguments=True)


def builds_a_table(draw: Draw) -> Action:
    p = draw.place("None")
    value = draw.one("2.0", TENSOR, "y.new_full((3,), 0.5)")
    return Action(
        [f"if {p.get} is None:", "    " + p.put % value, f"y = y * {p.get}"], "settles", [p.put % "None"], [p]
    )


def grows_a_memo(draw: Draw) -> Action:
    p = draw.place("{}")
    body = [f"memo = {p.get}", "n = y.shape[0]", "if n not in memo:"]
    body += [draw.one("    memo[n] = torch.full((n, 1), 0.5 * n)", "    memo[n] = 0.5 * n"), "y = y + memo[n]"]
    return Action(body, "settles", [f"{p.get}.clear()", f"{p.get}.update({{1: 1.0, 2: 2.0, 4: 4.0}})"], [p])


def calls_a_cached_function(draw: Draw) -> Action:
    n = draw.number
    size = draw.one("None", "1")
    above = [f"@lru_cache({size})", f"def table{n}(n):", "    return torch.full((n, 1), 0.5 * n)"]
    changes = [f"table{n}.cache_clear()"]
    return Action([f"y = y + table{n}(y.shape[0])"], "settles" if size == "None" else "changes", changes, above=above)


def adds_a_hook_once(draw: Draw) -> Action:
    n = draw.number
    body = [f"if not self.l{n}._forward_hooks:"]
    body += [f"    self.l{n}.register_forward_hook(lambda module, args, y: y * 0.5)", f"y = self.l{n}(y)"]
    return Action(body, "settles", [f"self.l{n}._forward_hooks.clear()"], init=[f"self.l{n} = nn.Linear(3, 3)"])


def counts_to_three(draw: Draw) -> Action:
    p = draw.place("0", True)
    body = [f"if {p.get} < 3:", "    " + p.put % f"{p.get} + 1", f"y = y * {p.get}"]
    return Action(body, "settles", [p.put % "0"], [p])


QUIET: tuple[Callable[[Draw], Action], ...] = (
    reads_a_number,
    reads_a_tensor,
    reads_an_attribute_that_may_be_there,
    reads_a_choice,
    reads_a_size,
    reads_an_order,
    compares_two_places,
    runs_a_layer,
    reads_the_training_flag,
    reads_an_array,
)
"""Those that change nothing; what they read is changed from outside."""
SETTLING: tuple[Callable[[Draw], Action], ...] = (
    restores_what_it_sets,
    builds_a_table,
    grows_a_memo,
    calls_a_cached_function,
    adds_a_hook_once,
    counts_to_three,
)
