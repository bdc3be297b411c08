"""The pictures of the README: a report in a browser, and what the terminal shows.

``python -m bench.screenshots`` measures on this machine; ``--result FILE`` takes what ``graphcache bench -o`` measured
elsewhere for the report. Chromium draws the report and is looked for; terminal views are drawn by rich.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console, RenderableType
from rich.text import Text
from torch import Tensor, nn

import graphcache
from graphcache.cli import main as command_line
from graphcache.cli.network import Policy
from graphcache.observe.report import page
from graphcache.observe.result import read_result

DOCS = Path(__file__).parents[1] / "docs"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_WIDTH = 100
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
)


class Tracker(nn.Module):
    """The policy of the demo; of three observations it keeps those that it is sure of, which no graph can do."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = Policy()

    def forward(self, observation: Tensor) -> Tensor:
        action: Tensor = self.policy(observation)
        if len(action) == 3:
            action = action[action[:, 0] > 0]
        return action


class Scaled(nn.Module):
    """The same with two lines that forbid a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = Policy()

    def forward(self, observation: Tensor) -> Tensor:
        scale = observation.abs().max().item()
        action: Tensor = self.policy(observation / scale)
        return action[action[:, 0] > 0]


def report(path: Path, result: Path | None) -> None:
    """A picture of the report of a result, or of what is measured here."""
    with tempfile.TemporaryDirectory() as folder:
        if result is None:
            result = Path(folder) / "result.json"
            sizes = [word for rows in (1, 2, 8, 4, 3, 16) for word in ("--shapes", f"observation:{rows}x48")]
            run("bench", "bench.screenshots:Tracker", *sizes, "--calls", "2000", "-o", str(result))
        html = Path(folder) / "report.html"
        html.write_text(page(read_result(result)), encoding="utf-8")
        shoot(html, path)


def shoot(html: Path, path: Path) -> None:
    """What a browser shows of a page, as a PNG.

    Raises:
        SystemExit: If there is no browser.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"no browser here; install one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as profile:
        flags = [*_FLAGS, f"--user-data-dir={profile}", "--window-size=900,1560"]
        subprocess.run(
            [browser, *flags, f"--screenshot={path.resolve()}", html.resolve().as_uri()],
            check=True,
            capture_output=True,
            timeout=240,
        )


def explained() -> RenderableType:
    """What ``explain`` prints of a call that has no graph, and of one that has."""
    fast = graphcache.wrap(Policy(), max_graphs=4)
    with torch.no_grad():
        for rows in (1, 2, 1, 77):
            fast(torch.randn(rows, 48))
        new, known = fast.explain(torch.randn(78, 48)), fast.explain(torch.randn(1, 48))
    prompt = ">>> print(fast.explain(torch.randn({}, 48)))"
    return Text("\n".join([prompt.format(78), str(new), prompt.format(1), str(known)]))


def examined() -> RenderableType:
    """What ``graphcache doctor`` finds in a model with breaks."""
    target = "bench.screenshots:Scaled"
    words = ["doctor", target, "--shapes", "observation:8x48"]
    return Text(f"$ graphcache {' '.join(words)}\n{run(*words)}")


def run(*words: str) -> str:
    """What a command prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), in_root(), contextlib.suppress(SystemExit):
        command_line(list(words), prog_name="graphcache")
    return out.getvalue()


@contextlib.contextmanager
def in_root() -> Iterator[None]:
    """Inside, the current folder is that of the repository, from which paths are told."""
    before = Path.cwd()
    os.chdir(DOCS.parent)
    try:
        yield
    finally:
        os.chdir(before)


def drawn(shown: RenderableType, title: str) -> str:
    """A terminal view as SVG, which refers to nothing outside of it."""
    console = Console(record=True, width=_WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(shown, soft_wrap=False)
    text = console.export_svg(title=title, unique_id="view")
    text = re.sub(r"@font-face \{.*?\}\s*", "", text, flags=re.DOTALL)
    return text.replace("Fira Code", "DejaVu Sans Mono")


VIEWS = {"explain": explained, "doctor": examined}


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DOCS, help="folder for the pictures")
    parser.add_argument("--result", type=Path, help="a result of graphcache bench -o for the report")
    parser.add_argument("--only", choices=["report", *VIEWS], help="make one of them")
    given = parser.parse_args(arguments)
    given.out.mkdir(exist_ok=True)
    for name, make in VIEWS.items():
        if given.only in (None, name):
            (given.out / f"{name}.svg").write_text(drawn(make(), f"graphcache {name}"), encoding="utf-8")
    if given.only in (None, "report"):
        report(given.out / "report.png", given.result)


if __name__ == "__main__":
    main()
