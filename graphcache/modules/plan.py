"""What is done with the calls of one signature that lies between buckets, and whether padding them pays."""

from __future__ import annotations

from graphcache.cache.admission import Admission
from graphcache.cache.costs import Estimate
from graphcache.cache.padder import Fit
from graphcache.cache.signature import Signature
from graphcache.errors import Cause


class Plan:
    """A signature's sizes and their buckets; with ``capture="worthwhile"`` also what its calls were measured to take.

    Args:
        fit: ``None`` where its calls are not padded.
        cause: Why not, to be said once.
    """

    __slots__ = ("_look", "_pays", "calls", "cause", "eager", "fit", "padding", "refused")

    def __init__(self, fit: Fit | None, cause: Cause | None = None) -> None:
        self.fit = fit
        self.cause = cause
        self.refused: int | None = None
        """Version of the module of which it was found out that its answer depends on padding, if it does."""
        self.calls = 0
        """That could have been padded."""
        self.eager, self.padding = Estimate(), Estimate()
        """What a call takes as it is, and what padding and cropping add to a replay."""
        self._look = 0
        self._pays = True

    @property
    def is_settled(self) -> bool:
        """Whether it is known that padding does not pay, and not yet time to look again."""
        return not self._pays and self.calls < self._look

    @property
    def is_to_measure(self) -> bool:
        """Whether the call is to run as it is. What comes once need not be known, and the first is the slowest."""
        return self.eager.count < 2 and 1 < self.calls < 4

    def pays(self, admission: Admission, target: Signature, signature: Signature) -> bool:
        """Whether a replay and the padding take less than the call as it is, from time to time looked at anew.

        Args:
            admission: Knows what was measured.
            target: Signature of the padded call.
            signature: Of the call as it is. Where that was not measured, it takes what calls of the bucket do.
        """
        if self.calls >= self._look:
            self._look = 2 * self.calls + 4
            bucket, own = admission.known(target), admission.known(signature)
            replay = bucket.replay
            eager = bucket.eager if own.eager is None else own.eager
            if self.eager.count:
                eager = self.eager.value
            self._pays = replay is None or eager is None or replay + self.padding.value < eager
        return self._pays
