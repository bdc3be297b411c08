from __future__ import annotations

from collections import OrderedDict, defaultdict, deque, namedtuple
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graphcache
from graphcache import CachedModule, Reason
from graphcache.capture.trial_call import OutputLayout
from graphcache.errors import Refusal
from tests.helpers import Fn, frozen, outcomes, same, structures

Point = namedtuple("Point", "x y")
X = torch.linspace(-1, 1, 6).reshape(2, 3)


def wrapped(function: Any, **attributes: Any) -> CachedModule:
    return graphcache.wrap(frozen(Fn(function, **attributes)))


def hit(function: Any, *args: Any, **attributes: Any) -> tuple[Any, Any]:
    """The answer of a replay, and the eager one."""
    fast = wrapped(function, **attributes)
    fast(*args)
    answer = fast(*args)
    assert outcomes(fast) == (1, 1, {})
    return answer, fast.module(*args)


STRUCTURES = [
    lambda y: y,
    lambda y: [y],
    lambda y: (y,),
    lambda y: [y, y + 1],
    lambda y: (y, (y + 1, [y + 2])),
    lambda y: {"b": y, "a": y + 1},
    lambda y: Point(y, [y + 1]),
    lambda y: OrderedDict(b=y, a=3),
    lambda y: defaultdict(list, a=[y]),
    lambda y: deque([y, None], maxlen=3),
    lambda y: y.max(0),
    lambda y: torch.linalg.qr(y),
    lambda y: (None, y, None),
    lambda y: (y, 1, 1.5, True, "text", b"x", 1j, None, float("nan")),
    lambda y: (y, y.shape, y.dtype, y.device, (), [], {}),
    lambda y: ((y + 1).relu(), [])[1],
]


@pytest.mark.parametrize("make", STRUCTURES)
def test_a_replay_gives_the_structure_that_eager_gives(make):
    answer, eager = hit(lambda _, x: make(x * 2), X)
    assert same(answer, eager)
    assert type(answer) is type(eager)


@given(structures(st.sampled_from(["new", "same", "input", "view", 1, 1.5, None, "text"])))
def test_any_structure_of_any_leaves_comes_back(shape):
    def forward(_: Any, x: Tensor) -> Any:
        y = x * 2
        made = {"new": lambda: x + 1, "same": lambda: y, "input": lambda: x, "view": lambda: x[0]}
        return pytree.tree_map(lambda leaf: made[leaf]() if leaf in made else leaf, shape)

    fast = wrapped(forward)
    for x in (X, X + 5, X * -1):
        answer = fast(x)
        assert same(answer, fast.module(x))
        leaves = pytree.tree_leaves(answer)
        for leaf, what in zip(leaves, pytree.tree_leaves(shape), strict=True):
            assert (leaf is x) == (what == "input")
            if what == "view":
                assert leaf.data_ptr() == x.data_ptr()


def test_a_tensor_returned_twice_is_one_tensor():
    (one, (two, other)), _ = hit(lambda _, x: (lambda y: (y, (y, y + 1)))(x * 2), X)
    assert one is two
    assert one is not other


def test_answers_are_new_containers_every_time():
    fast = wrapped(lambda _, x: {"a": [x * 2]})
    first, second, third = (fast(X) for _ in range(3))
    second["a"].append(None)
    assert same(third, first)
    assert same(fast(X), first)


VIEWS = [
    lambda x: x,
    lambda x: x[0],
    lambda x: x[:, 1:],
    lambda x: x.t(),
    lambda x: x.view(-1),
    lambda x: x.unsqueeze(0),
    lambda x: x.expand(4, *x.shape),
    lambda x: x.detach(),
    lambda x: x.contiguous(),
    lambda x: x.to(torch.float32),
    lambda x: x.diagonal(),
]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("given_tensor", [X, torch.arange(12.0).reshape(4, 3)[1:3], torch.arange(9.0)[3:].view(2, 3)])
def test_a_view_of_an_input_is_a_view_of_the_callers_own_tensor(view, given_tensor):
    fast = wrapped(lambda _, x: (view(x), x * 2))
    fast(X)
    x = given_tensor.clone() if given_tensor is X else given_tensor
    answer, eager = fast(x), fast.module(x)
    assert fast.cache_info().hits == 1
    assert same(answer, eager)
    assert answer[0].data_ptr() == eager[0].data_ptr()
    assert (answer[0] is x) == (eager[0] is x)


def test_a_write_into_a_returned_view_reaches_the_callers_tensor():
    fast = wrapped(lambda _, x: (x[0], x * 2))
    for _ in range(2):
        x = X.clone()
        view, _ = fast(x)
        view.zero_()
        assert x[0].tolist() == [0.0] * 3


def test_inputs_keep_their_places_when_they_are_handed_back():
    fast = wrapped(lambda _, a, b: (b, a + b))
    one, two = X + 1, X + 2
    for a, b in ((one, two), (two, one), (one, one)):
        assert fast(a, b)[0] is b
        assert same(fast(a, b), (b, a + b))


def test_the_same_tensor_given_twice_does_not_spoil_calls_with_two_tensors():
    fast = wrapped(lambda _, a, b: (b, a + b))
    one, two = X + 1, X + 2
    fast(one, one)
    for _ in range(2):
        assert fast(one, two)[0] is two
    assert fast.cache_info().hits == 1


def test_an_input_that_is_handed_back_and_overlaps_another_one():
    fast = wrapped(lambda _, a, b: (b, a * 2))
    whole = torch.arange(8.0)
    for a, b in ((whole[:4], whole[2:6]), (whole[:4], whole[4:]), (whole[:4] + 1, whole[:4])):
        assert fast(a, b)[0] is b


@pytest.mark.parametrize(
    "leak",
    [
        lambda self: self.weight,
        lambda self: self.weight[0],
        lambda self: self.weight.detach(),
        lambda self: self.inner.bias,
        lambda self: self.constant.view(-1),
    ],
)
def test_state_is_handed_out_itself_and_never_as_a_copy(leak):
    module = frozen(
        Fn(
            lambda self, x: (x * 2, leak(self)),
            weight=nn.Parameter(X.clone()),
            inner=nn.Linear(2, 2),
            constant=nn.Buffer(X.clone()),
        )
    )
    fast = graphcache.wrap(module)
    for _ in range(2):
        assert fast(X)[1].data_ptr() == leak(module).data_ptr()
    assert outcomes(fast) == (0, 0, {Reason.ALIASES_STATE: 2})


def test_a_tensor_that_the_module_keeps_elsewhere_is_handed_out_itself():
    fast = wrapped(lambda self, x: (x * 2, self.kept[0]), kept=[X.clone()])
    for _ in range(2):
        assert fast(X)[1] is fast.module.kept[0]
    assert fast.cache_info().eager == {Reason.ALIASES_STATE: 2}


@pytest.mark.parametrize(
    "leaf",
    [object(), {1, 2}, X.numpy(), lambda: None, X.to_sparse(), nn.ReLU()],
    ids=lambda leaf: type(leaf).__name__,
)
def test_what_a_replay_could_not_return_again_runs_eagerly(leaf):
    fast = wrapped(lambda _, x: (x * 2, leaf))
    for _ in range(2):
        assert fast(X)[1] is leaf
    assert outcomes(fast) == (0, 0, {Reason.OUTPUT: 2})


def test_a_generator_is_run_by_the_caller():
    fast = wrapped(lambda _, x: (x * factor for factor in (1, 2)))
    for _ in range(2):
        assert [each.sum().item() for each in fast(X + 1)] == [6.0, 12.0]


def test_a_plain_value_that_depends_on_the_inputs_is_never_frozen():
    fast = wrapped(lambda _, x: (x * 2, float(x.numpy().max())))
    for x in (X, X * 3, X * 0, X + 1):
        assert same(fast(x), fast.module(x))


def test_structures_that_depend_on_the_inputs_are_never_frozen():
    fast = wrapped(lambda _, x: [x * 2] * int(x.numpy().max() + 1))
    for x in (X * 0, X, X * 3, X + 1):
        assert same(fast(x), fast.module(x))


def test_views_of_what_the_call_made_still_share_their_memory():
    (whole, part), _ = hit(lambda _, x: (lambda y: (y, y[0]))(x * 2), X)
    part.zero_()
    assert whole[0].tolist() == [0.0] * 3


VIEWS = {
    "itself": lambda y: y,
    "flat": lambda y: y.view(-1),
    "transposed": lambda y: y.t(),
    "row": lambda y: y[1],
    "columns": lambda y: y[:, :2],
    "other columns": lambda y: y[:, 2:],
    "every second": lambda y: y[:, ::2],
    "expanded": lambda y: y.expand(2, 2, 3),
    "empty": lambda y: y[:0],
    "another": lambda y: y + 1,
}


@given(st.lists(st.sampled_from(sorted(VIEWS)), min_size=2, max_size=5))
def test_outputs_that_share_elements_share_them_in_every_answer(names):
    """A graph of CUDA writes each tensor of the layout into memory of its own, as is done here."""
    made = X * 2
    leaves = [VIEWS[name](made) for name in names]
    try:
        layout = OutputLayout(leaves, [X])
    except Refusal:
        assert "itself" not in names
        assume(False)
    fresh = [torch.empty_like(tensor).copy_(tensor) for tensor in layout.tensors]
    answer = layout.builder()(fresh, [X])
    for index, name in enumerate(names):
        if name != "expanded":
            answer[index].add_(index + 1)
            leaves[index].add_(index + 1)
        assert all(map(torch.equal, answer, leaves))


@pytest.mark.parametrize(
    "answer",
    [
        lambda y: (y[:, :2], y[:, 1:]),
        lambda y: (y[:, ::2], y[:, :1], y[:, 2:]),
        lambda y: (y, y.view(torch.int32)),
    ],
)
def test_outputs_that_overlap_without_one_that_holds_them_run_eagerly(answer):
    fast = wrapped(lambda _, x: answer(x * 2))
    assert same(fast(X), fast.module(X))
    assert outcomes(fast) == (0, 0, {Reason.OUTPUT: 1})


def test_conjugates_come_back_as_they_are():
    answer, eager = hit(lambda _, z: ((z * 2).conj(), (z * 2).conj().imag), torch.tensor([1 + 2j, 3 - 1j]))
    assert [(each.is_conj(), each.is_neg()) for each in answer] == [(each.is_conj(), each.is_neg()) for each in eager]
    assert same(answer, eager)


def test_an_answer_without_any_work_is_eager():
    fast = wrapped(lambda _, x: x)
    for _ in range(2):
        assert fast(X) is X
    assert outcomes(fast) == (0, 0, {Reason.EMPTY_GRAPH: 2})


def test_an_empty_tensor_is_handed_back_too():
    fast, x = wrapped(lambda _, x: (x, x * 2)), torch.zeros(0, 3)
    for _ in range(3):
        assert fast(x)[0] is x


def test_layouts_tell_apart_what_a_graph_could_not_change():
    inputs = [X]
    values = [X * 2, [X * 2], (X * 2, 1), (X * 2, True), (X * 2, X), (X * 2, X[0]), X.double(), torch.zeros(3), None]
    layouts = [OutputLayout(value, inputs).layout for value in values]
    assert all((left == right) == (i == j) for i, left in enumerate(layouts) for j, right in enumerate(layouts))


def test_a_view_that_reads_an_input_as_another_dtype_is_refused():
    with pytest.raises(Refusal, match="reinterprets the memory of an input") as refused:
        OutputLayout(X.view(torch.int32), [X])
    assert refused.value.cause.reason is Reason.ALIASES_STATE


def test_a_builder_uses_the_inputs_of_its_own_call():
    build = OutputLayout((X[0], X * 2, 5), [X]).builder()
    other, made = X + 1, X * 3
    view, fresh, plain = build([made], [other])
    assert view.data_ptr() == other.data_ptr()
    assert fresh is made
    assert plain == 5


def test_a_tensor_that_was_made_before_its_view_is_no_view_in_a_hit():
    def forward(_, x):
        made = x * 2
        return made.view(-1), made

    fast = wrapped(forward)
    bias = torch.ones(4, requires_grad=True)
    for _ in range(3):
        with torch.no_grad():
            flat, made = fast(torch.ones(2, 4))
        made += bias
        assert torch.equal(flat, made.detach().flatten())
    assert fast.cache_info().hits == 2
