from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcache.errors import ClosedError, Reason, Refusal
from graphcache.graphs.buffers import packed, static_copy
from graphcache.graphs.cpu_tape import CpuTape
from tests.helpers import frozen, in_threads, same

TORCH = torch.Generator().manual_seed(3)


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=TORCH)


def record(function: Callable[..., Any], *inputs: Tensor) -> CpuTape:
    static = [static_copy(each) for each in inputs]

    def body() -> Sequence[Tensor]:
        made = function(*static)
        return list(made) if isinstance(made, (tuple, list)) else [made]

    return CpuTape.record(body, [packed(each) for each in static], threading.RLock())


def refused(function: Callable[..., Any], *inputs: Tensor) -> Reason:
    with pytest.raises(Refusal) as found:
        record(function, *inputs)
    return found.value.cause.reason


WEIGHT, TABLE = floats(4, 4), floats(10, 4)
SHARES = torch.tensor([0.25, 0.5])
CONV = frozen(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)))
ATTENTION = frozen(nn.MultiheadAttention(4, 2, batch_first=True))
ENCODER = frozen(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))
GRU, LSTM = frozen(nn.GRU(4, 5)), frozen(nn.LSTM(4, 5))


def in_place(x: Tensor) -> Tensor:
    y = x + 1
    y.mul_(2).add_(x)
    y[0] = 3
    y[:, 1:].clamp_(min=0)
    return y


def constants(x: Tensor) -> tuple[Tensor, ...]:
    counter = torch.tensor([1.0, 2.0, 3.0, 4.0])
    counter += x[0]
    return counter, x + torch.tensor(5), torch.ones(3), torch.arange(4) + x, torch.zeros_like(x), torch.full((2,), 7)


def out_variant(x: Tensor) -> Tensor:
    made = torch.empty_like(x)
    torch.mul(x, 2, out=made)
    return made


def autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return x @ WEIGHT


def gradient(x: Tensor) -> Tensor:
    with torch.enable_grad():
        y = x.detach().requires_grad_(True)
        return torch.autograd.grad((y**3).sum(), y)[0]


def masked(x: Tensor) -> Tensor:
    y = x.clone()
    y[x > 0] = 7
    return torch.where(y < 0, y.masked_fill(y < -1, 2), x)


def annotated(x: Tensor) -> Tensor:
    with torch.profiler.record_function("outer"):
        y = x.relu() + 1
        with torch.autograd.profiler.record_function("inner"):
            return y * 2


def constant_by_mask(x: Tensor) -> Tensor:
    y = x.clone()
    y[x > 0] = torch.tensor(7.0)
    return y


def values_by_mask(x: Tensor) -> Tensor:
    y = x.clone()
    y[x > 0] = torch.ones(int((x.shape[0] + 1) / 2))
    return y


def sum_by_mask(x: Tensor) -> Tensor:
    y = x.clone()
    y[x > 0] = x.sum()
    return y


def view_then_write(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 1
    row = y[1]
    row += 10
    return y, row


RECORDED: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "arithmetic": (lambda x: (x + 1) * x.exp() - x.sum(0) / 3, (floats(3, 4),)),
    "in place on what the call made": (in_place, (floats(3, 4),)),
    "write through a view": (view_then_write, (floats(3, 4),)),
    "out=": (out_variant, (floats(3, 4),)),
    "views of inputs": (
        lambda x: x.t().reshape(-1)[2:] + x.view(-1)[:10] * x.unsqueeze(0).flatten()[1:11],
        (floats(3, 4),),
    ),
    "several outputs": (lambda x: (*(x * 1).split(1), *x.topk(2), *torch.var_mean(x, 1)), (floats(3, 4),)),
    "outputs partly unused": (lambda x: x.max(0).values + x.sort(1).indices[0], (floats(3, 4),)),
    "constants": (constants, (floats(3, 4),)),
    "lists of tensors": (lambda x, y: torch.cat([x, y, torch.stack([x[0], y[0]])]), (floats(3, 4), floats(2, 4))),
    "several updates at once": (lambda x: torch._foreach_add([x * 1, x * 2], 1.0), (floats(3, 4),)),
    "autocast": (autocast, (floats(3, 4),)),
    "attention": (lambda q: F.scaled_dot_product_attention(q, q + 1, q, is_causal=True), (floats(1, 2, 5, 4),)),
    "multi-head attention": (lambda x: ATTENTION(x, x, x)[0], (floats(2, 3, 4),)),
    "transformer encoder": (ENCODER, (floats(2, 3, 4),)),
    "convolution": (CONV, (floats(2, 3, 8, 8),)),
    "convolution, channels last": (CONV, (floats(2, 3, 8, 8).contiguous(memory_format=torch.channels_last),)),
    "gru": (GRU, (floats(3, 2, 4),)),
    "lstm": (lambda x: LSTM(x)[0], (floats(3, 2, 4),)),
    "embedding": (lambda i: F.embedding(i, TABLE), (torch.tensor([[1, 9], [3, 0]]),)),
    "indices": (lambda x, i: x[i], (floats(10, 4), torch.tensor([1, 9, 3]))),
    "gather": (lambda x, i: x.gather(0, i).index_select(1, i[0]), (floats(3, 4), torch.tensor([[1, 0, 2, 2]]))),
    "masks that keep the shape": (masked, (floats(3, 4),)),
    "integers": (lambda i: (i * 2, i // 3, i.float() / 7, i.bitwise_and(3)), (torch.arange(-4, 4),)),
    "booleans": (lambda b: (~b, b.any(), b.sum()), (torch.tensor([True, False, True]),)),
    "complex": (lambda x: (torch.fft.rfft(x), torch.fft.ifft(torch.fft.fft(x)).real), (floats(3, 4),)),
    "complex, conjugate": (
        lambda z: (z.conj() * z, (z * 1).conj().resolve_conj()),
        (torch.view_as_complex(floats(3, 2)),),
    ),
    "half": (lambda x: x @ x.t(), (floats(3, 4).bfloat16(),)),
    "double": (lambda x: torch.linalg.inv_ex(x @ x.t() + torch.eye(3).double())[0], (floats(3, 4).double(),)),
    "0-d": (lambda x: x * 2 + 1, (torch.tensor(3.0),)),
    "empty": (lambda x: (x * 2, x.sum(0), torch.cat([x, x])), (floats(0, 4),)),
    "expanded": (lambda x: (x * 2, x.sum(1)), (floats(3, 1).expand(3, 4),)),
    "transposed": (lambda x: (x * 2, x.contiguous() + 1), (floats(3, 4).t(),)),
    "no inputs": (lambda: torch.ones(3) * 2, ()),
    "einsum": (lambda x: torch.einsum("ij,kj->ik", x, x), (floats(3, 4),)),
    "gradient inside": (gradient, (floats(3, 4),)),
    "profiler annotations": (annotated, (floats(3, 4),)),
    "questions after shapes": (lambda x: x * 2 if x.is_same_size(x[0]) else x * x, (floats(3, 4),)),
    "nothing copied of nothing": (
        lambda x: torch.cat([torch.tensor([]), x.flatten(), x[[]].flatten()]),
        (floats(3, 4),),
    ),
    "one_hot of given classes": (lambda i: F.one_hot(i, 4) * 2, (torch.tensor([0, 3, 1]),)),
    "quantile": (lambda x: x.quantile(SHARES) + x.nanquantile(SHARES), (floats(12),)),
    "repeat_interleave of a given size": (
        lambda x, i: torch.repeat_interleave(x, i, dim=0, output_size=6),
        (floats(3, 4), torch.tensor([1, 3, 2])),
    ),
    "histogram between bounds": (lambda x: x.histc(5, -2.0, 2.0), (floats(12),)),
    "a constant where a mask says": (constant_by_mask, (floats(3, 4),)),
}


@pytest.mark.parametrize("name", RECORDED)
def test_a_replay_equals_eager_bit_for_bit(name):
    function, inputs = RECORDED[name]
    graph = record(function, *inputs)
    assert graph.nodes > 0
    for given in (inputs, [_others(each) for each in inputs], inputs):
        with torch.no_grad():
            eager = function(*given)
        wanted = list(eager) if isinstance(eager, (tuple, list)) else [eager]
        graph.poison()
        assert same(graph.replay(given), wanted)


def _others(tensor: Tensor) -> Tensor:
    other = static_copy(tensor)
    memory = packed(other)
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        memory.copy_(memory * -1.5)
    else:
        memory.copy_(memory.flip(0))
    return other


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_graph_recorded_in_one_mode_is_replayed_in_every_other(mode):
    x = floats(3, 4)
    with mode():
        graph = record(in_place, x)
    for other in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with other():
            (made,) = graph.replay([x])
            assert made.is_inference() == torch.is_inference_mode_enabled()
        assert not made.requires_grad
        assert same(made, in_place(x))


def test_inputs_that_require_gradients_or_were_made_for_inference_are_taken():
    graph = record(lambda x: x * 2, floats(2))
    with torch.inference_mode():
        value = torch.ones(2)
    for each in (value, torch.ones(2, requires_grad=True), nn.Parameter(torch.ones(2))):
        assert graph.replay([each])[0].tolist() == [2.0, 2.0]


HOST_READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x * x.sum().item(),
    "bool": lambda x: x if x.sum() > 0 else -x,
    "float": lambda x: x * float(x[0]),
    "equal": lambda x: x * torch.equal(x, x),
    "allclose": lambda x: x * torch.allclose(x, x),
    "iterate": lambda x: x * max(float(each) for each in x),
    "inverse": lambda x: torch.linalg.inv(torch.diag(x + 9)),
    "singular values": lambda x: torch.linalg.svdvals(torch.diag(x)),
    "histogram without bounds": lambda x: x.histc(5),
    "one_hot of as many classes as there are": lambda x: F.one_hot((x > 0).long()),
}


@pytest.mark.parametrize("name", HOST_READS)
def test_values_read_by_the_host_are_refused(name):
    assert refused(HOST_READS[name], floats(3)) is Reason.HOST_READ


DATA_DEPENDENT: dict[str, Callable[[Tensor], Any]] = {
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0)[0],
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "values where a mask says": lambda x: values_by_mask((x.abs() + 1) * torch.tensor([1, -1, 1])),
    "a value of the device where a mask says": sum_by_mask,
    "repeat_interleave": lambda x: x.repeat_interleave(x.abs().long() + 1),
}


@pytest.mark.parametrize("name", DATA_DEPENDENT)
def test_shapes_that_depend_on_values_are_refused(name):
    assert refused(DATA_DEPENDENT[name], floats(3)) is Reason.DATA_DEPENDENT


PARAMETER, BUFFER = nn.Parameter(floats(3)), floats(3)
MUTATIONS: dict[str, Callable[[Tensor], Any]] = {
    "input": lambda x: x.add_(1),
    "view of an input": lambda x: x[1:].zero_() + 1,
    "item of an input": lambda x: (x.__setitem__(0, 1.0), x + 1)[1],
    "data of an input": lambda x: (x.data.add_(1), x + 1)[1],
    "out= an input": lambda x: torch.mul(x, 2, out=x),
    "parameter, read before": lambda x: (x + PARAMETER, PARAMETER.add_(1))[0],
    "parameter": lambda x: (PARAMETER.add_(1), x + 1)[1],
    "data of a parameter": lambda x: (PARAMETER.data.add_(1), x + 1)[1],
    "buffer": lambda x: (BUFFER.mul_(2), x + 1)[1],
    "view of a buffer": lambda x: (BUFFER[:2].mul_(2), x + 1)[1],
    "many at once": lambda x: (torch._foreach_add_([BUFFER, x * 1], 1.0), x + 1)[1],
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_writes_into_memory_that_outlives_the_call_are_refused_before_they_happen(name):
    before = [PARAMETER.detach().clone(), BUFFER.clone()]
    assert refused(MUTATIONS[name], floats(3)) is Reason.MUTATES
    assert same([PARAMETER.detach(), BUFFER], before)


def test_a_generator_of_the_callers_own_is_refused():
    generator = torch.Generator()
    assert refused(lambda x: x + torch.rand(3, generator=generator), floats(3)) is Reason.RANDOM


def test_a_refusal_that_the_module_swallows_is_still_one():
    def careful(x: Tensor) -> Tensor:
        try:
            positive = bool(x.sum() > 0)
        except Exception:
            positive = True
        return x * 2 if positive else x * 3

    assert refused(careful, floats(3)) is Reason.HOST_READ


def test_a_call_that_does_nothing_is_no_graph():
    assert refused(lambda x: [], floats(3)) is Reason.EMPTY_GRAPH


def test_an_output_that_the_call_did_not_make_is_refused():
    kept = torch.ones(3)
    assert refused(lambda x: [x * 2, kept], floats(3)) is Reason.OUTPUT


def test_an_exception_in_the_body_passes_and_leaves_no_mode_behind():
    with pytest.raises(KeyError):
        record(lambda x: (x + 1, {}["missing"]), floats(3))
    assert torch._C._len_torch_dispatch_stack() == 0
    with pytest.raises(KeyboardInterrupt):
        record(lambda x: (x + 1, _interrupt()), floats(3))
    assert torch.is_grad_enabled()


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_outputs_are_fresh_and_intact_after_later_replays():
    graph = record(lambda x: (x * 2, torch.ones(2), x[0] + 1), floats(2))
    first = graph.replay([torch.tensor([1.0, 2.0])])
    kept = [each.clone() for each in first]
    second = graph.replay([torch.tensor([5.0, 6.0])])
    graph.poison()
    graph.close()
    assert same(first, kept)
    assert not {each.data_ptr() for each in first} & {each.data_ptr() for each in second}


def test_outputs_can_be_written_without_changing_what_the_graph_does():
    graph = record(lambda x: (x * 2, torch.tensor([1.0, 2.0]), torch.ones(2)), floats(2))
    x = torch.tensor([1.0, 2.0])
    for made in graph.replay([x]):
        made.fill_(99)
    assert same(graph.replay([x]), [x * 2, torch.tensor([1.0, 2.0]), torch.ones(2)])


def test_outputs_go_where_the_caller_says():
    graph = record(lambda x: (x * 2, x.sum(0)), floats(3, 2))
    x, out = floats(3, 2), [torch.empty(3, 2), torch.empty(2)]
    made = graph.replay([x], out)
    assert all(one is other for one, other in zip(made, out, strict=True))
    assert same(out, [x * 2, x.sum(0)])


def test_inputs_are_not_changed_and_not_kept():
    graph = record(lambda x: in_place(x) * 2, floats(3, 4))
    x = floats(3, 4)
    before, gone = x.clone(), weakref.ref(x)
    graph.replay([x])
    assert same(x, before)
    del x
    gc.collect()
    assert gone() is None


def test_the_wrong_number_of_inputs_is_an_error():
    with pytest.raises(ValueError):
        record(lambda x, y: x + y, floats(2), floats(2)).replay([floats(2)])


def test_a_replay_reads_weights_where_they_are():
    weight = floats(3)
    graph = record(lambda x: x * weight + weight[1:].sum(), floats(3))
    weight.mul_(2)
    x = floats(3)
    assert same(graph.replay([x]), [x * weight + weight[1:].sum()])


def test_a_replay_after_an_operation_has_failed_starts_afresh():
    graph = record(lambda x, i: x.index_select(0, i) + 1, floats(3), torch.tensor([0, 2]))
    with pytest.raises(IndexError):
        graph.replay([floats(3), torch.tensor([0, 9])])
    x = floats(3)
    assert same(graph.replay([x, torch.tensor([1, 1])]), [x[[1, 1]] + 1])


def test_bytes_are_those_of_the_static_inputs():
    assert record(lambda x, y: (x.sum() + y).sum(), floats(4, 4), floats(3)).nbytes == 64 + 12


def test_close_is_idempotent_and_later_replays_say_what_to_do():
    graph = record(lambda x: x * 2, floats(2))
    graph.close()
    graph.close()
    graph.poison()
    with pytest.raises(ClosedError, match="the graph was closed; call the module again to capture a new one"):
        graph.replay([floats(2)])


def test_closing_gives_back_static_buffers_and_constants_but_not_outputs():
    static = [floats(3)]
    kept = [torch.ones(3)]
    graph = CpuTape.record(lambda: [static[0] * 2 + kept[0]], static, threading.RLock())
    gone = [weakref.ref(static[0]), weakref.ref(kept[0])]
    (made,) = graph.replay([floats(3)])
    static.clear()
    kept.clear()
    gc.collect()
    assert all(each() is not None for each in gone)
    graph.close()
    gc.collect()
    assert [each() for each in gone] == [None, None]
    assert made.isfinite().all()


def test_poison_shows_a_graph_that_does_not_put_its_inputs_in():
    static = [floats(3)]
    graph = CpuTape.record(lambda: [static[0] * 2], static, threading.RLock())
    graph.poison()
    assert static[0].isnan().all()
    assert graph.replay([torch.ones(3)])[0].tolist() == [2.0] * 3


def test_threads_that_replay_one_graph_get_their_own_answers():
    graph = record(lambda x: (x * 2 + 1).cumsum(0), floats(64))

    def work(seed: int) -> None:
        x = torch.full((64,), float(seed))
        for _ in range(100):
            assert same(graph.replay([x]), [(x * 2 + 1).cumsum(0)])

    in_threads(work)
