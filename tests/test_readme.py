"""The README and the pages of docs: snippets run, generated tables say what code and results say, links exist.

``python -m tests.test_readme`` writes the generated tables and the picture of the README anew.
"""

import ast
import contextvars
import inspect
import json
import pkgutil
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import yaml

import graphcache
from bench.table import over_graphcache
from graphcache import GraphConfig, Reason

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = {path: path.read_text(encoding="utf-8") for path in (README, *sorted((ROOT / "docs").glob("*.md")))}
TEXT = "\n".join(PAGES.values())
MAX_WORDS = 1200
"""Words of the README. Everything else belongs into a page of docs."""
PICTURE = ROOT / "docs" / "gain.svg"
RESULTS = ROOT / "bench" / "results"
FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE)


def fenced(info):
    """All blocks of a kind, by page and line."""
    return [
        pytest.param(found["body"], id=f"{path.stem}, line {text.count(chr(10), 0, found.start()) + 1}")
        for path, text in PAGES.items()
        for found in FENCE.finditer(text)
        if found["info"] == info
    ]


SNIPPETS, GPU_SNIPPETS, TRANSFORMERS_SNIPPETS = map(fenced, ("python", "python gpu", "python transformers"))


def arguments_of(documented):
    """The ``Args:`` of a Google-style docstring, by name, each in one line, as Markdown."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.getdoc(documented), re.DOTALL | re.MULTILINE)[1]
    found = {}
    for each in re.split(r"\n(?=    \S)", section.rstrip()):
        name, text = each.strip().split(":", 1)
        text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", " ".join(text.split()))
        found[name] = text.replace("``", "`")
    return found


def kind_of(hint):
    """A type as a reader wants it: the values of a literal, the name of anything else."""
    if get_origin(hint) is Literal:
        return ", ".join(f'`"{value}"`' for value in get_args(hint))
    if hint == tuple[str, ...]:
        return "names"
    if any(get_origin(each) is Literal for each in get_args(hint)):
        return " or ".join(map(kind_of, get_args(hint)))
    return (
        " or ".join(f"`{getattr(each, '__name__', each)}`" for each in get_args(hint) or [hint])
        .replace("`NoneType`", "`None`")
        .replace("`BucketsLike`", "`Buckets`")
    )


def options_table():
    """The options, from the fields and the docstring of GraphConfig."""
    hints, documented = get_type_hints(GraphConfig), arguments_of(GraphConfig)
    rows = ["| Option | Values | Default | |", "|---|---|---|---|"]
    for field in fields(GraphConfig):
        assert field.default is not MISSING
        default = f'"{field.default}"' if isinstance(field.default, str) else repr(field.default)
        rows.append(f"| `{field.name}` | {kind_of(hints[field.name])} | `{default}` | {documented[field.name]} |")
    return "\n".join(rows)


def reasons_table():
    """Every reason, as the code words it."""
    rows = ["| Reason | What is the case | What would change it |", "|---|---|---|"]
    rows += [f"| `{reason.value}` | {reason.sentence} | {reason.remedy} |" for reason in Reason]
    return "\n".join(rows)


def errors_table():
    """Every error, what else it is caught as, and when it is raised."""
    rows = ["| Error | Also a | When |", "|---|---|---|"]
    for name, value in vars(graphcache.errors).items():
        if inspect.isclass(value) and issubclass(value, graphcache.GraphCacheError):
            also = ", ".join(f"`{base.__name__}`" for base in value.__bases__ if base is not graphcache.GraphCacheError)
            rows.append(f"| `{name}` | {also} | {inspect.getdoc(value).replace('``', '`')} |")
    return "\n".join(rows)


MODELS = {
    "mlp8": "MLP, 8 layers (TensorRT engine)",
    "policy": "Robot policy, 3 layers (TensorRT engine)",
    "mlp": "MLP, 8 layers (PyTorch)",
    "bert": "Small BERT, 12 layers (PyTorch)",
}
"""The models of the picture, as ``bench.compare_commits`` calls them and as readers do."""


def gain_picture():
    """The picture of the README: eager calls and hits, medians of five processes."""
    measured = json.loads((RESULTS / "compare-h200.json").read_text(encoding="utf-8"))["models"]
    width, left, scale, height = 860, 316, 400, 96 + 54 * len(MODELS)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        "<style>text { font: 14px Helvetica, Arial, sans-serif } .bold { font-weight: bold }</style>",
        "<title>Time of one call, eagerly and through graphcache</title>",
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff" stroke="#d0d7de"/>',
        '<text x="20" y="32" class="bold" fill="#1f2328">Time of one call on an H200</text>',
    ]
    for row, (name, label) in enumerate(MODELS.items()):
        eager, hit = (measured[name]["new"][kind]["us"]["median"] for kind in ("eager", "hit"))
        y, share = 56 + 54 * row, hit / eager
        faster = f'<tspan class="bold">{1 / share:.1f} times as fast</tspan>'
        lines += [
            f'<text x="{left - 12}" y="{y + 24}" text-anchor="end" fill="#1f2328">{label}</text>',
            f'<rect x="{left}" y="{y}" width="{scale}" height="18" fill="#afb8c1"/>',
            f'<text x="{left + scale + 8}" y="{y + 14}" fill="#59636e">{eager:,.0f} µs</text>',
            f'<rect x="{left}" y="{y + 20}" width="{share * scale:.0f}" height="18" fill="#1a7f37"/>',
            f'<text x="{left + share * scale + 8:.0f}" y="{y + 34}" fill="#1a7f37">{hit:,.0f} µs, {faster}</text>',
        ]
    legend = ((left, "#afb8c1", "eager"), (left + 90, "#1a7f37", "graphcache, a hit"))
    for x, colour, text in legend:
        lines += [
            f'<rect x="{x}" y="{height - 30}" width="14" height="14" fill="{colour}"/>',
            f'<text x="{x + 20}" y="{height - 18}" fill="#59636e">{text}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


def results_of(name, engine, shapes):
    """One row of the suite's file ``name``: an engine, called with so many shapes in turn."""
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["results"]
    return next(each for each in found if each["engine"] == engine and len(each["sizes"]) == shapes)


MLP8, POLICY, MINILM = "mlp8 (16 kernels)", "policy network (3 kernels)", "MiniLM-L6"
PEERS = [
    (f"{MLP8}, one shape", "suite-peers-h200", "mlp8", 1),
    (f"{MLP8}, 8 shapes", "suite-peers-h200", "mlp8", 8),
    (f"{POLICY}, one shape", "suite-peers-h200", "policy", 1),
    (f"{POLICY}, 8 shapes", "suite-peers-h200", "policy", 8),
    (f"{MINILM}, one length", "suite-peers-minilm-h200", "minilm", 1),
    (f"{MINILM}, 8 lengths", "suite-peers-minilm-in-turn-h200", "minilm", 8),
    ("MobileNetV3-small, one shape", "suite-peers-mobilenet-h200", "mobilenet", 1),
]
"""Rows with other systems: title, file, engine, shapes. TensorRT-RTX 1.4, which the other systems need."""
HITS = [
    (f"{MLP8}, one shape", "suite-engines-h200", "mlp8", 1),
    (f"{MLP8}, 64 shapes", "suite-engines-h200", "mlp8", 64),
    (f"{POLICY}, one shape", "suite-engines-h200", "policy", 1),
    (f"{POLICY}, 128 shapes", "suite-engines-h200", "policy", 128),
    (f"{MINILM}, one length", "suite-engines-h200", "minilm", 1),
    (f"{MINILM}, 32 lengths", "suite-engines-h200", "minilm", 32),
    ("ViT-tiny, one shape", "suite-vit-h200", "vit", 1),
    ("ViT-tiny, 8 shapes", "suite-vit-h200", "vit", 8),
    ("MobileNetV3-small, one shape", "suite-models-h200", "mobilenet", 1),
    ("MobileNetV3-small, 8 shapes", "suite-models-h200", "mobilenet", 8),
]
"""Rows of graphcache alone, with the specialised kernels of TensorRT-RTX 1.5."""


def hits_table():
    """Every way to get a hit: its time over that of the bare launch, and its CPU time."""
    ways = ("graphcache-session", "graphcache-into", "graphcache", "rtx-graphs")
    rows = [
        "| Engine | bare launch, µs | session | `forward_into` | call | TensorRT-RTX's graphs |",
        "|---|---|---|---|---|---|",
    ]
    for title, name, engine, shapes in HITS:
        systems = results_of(name, engine, shapes)["systems"]
        cells = [
            f"{systems[way]['total_over_raw']:.2f}, {systems[way]['cpu_burst_us']['p50']:.1f}"
            if "total_us" in systems.get(way, {})
            else ""
            for way in ways
        ]
        bare = f"{systems['raw']['total_us']['p50']:.0f}, {systems['raw']['cpu_burst_us']['p50']:.1f}"
        rows.append(f"| {title} | {bare} | {' | '.join(cells)} |")
    return "\n".join(rows)


MODULES = [("MLP, 16 parameters", "mlp16"), ("100 submodules, 300 parameters", "parts300"), ("ResNet-18", "resnet18")]
"""Rows of PyTorch networks: title and network."""


def modules_table():
    """PyTorch networks: each way's time over that of the bare launch, and its CPU time."""
    columns = {
        "graphcache-torch": "graphcache",
        "by-hand": "copy, replay, clone by hand",
        "graphed-callables": "`make_graphed_callables`",
        "graphcache-compiled": "graphcache around `torch.compile`",
        "compile-static": '`torch.compile(mode="reduce-overhead")`',
        "graphcache-torch-no-native": "graphcache without native code",
    }
    rows = [f"| Network | bare launch, µs | {' | '.join(columns.values())} |", "|---" * (2 + len(columns)) + "|"]
    for title, name in MODULES:
        systems = results_of("suite-torch-h200", name, 1)["systems"]
        cells = [f"{systems[way]['total_over_raw']:.2f}, {systems[way]['cpu_burst_us']['p50']:.0f}" for way in columns]
        rows.append(f"| {title} | {systems['raw-torch']['total_us']['p50']:.0f} | {' | '.join(cells)} |")
    return "\n".join(rows)


def peers_table():
    """Other systems: their time over that of the mode of graphcache that promises as much."""
    columns = {
        "tensorrt": "TensorRT eager",
        "torch-tensorrt-cpp": "Torch-TensorRT, C++ runtime",
        "torch-tensorrt-python": "Torch-TensorRT, Python runtime",
        "rtx-graphs-copy": "TensorRT-RTX's graphs, copied in and out",
        "rtx-graphs": "TensorRT-RTX's graphs, caller's buffers",
    }
    rows = [f"| Engine | graphcache, µs | {' | '.join(columns.values())} |", "|---" * (2 + len(columns)) + "|"]
    for title, name, engine, shapes in PEERS:
        result = results_of(name, engine, shapes)
        cells = [over_graphcache(each, result).replace("wrong", "wrong answers") for each in columns]
        rows.append(f"| {title} | {result['systems']['graphcache']['total_us']['p50']:.0f} | {' | '.join(cells)} |")
    return "\n".join(rows)


def compared_table():
    """The short table of the README: mlp8 with eight shapes in turn, in µs."""
    columns = {
        "raw": "Graphs launched by hand",
        "graphcache": "graphcache",
        "rtx-graphs": "TensorRT-RTX's own graphs",
        "tensorrt": "TensorRT eager",
        "torch-tensorrt-cpp": "Torch-TensorRT, C++ runtime",
    }
    systems = results_of("suite-peers-h200", "mlp8", 8)["systems"]
    cells = [f"{systems[name]['total_us']['p50']:.0f}" for name in columns]
    return f"| {' | '.join(columns.values())} |\n{'|---' * len(columns)}|\n| {' | '.join(cells)} |"


GAINS = {
    "mlp8": "mlp8",
    "policy": "policy network",
    "minilm": "MiniLM",
    "mlp": "MLP (PyTorch)",
    "resnet18": "ResNet-18",
    "bert": "BERT",
}


def gains_table():
    """Eager calls and hits of two versions, in µs."""
    columns = [("eager", "new", "eager", "us"), ("hit", "new", "hit", "us"), ("hit, CPU", "new", "hit", "cpu_us")]
    columns += [(f"`{way}`" if "_" in way else way, "new", way, "us") for way in ("forward_into", "session")]
    columns += [("hit with 0.1", "old", "hit", "us"), ("hit with 0.1, CPU", "old", "hit", "cpu_us")]
    measured = json.loads((RESULTS / "compare-h200.json").read_text(encoding="utf-8"))["models"]
    rows = [f"| Model | {' | '.join(title for title, *_ in columns)} |", "|---" * (1 + len(columns)) + "|"]
    for name, label in GAINS.items():
        cells = [f"{measured[name][which][way][what]['median']:.0f}" for _, which, way, what in columns]
        rows.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(rows)


GENERATED = {
    "options": options_table,
    "reasons": reasons_table,
    "errors": errors_table,
    "compared": compared_table,
    "gains": gains_table,
    "hits": hits_table,
    "modules": modules_table,
    "peers": peers_table,
}


def section(name, text=TEXT):
    """What stands between two markers."""
    return re.search(rf"<!-- {name} -->\n(.*?)\n?<!-- /{name} -->", text, re.DOTALL)[1]


@pytest.mark.parametrize("name", GENERATED)
def test_generated_tables_say_what_code_and_results_say(name):
    expected = GENERATED[name]()
    assert section(name) == expected, "python -m tests.test_readme writes it anew"


def test_the_picture_shows_what_was_measured():
    assert PICTURE.read_text(encoding="utf-8") == gain_picture(), "python -m tests.test_readme writes it anew"


def test_every_option_is_in_its_table():
    documented = arguments_of(GraphConfig)
    assert set(documented) == {field.name for field in fields(GraphConfig)}


def test_the_two_commands_are_there_to_the_letter():
    commands = [found["body"].strip() for found in FENCE.finditer(PAGES[README]) if found["info"] == "sh"]
    assert "pip install . && graphcache demo" in commands
    assert 'pip install -e ".[test]" && pytest -n 2 --dist loadfile' in commands


def test_there_are_snippets():
    assert len(SNIPPETS) >= 3
    assert len(GPU_SNIPPETS) >= 1
    assert {found["info"] for found in FENCE.finditer(TEXT)} == {
        "python",
        "python gpu",
        "python transformers",
        "sh",
        "text",
        "yaml",
    }


@pytest.mark.parametrize("source", SNIPPETS)
def test_snippets_run(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = compile(source, "a page", "exec")
    contextvars.copy_context().run(exec, code, {"__name__": "__main__"})


@pytest.mark.parametrize("source", TRANSFORMERS_SNIPPETS)
@pytest.mark.filterwarnings("ignore")
def test_snippets_of_transformers_run(source):
    pytest.importorskip("transformers")
    exec(compile(source, "a page", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("source", fenced("yaml"))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_configurations_of_a_cluster_are_what_ray_takes(source):
    schema = pytest.importorskip("ray.serve.schema")
    given = yaml.safe_load(source)
    taken = schema.ServeDeploySchema.model_validate(given)
    assert (
        taken.applications[0].deployments[0].num_replicas == given["applications"][0]["deployments"][0]["num_replicas"]
    )


@pytest.mark.parametrize("source", GPU_SNIPPETS)
def test_snippets_for_a_gpu_compile_and_name_what_exists(source):
    compile(source, "a page", "exec")
    names = list(names_in(source))
    assert names
    for name in names:
        resolve(name)


def names_in(source):
    """The dotted names under graphcache in some source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("graphcache."):
            yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "graphcache":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def resolve(name):
    """What a dotted name stands for; modules on the way are imported."""
    return pkgutil.resolve_name(name)


def test_a_name_that_does_not_exist_would_be_found():
    assert list(names_in("graphcache.runtime.nothing(1)")) == ["graphcache.runtime.nothing", "graphcache.runtime"]
    with pytest.raises(AttributeError):
        resolve("graphcache.runtime.nothing")


def test_names_in_the_text_exist():
    for name in set(re.findall(r"`(graphcache(?:\.\w+)+)", TEXT)):
        resolve(name)
    for name in re.findall(r"\| `(\w+)\(", TEXT):
        assert name in graphcache.runtime.__all__
    for name in graphcache.runtime.__all__:
        assert f"`{name}(" in TEXT, f"{name} is not in the table of modes"


def test_cache_info_and_the_environment_are_described_in_full():
    for field in fields(graphcache.CacheInfo):
        assert f"`{field.name}`" in TEXT
    sources = (path.read_text(encoding="utf-8") for path in Path(graphcache.__file__).parent.rglob("*.py"))
    for variable in {found for source in sources for found in re.findall(r"GRAPHCACHE_[A-Z]+(?:_[A-Z]+)*", source)}:
        assert f"`{variable}`" in TEXT


def test_links_lead_somewhere():
    for path, text in PAGES.items():
        targets = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text))
        for target in targets:
            name, _, anchor = target.partition("#")
            to = (path.parent / name).resolve() if name else path
            if not target.startswith("https://"):
                assert to.exists(), f"{path.name}: {target} does not exist"
                assert not anchor or anchor in anchors_of(PAGES[to]), f"{path.name}: {target} has no such heading"


def test_files_named_in_the_text_exist():
    named = set(re.findall(r"`((?:graphcache|tests|bench)/[\w/.]+)`", TEXT))
    assert "graphcache/dispatch/dispatcher.py" in named
    assert [name for name in named if not (ROOT / name).exists()] == []


GONE = r"\b(templates?|live view|signatures?|rooms|doors|outputs=\"view\"|record_trace|StaleOutputError)\b"


def test_hand_written_text_speaks_of_nothing_that_is_gone():
    """Generated tables follow the code, which has tests of its own."""
    for path, text in PAGES.items():
        for name in GENERATED:
            text = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", "", text, flags=re.DOTALL)
        assert re.findall(GONE, FENCE.sub("", text)) == [], path.name


def anchors_of(text):
    """What the headings of a page can be linked to as."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_linked_from_the_readme_and_begins_with_its_title():
    for path, text in PAGES.items():
        assert text.startswith("# ")
        assert path == README or f"](docs/{path.name})" in PAGES[README]
    assert len(PAGES[README].split()) <= MAX_WORDS


def shown_by(text):
    """The tests that a text names, each with its file."""
    return re.findall(r"\[`(test_\w+)`\]\(([\w/.]+)\)", text)


def test_the_tests_that_show_what_the_guides_promise_are_there():
    named = shown_by(section("guides"))
    assert len(named) >= 20
    for name, file in named:
        tree = ast.parse((ROOT / "docs" / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"
    rows = [row for row in section("guides").splitlines()[2:] if not row.startswith("| **")]
    assert [row for row in rows if not shown_by(row)] == [row for row in rows if "| No:" in row]


def test_a_test_that_is_not_there_would_be_found():
    assert shown_by("| a | [`test_nothing`](tests/test_readme.py) |") == [("test_nothing", "tests/test_readme.py")]


def write():
    """Write the generated tables and the picture."""
    PICTURE.write_text(gain_picture(), encoding="utf-8")
    for path, text in PAGES.items():
        for name, table in GENERATED.items():
            before, after = f"<!-- {name} -->\n", f"<!-- /{name} -->"
            if before in text:
                start, end = text.index(before) + len(before), text.index(after)
                text = f"{text[:start]}{table()}\n{text[end:]}"
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
