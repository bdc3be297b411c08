"""How many times as long as graphcache each peer takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class Comparison:
    """The peers of one engine, number of shapes and kind of system.

    Args:
        engine: Its name.
        shapes: How many take turns.
        kind: ``"engine"`` or ``"torch"``.
        times: By peer and mode of graphcache, the median of the peer over that of the mode; ``None`` if there is not
            both.
        wrong: Peers whose answers were wrong.
        ahead: Whether every peer that was measured takes longer than the mode that promises as much as it does; no if
            that mode was not measured, ``None`` if no peer was.
    """

    engine: str
    shapes: int
    kind: str
    times: Mapping[tuple[str, str], float | None]
    wrong: frozenset[str]
    ahead: bool | None


def compare(results: Sequence[Mapping[str, Any]]) -> list[Comparison]:
    """Compare the systems of each row, engines before torch networks.

    Args:
        results: Of a run, as :mod:`bench.suite` records them.
    """
    found = []
    for kind in ("engine", "torch"):
        for result in results:
            systems = result["systems"]
            peers = {name: each for name, each in systems.items() if each["kind"] == kind and each["rival"] is not None}
            if not peers:
                continue
            pairs = [(name, mode) for name, each in peers.items() for mode in (each["rival"], *each.get("also", ()))]
            times = {(name, mode): _times(systems[name], systems.get(mode)) for name, mode in pairs}
            # What is measured has no reason why it is not.
            measured = [times[name, each["rival"]] for name, each in peers.items() if "total_us" in each]
            found.append(
                Comparison(
                    result["engine"],
                    len(result["sizes"]),
                    kind,
                    times,
                    frozenset(name for name, each in peers.items() if "were wrong" in each.get("reason", "")),
                    all(each is not None and each > 1 for each in measured) if measured else None,
                )
            )
    return found


def pairs(comparisons: Sequence[Comparison]) -> list[tuple[str, str]]:
    """Every peer with every mode that it is compared with, in the order in which they come first."""
    return list(dict.fromkeys(pair for each in comparisons for pair in each.times))


def cell(comparison: Comparison, pair: tuple[str, str]) -> str:
    """A factor with two decimals; ``wrong`` where answers were, ``-`` where nothing is known."""
    times = comparison.times.get(pair)
    if times is None:
        return "wrong" if pair[0] in comparison.wrong else "-"
    return f"{times:.2f}"


def _times(peer: Mapping[str, Any], mode: Mapping[str, Any] | None) -> float | None:
    if "total_us" not in peer or mode is None or "total_us" not in mode:
        return None
    return float(peer["total_us"]["p50"] / max(mode["total_us"]["p50"], 1e-3))
