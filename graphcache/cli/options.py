"""Shapes as options of a command, in the manner of trtexec (one word) and of Polygraphy (several words)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import click

from graphcache.cli.shapes import Shape, ShapeSyntaxError, Spec, looks_like, parse

Specs = tuple[Spec, ...]

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
target_argument = click.argument("target", metavar="ENGINE|MODEL.onnx|MODULE:FACTORY")
device_option = click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="Where a module goes; where it is if left out."
)
strategy_option = click.option(
    "--strategy",
    type=click.Choice(["auto", "whole_graph", "per_submodule"]),
    default="auto",
    show_default=True,
    help="What is captured: the whole, or parts of it.",
)
include_option = click.option(
    "--include", multiple=True, metavar="NAME", help="A submodule to capture on its own; may be repeated."
)
seed_option = click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    metavar="NUMBER",
    default=0,
    show_default=True,
    help="Of what is random.",
)


def _refuse_watch(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Say what replaces an option that was removed in 0.2.0."""
    if value:
        raise click.UsageError("--watch was removed: the summary at the end says how calls ended.", ctx)


removed_watch_option = click.option(
    "--watch", is_flag=True, hidden=True, expose_value=False, callback=_refuse_watch, help="Removed."
)


class ShapesType(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.3
    """The type of an option that takes shapes."""

    name = "shapes"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "NAME:SHAPE[,…]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Specs:
        if isinstance(value, tuple):
            return value
        try:
            return parse(str(value))
        except ShapeSyntaxError as error:
            self.fail(str(error), param, ctx)


class PercentilesType(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.3
    """The type of an option that takes percentiles, such as ``90,95,99.9``."""

    name = "percentiles"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        found = []
        for word in str(value).split(","):
            try:
                share = float(word)
            except ValueError:
                share = -1.0
            if not 0 < share <= 100:
                self.fail(f"{word.strip()!r} is no percentile; expected numbers above 0 and up to 100", param, ctx)
            found.append(share)
        return tuple(found)


class ShapesCommand(click.Command):
    """A command whose shape options also take the words that follow: ``--shapes x:[1,64] y:[1,2]``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        flags = [flag for param in self.params if isinstance(param.type, ShapesType) for flag in param.opts]
        return super().parse_args(ctx, join_words(args, flags))


def shapes_option(help: str, *, required: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The option by which every command takes shapes."""
    return click.option("--shapes", "--input-shapes", type=ShapesType(), multiple=True, required=required, help=help)


def join_words(args: Sequence[str], flags: Collection[str]) -> list[str]:
    """Make one value of each option in ``flags`` and the shapes that follow it."""
    joined: list[str] = []
    open_value = False
    rest = iter(args)
    for word in rest:
        if word == "--":
            return [*joined, word, *rest]
        if open_value and looks_like(word):
            joined[-1] += f" {word}"
            continue
        joined.append(word)
        if word in flags:
            value = next(rest, None)
            joined += [] if value is None else [value]
            open_value = value is not None
        else:
            open_value = any(word.startswith(f"{flag}=") for flag in flags)
    return joined


def ranges(groups: Sequence[Specs], low: Sequence[Specs], usual: Sequence[Specs], high: Sequence[Specs]) -> Any:
    """What :func:`graphcache.build` takes as ``shapes``: an input that several groups name gets a profile for each."""
    found: dict[str, list[tuple[Shape, ...]]] = {}
    for spec in (spec for group in groups for spec in group):
        _without_dtype(spec)
        found.setdefault(spec.name, []).append(spec.shapes if len(spec.shapes) == 3 else spec.shapes * 3)
    lows, usuals, highs = (
        _single(flag, specs) for flag, specs in (("--min-shapes", low), ("--opt-shapes", usual), ("--max-shapes", high))
    )
    for name in {**lows, **usuals, **highs}:
        if name in found:
            raise click.UsageError(f"{name!r} is named by --shapes and by --min-shapes, --opt-shapes or --max-shapes.")
        if name not in usuals or (name in lows) != (name in highs):
            raise click.UsageError(
                f"{name!r} needs --opt-shapes alone, or all of --min-shapes, --opt-shapes and --max-shapes."
            )
        found[name] = [(lows.get(name, usuals[name]), usuals[name], highs.get(name, usuals[name]))]
    return {name: each[0] if len(each) == 1 else each for name, each in found.items()}


def points(groups: Sequence[Specs]) -> list[dict[str, Spec]]:
    """The sets of inputs to run: one for each ``--shapes``, three for one that gives ranges."""
    found: list[dict[str, Spec]] = []
    for group in groups:
        for index in range(max(len(spec.shapes) for spec in group)):
            point = {spec.name: Spec(spec.name, (spec.shapes[index % len(spec.shapes)],), spec.dtype) for spec in group}
            if point not in found:
                found.append(point)
    return found


def spanned(groups: Sequence[Specs]) -> Mapping[str, tuple[Shape, Shape, Shape]]:
    """The smallest range that holds every shape of the groups, by input; the usual shape is the first one named."""
    shapes: dict[str, list[Shape]] = {}
    for spec in (spec for group in groups for spec in group):
        _without_dtype(spec)
        usual = spec.shapes[len(spec.shapes) // 2]
        shapes.setdefault(spec.name, []).extend([usual, *spec.shapes])
    for name, given in shapes.items():
        if len({len(shape) for shape in given}) > 1:
            raise click.UsageError(f"{name!r} has shapes of different numbers of dimensions.")
    return {
        name: (tuple(map(min, zip(*given, strict=True))), given[0], tuple(map(max, zip(*given, strict=True))))
        for name, given in shapes.items()
    }


def _single(flag: str, groups: Sequence[Specs]) -> dict[str, Shape]:
    found: dict[str, Shape] = {}
    for spec in (spec for group in groups for spec in group):
        _without_dtype(spec)
        if len(spec.shapes) != 1:
            raise click.UsageError(f"{flag} takes one shape for each input; {spec.name!r} has {len(spec.shapes)}.")
        if spec.name in found:
            raise click.UsageError(f"{flag} names {spec.name!r} twice; several profiles are given with --shapes.")
        found[spec.name] = spec.shapes[0]
    return found


def _without_dtype(spec: Spec) -> None:
    if spec.dtype is not None:
        raise click.UsageError(f"{spec.name!r} has the dtype {spec.dtype!r}; a model's inputs have their own dtypes.")
