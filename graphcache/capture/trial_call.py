"""One call of a module, repeated on other tensors to record and verify it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from graphcache.capture.output_layout import OutputLayout
from graphcache.errors import Reason, Refusal
from graphcache.graphs.verify import largest_gap, repeats
from graphcache.keys.call import KeyedCall
from graphcache.keys.call_key import substitute


class TrialCall:
    """One call of a module, repeatable on other tensors. ``state`` is what outlives the call."""

    def __init__(self, run: Callable[..., Any], call: KeyedCall, answer: OutputLayout, state: Sequence[Tensor]) -> None:
        self._function = run
        found: dict[int, int] = {}
        places = [found.setdefault(id(tensor), len(found)) for tensor in call.tensors]
        self.places = None if len(found) == len(places) else places
        """For each tensor of the call, which of ``inputs`` it is, if one was given several times."""
        self.inputs = [_detached(call.tensors[places.index(place)]) for place in range(len(found))]
        self._args, self._kwargs = substitute(call.args, call.kwargs, self._spread(self.inputs))
        self.answer = answer
        self._state = state

    def run(self, static: Sequence[Tensor]) -> OutputLayout:
        """Call the module on other tensors; the answer has to have the layout of the first one."""
        answer = OutputLayout(self.call(static), self._spread(static), self._state)
        if answer.layout != self.answer.layout:
            raise Refusal(Reason.DATA_DEPENDENT, detail="the answer had another structure or other shapes")
        return answer

    def call(self, static: Sequence[Tensor]) -> Any:
        """What the module returns for other tensors."""
        args, kwargs = substitute(self._args, self._kwargs, self._spread(static))
        return self._function(*args, **kwargs)

    def compare(self, outputs: Sequence[Tensor]) -> None:
        """Refuse outputs of a second run that differ from the first one's: eager execution has to repeat itself."""
        if list(map(_strides, outputs)) != list(map(_strides, self.answer.tensors)):
            raise Refusal(Reason.NONDETERMINISTIC, detail="the outputs had other strides when run again")
        check_repeats(outputs, [tensor.detach() for tensor in self.answer.tensors])

    def let_go(self) -> None:
        """Drop the caller's tensors: what was captured refers to this call for as long as it lives."""
        self._args, self._kwargs, self.inputs = (), {}, []
        self.answer.let_go()

    def kept(self) -> list[Tensor]:
        """The weights as they are now: while these live, no other tensor can take their address."""
        return [tensor.detach() for tensor in self._state]

    def _spread(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The inputs in the places of the tensors of the call."""
        return inputs if self.places is None else [inputs[place] for place in self.places]


def check_repeats(outputs: Sequence[Tensor], wanted: Sequence[Tensor], where: str = "") -> None:
    """Refuse outputs that differ from those of the same call before."""
    for index, (left, right) in enumerate(zip(outputs, wanted, strict=True)):
        if not repeats(left, right):
            detail = f"output {index} differed by {largest_gap(left, right):.3g} between two runs"
            raise Refusal(Reason.NONDETERMINISTIC, where, detail)


def _detached(tensor: Tensor) -> Tensor:
    """The tensor without gradients, with the attributes that Python code gave it."""
    detached = tensor.detach()
    detached.__dict__.update(tensor.__dict__)
    return detached


def _strides(tensor: Tensor) -> list[int]:
    """The strides of the dimensions that have several elements."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
