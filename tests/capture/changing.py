"""Actions that change some state at every call, or read a value on the host."""

from __future__ import annotations

from collections.abc import Callable

from tests.capture.actions import QUIET, SETTLING, TENSOR, Action, Draw, reads_a_size, reads_an_order

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
        return Action(
            [write.format(t=f"self.t{n}"), f"y = y + self.t{n}"], "changes", [f"self.t{n}.zero_()"], init=init
        )
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


def makes_an_attribute(draw: Draw) -> Action:
    n = draw.number
    owner, above, init = draw.rng.choice(
        [
            (f"note{n}", [f"def note{n}():", "    pass"], []),
            (f"note{n}", [f"note{n} = partial(first)"], []),
            (f"note{n}", [f"note{n} = torch.zeros(1)"], []),
            (f"self.w{n}", [], [f"self.w{n} = nn.Parameter(torch.zeros(1))"]),
        ]
    )
    body = [f"{owner}.calls = getattr({owner}, 'calls', 0) + 1", f"y = y * ({owner}.calls % 5)"]
    changes = [f"vars({owner}).pop('calls', None)"] if owner.startswith("self") else []
    return Action(body, "changes", changes, above=above, init=init)


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
    return Action(
        [body, f"y = self.n{n}(y)", "y = y * (2.0 if self.training else 1.0)"],
        "changes",
        init=[f"self.n{n} = nn.Dropout(0.5)"],
    )


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
    init += ["def hook(module, args, y, self=self):", f"    {count} += 1", f"    return y * ({count} % 3)"]
    init += [f"self.i{n}.register_forward_hook(hook)"]
    return Action([f"y = self.i{n}(y)"], "changes", init=init)


def changes_an_array(draw: Draw) -> Action:
    p = draw.place("np.array([1.0, 2.0])")
    write = draw.one("{}[0] += 1", "{}[:] = {}[::-1].copy()", "np.add({}, 1, out={})")
    return Action([write.replace("{}", p.get), f"y = y + float({p.get}[0])"], "changes", [f"{p.get}[0] = 5"], [p])


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
    *QUIET,
    *SETTLING,
    counts,
    rebinds_a_tensor,
    writes_a_tensor,
    rebinds_a_weight,
    two_names_of_one_tensor,
    keeps_a_history,
    changes_an_order,
    makes_an_attribute,
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
