"""One call of a module, repeated on other tensors to record and verify it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from graphcache.capture.output_layout import Answer
from graphcache.errors import Reason, Refusal
from graphcache.graphs.verify import largest_gap, repeats
from graphcache.keys.call import Call
from graphcache.keys.call_key import substitute


class TrialCall:
    """One call of a module, repeatable on other tensors."""

    def __init__(
        self,
        run: Callable[..., Any],
        call: Call,
        answer: Answer,
        state: Sequence[Tensor],
    ) -> None:
        self._function, inputs = run, call.tensors
        found: dict[int, int] = {}
        places = [found.setdefault(id(tensor), len(found)) for tensor in inputs]
        self.places = None if len(found) == len(inputs) else places
        """For each tensor of the call, which of ``inputs`` it is, if one was given several times."""
        self.inputs = [_detached(inputs[places.index(place)]) for place in range(len(found))]
        self._args, self._kwargs = substitute(call.args, call.kwargs, self._spread(self.inputs))
        self.answer = answer
        self._state = state

    def run(self, static: Sequence[Tensor]) -> Answer:
        """Call the module on other tensors."""
        answer = Answer(self.call(static), self._spread(static), self._state)
        if answer.layout != self.answer.layout:
            raise Refusal(Reason.DATA_DEPENDENT, detail="the answer had another structure or other shapes")
        return answer

    def call(self, static: Sequence[Tensor]) -> Any:
        """What the module returns for other tensors."""
        args, kwargs = substitute(self._args, self._kwargs, self._spread(static))
        return self._function(*args, **kwargs)

    def eager(self, static: Sequence[Tensor], when: str, wanted: Sequence[Tensor]) -> list[Tensor]:
        """The outputs on some inputs, held against what they were before."""
        outputs = self.run(static).tensors
        self.compare(outputs, wanted, when)
        return outputs

    def compare(self, outputs: Sequence[Tensor], wanted: Sequence[Tensor], when: str) -> None:
        """Raise unless eager execution repeats itself."""
        if [_strides(tensor) for tensor in outputs] != [_strides(tensor) for tensor in wanted]:
            raise Refusal(Reason.NONDETERMINISTIC, detail=f"the outputs had other strides when run {when}")
        for index, (left, right) in enumerate(zip(outputs, wanted, strict=True)):
            if not repeats(left, right.detach()):
                gap = largest_gap(left, right)
                raise Refusal(Reason.NONDETERMINISTIC, detail=f"output {index} differed by {gap:.3g} when run {when}")

    def _spread(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return inputs if self.places is None else [inputs[place] for place in self.places]

    def let_go(self) -> None:
        """Drop the caller's tensors: what was captured refers to this call for as long as it lives."""
        self._args, self._kwargs, self.inputs = (), {}, []
        self.answer.let_go()

    def kept(self) -> list[Tensor]:
        """The weights as they are now: while these live, no other tensor can take their address."""
        return [tensor.detach() for tensor in self._state]


def _detached(tensor: Tensor) -> Tensor:
    """The tensor without gradients, with the attributes that Python code gave it."""
    detached = tensor.detach()
    detached.__dict__.update(tensor.__dict__)
    return detached


def _strides(tensor: Tensor) -> list[int]:
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
