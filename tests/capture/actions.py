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


def reads_a_tensor(draw: Draw) -> Action:
    p = draw.place(TENSOR)
    changes = [f"{p.get}.data = {p.get} * 2", f"{p.get}.mul_(2)", f"{p.get}[0] = 3", f"{p.get}.numpy()[1] = 4"]
    changes += [f"{p.get}.set_(torch.full((3,), 7.0))", *_puts(p, f"{p.get} + 1", "torch.ones(3, 2)[:, 0]", f"{p.get}.clone()")]
    return Action([f"y = y + {p.get}"], "none", changes, [p])


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
        f"self.l{n}._parameters['weight'], self.k{n}._parameters['weight'] = "
        f"self.k{n}._parameters['weight'], self.l{n}._parameters['weight']",
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


# ---- something changes until it has settled


def restores_what_it_sets(draw: Draw) -> Action:
    p = draw.place("1.5", True)
    body = [f"kept = {p.get}", p.put % f"kept + x.shape[0]", f"y = y * {p.get}", p.put % "kept"]
    return Action(body, "settles", [p.put % f"{p.get} + 1"], [p], arguments=True)


def builds_a_table(draw: Draw) -> Action:
    p = draw.place("None")
    value = draw.one("2.0", TENSOR, "y.new_full((3,), 0.5)")
    return Action([f"if {p.get} is None:", "    " + p.put % value, f"y = y * {p.get}"], "settles", [p.put % "None"], [p])


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


# ---- something changes at every call


def counts(draw: Draw) -> Action:
    p = draw.place("0", True)
    limit = draw.rng.randrange(2, 12)
    after = draw.one(f"y = y * (1.0 if {p.get} < {limit} else 0.5)", "y = y + 1", f"y = y + {p.get} % 5")
    return Action([p.put % f"{p.get} + 1", after], "changes", [p.put % "0"], [p])


def rebinds_a_tensor(draw: Draw) -> Action:
    p = draw.place("torch.zeros(3)")
    new = draw.one(f"torch.tanh(y.mean(0) + {p.get})", "y[0].clone()", "y[0]", "y.detach().sum(0)", f"{p.get} + 1")
    return Action([p.put % new, f"y = y + {p.get}"], "changes", [p.put % "torch.zeros(3)"], [p])


WRITES = (
    "{t}.add_(y.mean(0))",
    "{t}[0].add_(1)",
    "{t}[:2] = y[0, :2]",
    "torch.add({t}, y[0], out={t})",
    "{t}.numpy()[1] += 1",
    "{t}.detach().mul_(0.5)",
    "{t}.data.add_(1)",
    "torch._foreach_add_([{t}], 1.0)",
    "{t}.copy_(y[0])",
    "{t}.set_({t} * 2)",
    "{t}.data = {t} * 2",
    "{t}.view(-1).t().sub_(1)",
    "{t}.index_add_(0, torch.tensor([0]), y[0, :1])",
    "F.relu({t}, inplace=True)",
    "{t} += 1",
)


def writes_a_tensor(draw: Draw) -> Action:
    n = draw.number
    write = draw.one(*WRITES)
    if draw.rng.random() < 0.3:
        init = [draw.one(f"self.register_buffer('t{n}', torch.zeros(3))", f"self.t{n} = nn.Parameter(torch.zeros(3))")]
        return Action([write.format(t=f"self.t{n}"), f"y = y + self.t{n}"], "changes", [f"self.t{n}.zero_()"], init=init)
    p = draw.place(TENSOR)
    lines = [f"t = {p.get}", write.format(t="t"), "y = y + t", "del t"]
    return Action(lines, "changes", [f"{p.get}.zero_()"], [p])


def rebinds_a_weight(draw: Draw) -> Action:
    n = draw.number
    init = [f"self.register_buffer('t{n}', torch.zeros(3))", f"self.w{n} = nn.Parameter(torch.zeros(3))"]
    body = draw.one(
        f"self.t{n} = self.t{n} + 1",
        f"self.t{n} = y[0].clone()",
        f"self.w{n} = nn.Parameter(self.w{n} + 1, requires_grad=False)",
        f"self._buffers['t{n}'] = self.t{n} + 1",
        f"self.t{n}, self.w{n}.data = self.w{n}.data + 1, self.t{n}",
        f"del self.t{n}; self.t{n} = torch.ones(3)",
        f"self.w{n}.grad = y[0].clone()",
        f"self.w{n}.requires_grad_(not self.w{n}.requires_grad).requires_grad_(False); self.t{n} = self.t{n} - 1",
    )
    return Action([*body.split("; "), f"y = y + self.t{n} + self.w{n}"], "changes", [f"self.t{n}.zero_()"], init=init)


def two_names_of_one_tensor(draw: Draw) -> Action:
    p, q = draw.place(TENSOR), draw.place(TENSOR)
    body = draw.one(f"{p.put % q.get}|{p.get}.add_(1)", f"{p.get}.mul_(2)|{q.put % p.get}", p.put % f"{q.get}[:]")
    return Action([*body.split("|"), f"y = y + {p.get} + {q.get}"], "changes", [p.put % TENSOR], [p, q])


def keeps_a_history(draw: Draw) -> Action:
    value, body = draw.rng.choice(
        [
            ("[]", "{e}.append(y[0].clone())|{e}[:] = {e}[-3:]"),
            ("deque([torch.zeros(3)] * 3, maxlen=3)", "{e}.append(y[0].clone())"),
            ("{}", "{e}[len({e}) % 3] = y[0]|{e}[0] = y[0].clone()"),
            ("[torch.zeros(3)]", "{e}[0] = {e}[0] + 1"),
            ("{'k': None}", "{e}['k'] = y[0] * 1 if {e}['k'] is None else 0.5 * {e}['k'] + y[0]"),
            ("OrderedDict()", "{e}[len({e})] = y[0].clone()|len({e}) > 2 and {e}.popitem(last=False)"),
        ]
    )
    p = draw.place(value)
    read = f"list({p.get}{'.values()' if 'ict' in value or '{' in value else ''})"
    return Action([*body.format(e=p.get).split("|"), f"y = y + torch.stack({read}).mean(0)"], "changes", [], [p])


def changes_an_order(draw: Draw) -> Action:
    action = reads_an_order(draw)
    return Action([*action.changes, *action.body], "changes", [], action.places)


def changes_a_size(draw: Draw) -> Action:
    action = reads_a_size(draw)
    if "pop" in action.changes[0]:
        action.changes = [f"{action.places[0].get}[:] = {action.places[0].get}[1:] + [5]"]
        action.body = [f"y = y * {action.places[0].get}[0]"]
    return Action([*action.changes, *action.body], "changes", [], action.places)


def toggles(draw: Draw) -> Action:
    value, new, read = draw.rng.choice(
        [
            ("True", "not {}", "(2.0 if {} else 1.0)"),
            ("1.0", "-{}", "{}"),
            ("'a'", "{{'a': 'b', 'b': 'a'}}[{}]", "{{'a': 2.0, 'b': 3.0}}[{}]"),
            ("None", "None if {} else (1,)", "(2.0 if {} else 1.0)"),
            ("(1, 2)", "{}[::-1]", "{}[0]"),
        ]
    )
    p = draw.place(value)
    return Action([f"y = y * {read.format(p.get)}", p.put % new.format(p.get)], "changes", [], [p])


def replaces_by_an_equal(draw: Draw) -> Action:
    value, new = draw.rng.choice([("[1.0]", "list({})"), ("{'k': 1.0}", "dict({})"), ("Box(1.0)", "Box({}.v)")])
    p = draw.place(value)
    return Action([p.put % new.format(p.get), "y = y + 1"], "changes", [], [p])


def advances_an_iterator(draw: Draw) -> Action:
    value = draw.one(
        "itertools.count(3)",
        "counting(3)",
        "iter(range(1000))",
        "iter(list(range(1000)))",
        "map(abs, range(1000))",
        "itertools.cycle([1, 2, 3])",
        "itertools.chain(range(1000), range(1000))",
        "(n * 2 for n in range(1000))",
        "reversed(range(1000))",
    )
    p = draw.place(value)
    return Action([f"y = y + next({p.get}) % 7"], "changes", [f"next({p.get})"], [p])


def draws_of_its_own(draw: Draw) -> Action:
    value, read = draw.rng.choice(
        [
            ("random.Random(1)", "{}.random()"),
            ("random.Random(2)", "len(str({}.getrandbits(20)))"),
            ("np.random.default_rng(1)", "float({}.random())"),
            ("np.random.RandomState(1)", "float({}.rand())"),
            ("torch.Generator().manual_seed(1)", "torch.rand(3, generator={})"),
        ]
    )
    p = draw.place(value)
    return Action([f"y = y + {read.format(p.get)}"], "changes", [], [p])


def draws(draw: Draw) -> Action:
    read = draw.one(
        "random.random()",
        "float(np.random.rand())",
        "torch.rand(3)",
        "torch.randn_like(y)",
        "F.dropout(y, 0.5)",
        "random.choice([1.0, 2.0])",
        "torch.empty(3).uniform_()",
        "float(torch.rand(()))",
    )
    return Action([f"y = y + {read}"], "changes")


def shuffles(draw: Draw) -> Action:
    p = draw.place("[1.0, 2.0, 3.0]")
    return Action([f"random.shuffle({p.get})", f"y = y * {p.get}[0]"], "changes", [], [p])


def writes_its_argument(draw: Draw) -> Action:
    body = draw.one("x.add_(1)", "x[0].zero_()", "x.view(-1)[:2].mul_(2)", "x.numpy()[0] += 1", "x.data = x * 2")
    return Action([body, "y = y + x"], "changes", arguments=True)


def moves_submodules(draw: Draw) -> Action:
    n = draw.number
    init = [f"self.l{n} = nn.Linear(3, 3)", f"self.k{n} = nn.Linear(3, 3)"]
    body = draw.one(
        f"self.l{n}, self.k{n} = self.k{n}, self.l{n}",
        f"self.l{n} = nn.Linear(3, 3).requires_grad_(False)",
        f"self._modules['l{n}'] = self._modules.pop('l{n}')",
        f"self.l{n}.weight.data = self.l{n}.weight.data * 0.5",
        f"self.l{n}.bias = None if self.l{n}.bias is not None else nn.Parameter(torch.ones(3), requires_grad=False)",
        f"self.l{n}.__dict__.update(k=self.l{n}.__dict__.get('k', 0) + 1)",
        f"self.l{n}.__setstate__({{**self.l{n}.__dict__, 'k': 1, 'bias': None}})",
        f"self.l{n}.__class__ = type('Linear', (nn.Linear,), {{}})",
        f"self.add_module('l{n}', self.k{n})",
    )
    return Action([body, f"y = self.l{n}(y)"], "changes", init=init)


def flips_training(draw: Draw) -> Action:
    n = draw.number
    body = draw.one("self.train(not self.training)", "self.training = not self.training", f"self.n{n}.training ^= True")
    return Action([body, f"y = self.n{n}(y)", "y = y * (2.0 if self.training else 1.0)"], "changes", init=[f"self.n{n} = nn.Dropout(0.5)"])


def moves_hooks(draw: Draw) -> Action:
    n = draw.number
    body = draw.one(
        f"self.l{n}.register_forward_hook(lambda module, args, y: y + 1)",
        f"self.l{n}._forward_hooks.popitem() if self.l{n}._forward_hooks else self.l{n}.register_forward_hook("
        "lambda module, args, y: y * 2)",
        f"self.l{n}.register_forward_pre_hook(lambda module, args: (args[0] + 1,)) "
        f"if len(self.l{n}._forward_pre_hooks) < 3 else self.l{n}._forward_pre_hooks.clear()",
    )
    return Action([body, f"y = self.l{n}(y)"], "changes", init=[f"self.l{n} = nn.Linear(3, 3)"])


def counts_in_a_hook(draw: Draw) -> Action:
    n = draw.number
    init = [f"self.i{n} = nn.Identity()", f"self.seen{n} = {draw.one('0', '[0]', 'Box(0)')}"]
    count = {"0": f"self.seen{n}", "[0]": f"self.seen{n}[0]", "Box(0)": f"self.seen{n}.v"}[init[1].split(" = ")[1]]
    init += [f"def hook(module, args, y, self=self):", f"    {count} += 1", f"    return y * ({count} % 3)"]
    init += [f"self.i{n}.register_forward_hook(hook)"]
    return Action([f"y = self.i{n}(y)"], "changes", init=init)


def changes_an_array(draw: Draw) -> Action:
    p = draw.place("np.array([1.0, 2.0])")
    write = draw.one("{}[0] += 1", "{}[:] = {}[::-1].copy()", "np.add({}, 1, out={})")
    return Action([write.replace("{}", p.get), f"y = y + float({p.get}[0])"], "changes", [f"{p.get}[0] = 5"], [p])


def reads_an_array(draw: Draw) -> Action:
    value = draw.one("np.array([1.0, 2.0])", "bytearray(b'abc')", "array('d', [1.0])")
    p = draw.place(value)
    return Action([f"y = y + float({p.get}[0])"], "none", [f"{p.get}[0] = 5"], [p])


def changes_bytes(draw: Draw) -> Action:
    p = draw.place(draw.one("bytearray(b'abc')", "array('i', [1, 2])"))
    return Action([f"{p.get}[0] = ({p.get}[0] + 1) % 100", f"y = y + {p.get}[0]"], "changes", [], [p])


# ---- the host reads


def reads_on_the_host(draw: Draw) -> Action:
    body = draw.one(
        "y = y * 2 if y.sum() > 0 else y * 3",
        "y = y * elsewhere(y)",
        "y = y + max(y.flatten().tolist())",
        "y = y + float(y.numpy()[0, 0])",
        "y = y + len(y[y > 0])",
        "y = y * 2 if pool.submit(lambda: bool(y.sum() > 0)).result() else y * 3",
    )
    return Action([body], "reads")


def keeps_what_it_reads(draw: Draw) -> Action:
    p = draw.place("0.0", True)
    return Action([p.put % f"round({p.get} + float(y[0, 0]), 3)", f"y = y + {p.get}"], "changes", [], [p])


ACTIONS: tuple[Callable[[Draw], Action], ...] = (
    reads_a_number,
    reads_a_tensor,
    reads_a_choice,
    reads_a_size,
    reads_an_order,
    compares_two_places,
    runs_a_layer,
    reads_the_training_flag,
    reads_an_array,
    restores_what_it_sets,
    builds_a_table,
    grows_a_memo,
    calls_a_cached_function,
    adds_a_hook_once,
    counts_to_three,
    counts,
    rebinds_a_tensor,
    writes_a_tensor,
    rebinds_a_weight,
    two_names_of_one_tensor,
    keeps_a_history,
    changes_an_order,
    changes_a_size,
    toggles,
    replaces_by_an_equal,
    advances_an_iterator,
    draws_of_its_own,
    draws,
    shuffles,
    writes_its_argument,
    moves_submodules,
    flips_training,
    moves_hooks,
    counts_in_a_hook,
    changes_an_array,
    changes_bytes,
    reads_on_the_host,
    keeps_what_it_reads,
)
QUIET = ACTIONS[:9]
"""Those that change nothing; what they read is changed from outside."""
SETTLING = ACTIONS[9:15]
