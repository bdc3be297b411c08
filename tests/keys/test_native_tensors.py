"""What the compiled guard sees of tensors, and its agreement with Python over random structures and changes."""

from __future__ import annotations

import gc
import sys
from collections import OrderedDict, deque
from collections.abc import Callable
from types import CellType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from graphcache.keys.native import probe
from graphcache.keys.native.probe import Disagreement, prepare
from tests.keys.compiled_guard import compile_guard, fields, items_of


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compile_guard(tmp_path_factory)


class Sub(Tensor):
    pass


# ---- tensors

CHANGES: dict[str, Callable[[Tensor], object]] = {
    "data": lambda x: setattr(x, "data", torch.zeros(x.shape)),
    "data of the same memory and another dtype": lambda x: setattr(x, "data", x.detach().view(torch.int32)),
    "data of the same memory, expanded": lambda x: setattr(x, "data", x.detach()[:1].expand(x.shape)),
    "set_": lambda x: x.set_(torch.zeros(60).untyped_storage(), 0, x.shape, x.stride()),
    "another offset": lambda x: x.set_(x.untyped_storage(), 1, (2, 3), (3, 1)),
    "resize_": lambda x: x.resize_(200),
    "fewer rows": lambda x: x.resize_(3, 3),
    "as_strided_": lambda x: x.as_strided_((4, 3), (1, 4)),
    "transpose_": lambda x: x.transpose_(0, 1),
    "unsqueeze_": lambda x: x.unsqueeze_(0),
    "seven dimensions": lambda x: x.as_strided_((1, 1, 1, 1, 4, 3, 1), (1,) * 7),
    "no dimension": lambda x: x.as_strided_((), ()),
    "freed memory": lambda x: x.untyped_storage().resize_(0),
    "more memory": lambda x: x.untyped_storage().resize_(1 << 20),
    "swap_tensors": lambda x: torch.utils.swap_tensors(x, torch.zeros(4, 3)),
    "conjugated": lambda x: setattr(x, "data", torch._neg_view(x.detach())),
    "class": lambda x: setattr(x, "__class__", Sub),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["tensor", "parameter"])
def test_changes_of_a_tensor(library: Any, change: str, kind: str) -> None:
    with torch.no_grad():
        x = torch.rand(4, 3)
        x = nn.Parameter(x, requires_grad=False) if kind == "parameter" else x
        other, guard = torch.zeros(2), library.Guard()
        guard.add_tensor(other)
        guard.add_tensor(x)
        assert guard.holds()
        CHANGES[change](x)
        assert not guard.holds()
        assert guard.changed() == 1


def test_what_leaves_a_tensor_as_it_is(library: Any) -> None:
    x, guard = nn.Parameter(torch.rand(4, 3)), library.Guard()
    guard.add_tensor(x)
    with torch.no_grad():
        x.fill_(2)
        x.data.mul_(2)
        x.requires_grad_(False)
        x.requires_grad_(True)
        x.data = x.data
        x.data = x.data[:]
    (x * 2).sum().backward()
    x.grad = None
    x.attribute = 1  # type: ignore[attr-defined]
    assert guard.holds()


def test_back_as_it_was(library: Any) -> None:
    x = torch.rand(2, 2, 2, 2, 2, 2, 2)
    shape, stride, kept = x.shape, x.stride(), x.detach()
    guard = library.Guard()
    guard.add_tensor(x)
    for _ in range(3):
        x.resize_(2, 2)
        assert not guard.holds()
        x.as_strided_(shape, stride)
        assert guard.holds()
        x.data = torch.rand(2)
        assert not guard.holds()
        x.data = kept
        assert guard.holds()


def test_modules(library: Any) -> None:
    def of(module: nn.Module) -> Any:
        guard = library.Guard()
        for x in (*module.parameters(), *module.buffers()):
            guard.add_tensor(x)
        return guard

    for change, holds in (
        (lambda m: m.to(torch.float64), False),
        (lambda m: m.half(), False),
        (lambda m: m.to(torch.float32), True),
        (lambda m: m.requires_grad_(False), True),
        (lambda m: m.load_state_dict(m.state_dict()), True),
        (lambda m: m.to(memory_format=torch.channels_last), False),
        (lambda m: m.share_memory(), False),
    ):
        module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))
        guard = of(module)
        assert guard.holds()
        change(module)  # type: ignore[no-untyped-call]
        assert guard.holds() == holds


def test_kinds_of_tensors(library: Any) -> None:
    x = torch.rand(4, 3)
    with torch.inference_mode():
        inference = torch.rand(2)
    dense = [
        *(x, x.T, x[1:], x[0, 0], x.expand(2, 4, 3), torch.empty(0), torch.empty(0, 3), inference, x.detach()),
        *(torch.ones(2, dtype=torch.complex64).conj(), torch._neg_view(x), torch.rand(2, requires_grad=True) * 2),
        *(torch.from_numpy(x.numpy()), nn.Buffer(x), nn.Parameter(x), torch.zeros(2, dtype=torch.bool)),
    ]
    guard = library.Guard()
    for each in dense:
        guard.add_tensor(each)
        data, offset, keys, _, sizes, strides = library.read(each)
        assert (data, offset, keys, each.dtype, sizes, strides, each._cdata) == fields(each)
    assert guard.holds()
    assert len(guard) == len(dense)
    refused = [
        *(x.to_sparse(), x.to_mkldnn(), x.to("meta"), x.as_subclass(Sub), torch._to_functional_tensor(x)),
        *(torch._efficientzerotensor((2,)), nn.UninitializedParameter()),
    ]
    for each in refused:
        with pytest.raises(TypeError, match=r"is not torch\.Tensor or|is not a dense one"):
            guard.add_tensor(each)
        with pytest.raises(TypeError):
            library.read(each)

    def inside(value: Tensor) -> Tensor:
        with pytest.raises(TypeError, match="is not a dense one"):
            guard.add_tensor(value)
        return value

    torch.func.vmap(inside)(x)
    torch.func.grad(lambda value: inside(value).sum())(x)
    assert len(guard) == len(dense)


def test_tensors_die_with_their_guard(library: Any) -> None:
    x = torch.rand(3)
    before = sys.getrefcount(x), x._use_count()  # type: ignore[attr-defined]
    for _ in range(10_000):
        guard = library.Guard()
        guard.add_tensor(x)
        assert guard.holds()
    del guard
    gc.collect()
    assert (sys.getrefcount(x), x._use_count()) == before  # type: ignore[attr-defined]


# ---- the probe


def test_the_library_is_held_against_python(library: Any) -> None:
    def lying(**lies: Any) -> Any:
        names = ("probe", "read", "Guard", "use_shortcuts")
        return SimpleNamespace(**{name: getattr(library, name) for name in names} | lies)

    def another_stride(x: Tensor) -> Any:
        *others, strides = library.read(x)
        return (*others, strides[1:])

    prepare(lying())
    with pytest.raises(Disagreement, match=r"^the fields of a torch.float32 tensor"):
        prepare(lying(read=another_stride))

    used: list[bool] = []

    class Blind:
        """Misses every write while short cuts are used, as CPython 3.13.0 does some."""

        def __init__(self) -> None:
            self.guard = library.Guard()
            self.add_dict = self.guard.add_dict

        def holds(self) -> bool:
            return used[-1] or self.guard.holds()

    prepare(lying(Guard=Blind, use_shortcuts=used.append))
    assert used == [True, False]
    used.clear()
    with pytest.raises(Disagreement, match=r"^a write to a dictionary: _Plain, kind 0$"):
        prepare(lying(Guard=Blind, use_shortcuts=lambda wanted: used.append(True)))


def test_fields_that_are_not_found(library: Any) -> None:
    samples = tuple(map(probe._described, probe._samples(3)))
    types = (Tensor, nn.Parameter)
    names = ("impl", "storage", "data", "offset", "keys", "dtype", "rank")
    try:
        for name in ("data", "offset", "keys", "dtype", "rank"):
            wrong = list(samples[0])
            wrong[names.index(name) + 1] += 1
            with pytest.raises(RuntimeError, match=f"^the place of the {name} of a tensor is unknown: 0 candidates"):
                library.probe((tuple(wrong), *samples[1:]), types, 1, 1)
            with pytest.raises(TypeError, match="Tensor is not"):
                library.Guard().add_tensor(torch.zeros(2))
        with pytest.raises(RuntimeError, match=r"^the place of the \w+ of a tensor is unknown: \d+ candidates"):
            library.probe(samples[:1], types, 1, 1)
        misshapen = (*samples[-1][:8], (9, 9), samples[-1][9])
        with pytest.raises(RuntimeError, match="sizes and strides of a tensor is unknown"):
            library.probe((*samples[:-1], misshapen), types, 1, 1)
        for wrong_samples in ((), samples * 9, ((1, 2),)):
            with pytest.raises((ValueError, TypeError)):
                library.probe(wrong_samples, types, 1, 1)
    finally:
        prepare(library)


# ---- random structures and random changes, held against Python

POOL = ("text", 1000, 1000.0, None, True, (), ("a",), object(), [], 10**30)


class Slotted:
    __slots__ = ("one",)


class A:
    pass


class B:
    pass


class Held:
    """One entry of a guard and what Python says of it."""

    def __init__(self, kind: str, values: list[Any]) -> None:
        self.kind = kind
        self.thing: Any = None
        pairs = list(enumerate(values))
        if kind in ("dict", "ordered"):
            self.thing = dict(pairs) if kind == "dict" else OrderedDict(pairs)
        elif kind in ("list", "deque"):
            self.thing = list(values) if kind == "list" else deque(values, maxlen=12)
        elif kind == "set":
            self.thing = {value for value in values if value.__hash__ is not None}
        elif kind == "cell":
            self.thing = CellType(*values[:1])
        elif kind == "slot":
            self.thing = Slotted()
            if values:
                self.thing.one = values[0]
        elif kind == "tensor":
            self.thing = torch.zeros(3, 4)
        else:
            self.thing = A()
            self.thing.__dict__ = {"a": 1}
        self.expected = self.found()

    def found(self) -> tuple[Any, ...]:
        """What must stay as it is; compared by identity, but for numbers about a tensor."""
        if self.kind in ("dict", "ordered"):
            keys, values = items_of(self.thing)
            return keys + values
        if self.kind == "cell":
            try:
                return (self.thing.cell_contents,)
            except ValueError:
                return ()
        if self.kind == "slot":
            return (self.thing.one,) if hasattr(self.thing, "one") else ()
        if self.kind == "class":
            return (type(self.thing),)
        if self.kind == "dict of":
            return (self.thing.__dict__,)
        return fields(self.thing) if self.kind == "tensor" else tuple(self.thing)

    def same(self) -> bool:
        """What Python says."""
        found = self.found()
        if self.kind == "tensor":
            return found == self.expected
        return len(found) == len(self.expected) and all(map(lambda a, b: a is b, found, self.expected))

    def add_to(self, guard: Any) -> None:
        """Let a guard hold it as it is."""
        if self.kind in ("dict", "ordered"):
            guard.add_dict(self.thing, *items_of(self.thing))
        elif self.kind == "cell":
            guard.add_cell(self.thing, *self.expected)
        elif self.kind == "slot":
            guard.add_slot(self.thing, Slotted.__dict__["one"], *self.expected)
        elif self.kind == "class":
            guard.add_class(self.thing, *self.expected)
        elif self.kind == "dict of":
            guard.add_dict_of(self.thing, *self.expected)
        elif self.kind == "tensor":
            guard.add_tensor(self.thing)
        else:
            guard.add_items(self.thing, self.expected)

    def change(self, how: int, value: Any) -> None:
        """Do something to it, which may change nothing."""
        changes = getattr(self, f"_{self.kind.replace(' ', '_')}")
        changes[how % len(changes)](self, value)

    def _restore_items(self, _: Any) -> None:
        half = len(self.expected) // 2
        self.thing.clear()
        self.thing.update(zip(self.expected[:half], self.expected[half:], strict=True))

    def _restore_values(self, _: Any) -> None:
        self.thing.clear()
        (self.thing.update if self.kind == "set" else self.thing.extend)(self.expected)

    def _first(self) -> Any:
        return next(iter(self.thing), None)

    _dict = (
        lambda self, value: self.thing.__setitem__(self._first(), value),
        lambda self, value: self.thing.__setitem__(9, value),
        lambda self, value: self.thing.pop(self._first(), None),
        lambda self, value: self.thing.update(dict.fromkeys(self.thing, value)),
        lambda self, value: self.thing.clear(),
        lambda self, value: self.thing.__setitem__(self._first(), self.thing.pop(self._first(), None)),
        _restore_items,
    )
    _ordered = (
        *_dict,
        lambda self, value: self.thing and self.thing.move_to_end(self._first()),
        lambda self, value: self.thing and self.thing.move_to_end(next(reversed(self.thing)), last=False),
    )
    _list = (
        lambda self, value: self.thing.append(value),
        lambda self, value: self.thing and self.thing.pop(),
        lambda self, value: self.thing and self.thing.__setitem__(len(self.thing) // 2, value),
        lambda self, value: self.thing.reverse(),
        lambda self, value: self.thing.clear(),
        _restore_values,
    )
    _deque = (
        *_list,
        lambda self, value: self.thing.rotate(),
        lambda self, value: self.thing.rotate(-1),
        lambda self, value: self.thing.appendleft(value),
    )
    _set = (
        lambda self, value: self.thing.add(str(value)),
        lambda self, value: self.thing.discard(self._first()),
        lambda self, value: self.thing.update(range(50)),
        lambda self, value: self.thing.clear(),
        _restore_values,
    )
    _cell = (
        lambda self, value: setattr(self.thing, "cell_contents", value),
        lambda self, value: delattr(self.thing, "cell_contents"),
    )
    _slot = (
        lambda self, value: setattr(self.thing, "one", value),
        lambda self, value: hasattr(self.thing, "one") and delattr(self.thing, "one"),
    )
    _class = (
        lambda self, value: setattr(self.thing, "__class__", A),
        lambda self, value: setattr(self.thing, "__class__", B),
    )
    _dict_of = (
        lambda self, value: setattr(self.thing, "__dict__", {"a": value}),
        lambda self, value: setattr(self.thing, "__dict__", self.expected[0]),
        lambda self, value: setattr(self.thing, "a", value),
    )
    _tensor = (
        lambda self, value: self.thing.resize_(3, 4),
        lambda self, value: self.thing.resize_(4, 3),
        lambda self, value: self.thing.resize_(3, 4).as_strided_((2, 2), (1, 2), 1),
        lambda self, value: self.thing.fill_(1),
        lambda self, value: setattr(self.thing, "data", self.thing.detach().clone()),
        lambda self, value: setattr(self.thing, "data", self.thing.detach()),
    )


KINDS = ("dict", "ordered", "list", "deque", "set", "cell", "slot", "class", "dict of", "tensor")


@given(data=st.data(), shortcuts=st.booleans())
def test_a_guard_says_what_python_says(library: Any, data: st.DataObject, shortcuts: bool) -> None:
    pool = st.sampled_from(POOL)
    some = st.tuples(st.sampled_from(KINDS), st.lists(pool, max_size=8))
    held = [Held(kind, values) for kind, values in data.draw(st.lists(some, min_size=1, max_size=8))]
    guard = library.Guard()
    for each in held:
        each.add_to(guard)
    library.use_shortcuts(shortcuts)
    try:
        assert guard.holds()
        steps = st.tuples(st.integers(0, len(held) - 1), st.integers(0, 63), pool, st.booleans())
        for at, how, value, look in data.draw(st.lists(steps, max_size=20)):
            held[at].change(how, value)
            if look:
                same = [each.same() for each in held]
                assert guard.holds() == all(same)
                assert guard.changed() == (-1 if all(same) else same.index(False))
    finally:
        library.use_shortcuts(True)
