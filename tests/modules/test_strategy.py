from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import CachedModule, Reason
from graphcache.errors import CaptureError, ConfigError
from tests.helpers import Fn, frozen, in_threads, mlp, outcomes, reason, same

X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Selective(nn.Module):
    """Two parts around a choice of rows that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.head = nn.Sequential(nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.encoder(x)
        return self.head(y[y.sum(1) > y.sum(1).mean()])


@pytest.fixture
def selective() -> nn.Module:
    return frozen(Selective())


def part(fast: CachedModule, name: str) -> tuple[int, int, dict[Reason, int]]:
    return outcomes(fast.parts[name])


def test_whole_graph_has_no_parts_and_runs_the_rest_eagerly(selective):
    fast = graphcache.wrap(selective, strategy="whole_graph", include=["encoder"])
    for _ in range(3):
        assert same(fast(X), selective(X))
    assert fast.parts == {}
    assert outcomes(fast) == (0, 0, {Reason.DATA_DEPENDENT: 3})


def test_per_submodule_captures_the_parts_and_counts_nothing_for_the_whole(selective):
    fast = graphcache.wrap(selective, strategy="per_submodule", include=["encoder", "head"])
    for _ in range(3):
        assert same(fast(X), selective(X))
    assert part(fast, "encoder") == (2, 1, {})
    assert part(fast, "head") == (2, 1, {})
    assert outcomes(fast) == (4, 2, {})
    assert fast.cache_info().graphs == 2


def test_auto_falls_back_to_the_parts_around_what_forbids_a_whole_graph(selective):
    fast = graphcache.wrap(selective, include=["encoder", "head"])
    for _ in range(4):
        assert same(fast(X), selective(X))
    assert fast.ledger.eager == {Reason.DATA_DEPENDENT: 4}
    assert part(fast, "encoder") == (2, 1, {})
    assert part(fast, "head") == (2, 1, {})


def test_auto_captures_the_whole_where_it_can():
    fast = graphcache.wrap(mlp(), include=["0"])
    for _ in range(3):
        fast(X)
    assert part(fast, "0") == (0, 0, {})
    assert outcomes(fast) == (2, 1, {})


def test_a_part_that_cannot_be_captured_says_so_under_its_own_name(selective, caplog):
    selective.head = nn.Sequential(Fn(lambda _, x: x * x.sum().item()))
    fast = graphcache.wrap(selective, strategy="per_submodule", include=["encoder", "head"])
    for _ in range(2):
        assert same(fast(X), selective(X))
    assert part(fast, "head") == (0, 0, {Reason.HOST_READ: 2})
    assert "head ran eagerly: host_read" in caplog.text


def test_a_part_used_twice_in_one_call_is_one_cache():
    module = frozen(Fn(lambda self, x: self.inner(self.inner(x)) * float(x.sum()), inner=nn.Linear(4, 4)))
    fast = graphcache.wrap(module, strategy="per_submodule", include=["inner"])
    for _ in range(3):
        assert same(fast(X), module(X))
    assert part(fast, "inner") == (5, 1, {})


def test_parts_inside_lists_and_deep_inside_are_found_by_their_names():
    module = frozen(nn.Sequential(nn.ModuleDict({"a": mlp()}), nn.Identity()))
    fast = graphcache.wrap(module, include=["0.a.2"])
    assert fast.parts["0.a.2"].module is module[0]["a"][2]


def test_hooks_of_a_part_run_at_every_call_and_outside_of_its_graph(selective):
    seen: list[str] = []
    selective.encoder.register_forward_pre_hook(lambda module, args: seen.append("before"))
    selective.encoder.register_forward_hook(lambda module, args, output: (seen.append("after"), output * 2)[1])
    fast = graphcache.wrap(selective, strategy="per_submodule", include=["encoder"])
    for _ in range(3):
        assert same(fast(X), selective(X))
    assert seen == ["before", "after"] * 6
    assert part(fast, "encoder") == (2, 1, {})


def test_at_rest_the_parts_are_what_they_were_even_after_an_exception(selective):
    fast = graphcache.wrap(selective, strategy="per_submodule", include=["encoder"])
    before = dict(selective.encoder.__dict__)
    fast(X)
    with pytest.raises(RuntimeError):
        fast(torch.zeros(2, 3))
    assert dict(selective.encoder.__dict__) == before
    assert same(fast(X), selective(X))


def test_a_forward_that_was_patched_into_the_instance_stays_and_counts(selective):
    original = selective.encoder.forward
    selective.encoder.forward = patched = lambda x: original(x) * 2
    fast = graphcache.wrap(selective, strategy="per_submodule", include=["encoder"])
    for _ in range(3):
        assert same(fast(X), selective(X))
    assert selective.encoder.__dict__["forward"] is patched


def test_a_forward_that_is_patched_after_wrapping_counts_too(selective):
    fast = graphcache.wrap(selective, strategy="per_submodule", include=["encoder"])
    fast(X)
    original = selective.encoder.forward
    selective.encoder.forward = patched = lambda x: original(x) * 2
    for _ in range(2):
        assert same(fast(X), selective(X))
    assert selective.encoder.__dict__["forward"] is patched


def test_a_part_that_was_replaced_runs_plainly(selective):
    fast = graphcache.wrap(selective, strategy="per_submodule", include=["encoder"])
    fast(X)
    selective.encoder = frozen(nn.Linear(4, 4))
    for _ in range(2):
        assert same(fast(X), selective(X))


def test_the_original_called_by_another_thread_during_a_call_does_not_use_the_graphs():
    module = frozen(Fn(lambda self, x: (between(), self.inner(x) * 2)[1], inner=nn.Linear(4, 4)))
    fast = graphcache.wrap(module, strategy="per_submodule", include=["inner"])
    seen: list[Tensor] = []

    def between() -> None:
        thread = threading.Thread(target=lambda: seen.append(module.inner(X)))
        thread.start()
        thread.join()

    for _ in range(3):
        fast(X)
    assert all(same(each, module.inner(X)) for each in seen)
    assert len(seen) == 3
    assert part(fast, "inner") == (2, 1, {})


def test_threads_on_one_module_with_parts(selective):
    fast = graphcache.wrap(selective, strategy="per_submodule", include=["encoder", "head"])

    def work(index: int) -> None:
        for step in range(30):
            x = torch.linspace(-index, 1, 4 * (2 + step % 3)).reshape(-1, 4)
            assert same(fast(x), selective(x))

    in_threads(work, 3)
    assert "forward" not in selective.encoder.__dict__
    hits, captures, eager = part(fast, "encoder")
    assert (hits + captures + sum(eager.values()), captures) == (3 * 30, 3)
    assert set(eager) <= {Reason.PENDING}


def test_gradients_flow_through_parts(selective):
    fast = graphcache.wrap(selective.requires_grad_(True), strategy="per_submodule", include=["encoder", "head"])
    fast(X).sum().backward()
    assert selective.encoder[0].weight.grad is not None
    assert fast.cache_info().eager == {Reason.GRAD: 2}


def test_switched_off_the_parts_are_off_too(selective):
    fast = graphcache.wrap(selective, strategy="per_submodule", include=["encoder"])
    fast(X)
    with graphcache.config.graphs_off():
        assert reason(fast, X) is Reason.DISABLED
    assert part(fast, "encoder") == (0, 1, {})


def test_clear_and_close_reach_the_parts(selective):
    fast = graphcache.wrap(selective, strategy="per_submodule", include=["encoder", "head"])
    fast(X)
    fast.clear()
    assert fast.cache_info().graphs == 0
    fast(X)
    fast.close()
    assert fast.cache_info().graphs == 0
    with pytest.raises(graphcache.errors.ClosedError):
        fast.parts["encoder"](X)
    assert same(selective(X), copy.deepcopy(selective)(X))


def test_an_error_in_a_part_is_raised_on_request(selective):
    selective.head = nn.Sequential(Fn(lambda _, x: x * x.sum().item()))
    fast = graphcache.wrap(selective, strategy="per_submodule", include=["head"], on_failure="raise")
    with pytest.raises(CaptureError, match=r"^head: host_read: "):
        fast(X)


def test_odd_arguments_of_the_whole_are_no_matter_of_its_parts():
    module = frozen(Fn(lambda self, x, other: self.inner(x) * len(other), inner=nn.Linear(4, 4)))
    fast = graphcache.wrap(module, strategy="per_submodule", include=["inner"], on_failure="raise")
    for _ in range(3):
        assert same(fast(X, {1, 2}), module(X, {1, 2}))
    assert part(fast, "inner") == (2, 1, {})


@pytest.mark.parametrize("name", ["encodr", "", "encoder.7", "Encoder"])
def test_a_name_that_is_none_is_answered_with_near_ones(selective, name):
    with pytest.raises(ConfigError, match=rf"include names '{name}', which is no submodule; did you mean .*encoder"):
        graphcache.wrap(selective, include=[name])


def test_names_in_a_module_without_submodules():
    with pytest.raises(ConfigError, match="include names 'a', but there are no submodules"):
        graphcache.wrap(nn.ReLU(), include=["a"])


def test_a_part_inside_another_is_refused(selective):
    with pytest.raises(ConfigError, match=r"include names both 'encoder' and 'encoder\.0', which is inside it"):
        graphcache.wrap(selective, include=["encoder.0", "encoder"])


def test_per_submodule_without_anything_to_capture_is_refused(selective):
    with pytest.raises(ConfigError, match=r"Selective contains no engine; name the submodules .* include=\['encoder'"):
        graphcache.wrap(selective, strategy="per_submodule")
