"""What TorchScript holds of a module in C++."""

import io
from typing import Dict, List, Optional  # noqa: UP035 - TorchScript knows these

import pytest
import torch
from torch import Tensor, nn

from graphcache.keys.value_nodes import script_state
from graphcache.observe.breaks import script_constants

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


class Keeper(nn.Module):
    """State of every kind that TorchScript takes."""

    count: int
    history: List[Tensor]  # noqa: UP006
    table: Dict[str, Tensor]  # noqa: UP006
    maybe: Optional[Tensor]  # noqa: UP045

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.history = []
        self.table = {}
        self.maybe = None
        self.plain = torch.ones(2)
        self.linear = nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.history.append(x)
        self.table["last"] = x
        self.maybe = x
        self.plain = self.plain * 2
        return self.linear(x) + self.seen


def loaded(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


@pytest.mark.parametrize("change", [lambda m: m, loaded], ids=["scripted", "loaded"])
def test_every_attribute_is_listed_and_every_change_shows(change):
    module = change(torch.jit.script(Keeper().eval()))
    before = script_state(module)
    assert (before[".count"], before[".history (length)"], before[".maybe"]) == (0, 0, None)
    assert before[".plain"] is module.plain
    assert before[".seen"] is module.seen
    assert script_state(module)[".plain"] is before[".plain"]
    x = torch.ones(2)
    module(x)
    after = script_state(module)
    assert (after[".count"], after[".history (length)"], after[".table (length)"]) == (1, 1, 1)
    assert after[".maybe"] is after[".history[0]"] is after[".table['last']"] is x
    assert after[".plain"] is not before[".plain"]
    assert {".bias", ".weight", ".training"} <= script_state(module.linear).keys()


def test_frozen_modules_keep_their_weights_in_their_code():
    module = torch.jit.freeze(torch.jit.script(nn.Linear(2, 3).eval()))
    assert script_state(module) == {}
    assert sorted(tuple(each.shape) for each in script_constants(module)) == [(3,), (3, 2)]


def test_a_traced_module_has_a_state_like_any_other():
    module = torch.jit.trace(nn.Linear(2, 3), torch.ones(2))
    assert script_state(module)[".weight"] is module.weight
