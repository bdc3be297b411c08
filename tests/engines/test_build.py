from __future__ import annotations

import struct
import types
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache.engines import build as room
from graphcache.engines.build import build
from graphcache.engines.library import Library, MessageLog
from graphcache.engines.profiles import Input, profiles
from graphcache.errors import ConfigError, EngineBuildError, NoGpuError

X = Input("x", (-1, 64), axes=("batch", None))
FIXED = Input("mask", (2, 3), axes=(None, None))
END = Input("end", (1,), host=True, axes=(None,))
SCALAR = Input("count", (), host=True)


def refusal(inputs: list[Input], shapes: Any) -> str:
    with pytest.raises(EngineBuildError) as caught:
        profiles(inputs, shapes)
    return str(caught.value)


def test_nothing_open_and_nothing_asked() -> None:
    assert profiles([FIXED], None) == []
    assert profiles([], {}) == []


def test_a_fixed_input_may_be_named_or_left_out() -> None:
    assert profiles([FIXED], {"mask": (2, 3)}) == [{"mask": ((2, 3), (2, 3), (2, 3))}]
    assert profiles([X, FIXED], {"x": (4, 64)}) == [{"x": ((4, 64), (4, 64), (4, 64))}]


def test_values_of_host_inputs() -> None:
    found = profiles([END, SCALAR], {"end": ((-1,), (4,), (2**40,)), "count": ((0,), (4,), (8,))})
    assert found == [{"end": ((-1,), (4,), (2**40,)), "count": ((0,), (4,), (8,))}]


def test_several_profiles_for_several_inputs() -> None:
    other = Input("y", (-1,))
    found = profiles(
        [X, other], {"x": [((1, 64), (2, 64), (4, 64)), ((8, 64), (8, 64), (9, 64))], "y": [((1,),) * 3, ((2,),) * 3]}
    )
    assert found == [
        {"x": ((1, 64), (2, 64), (4, 64)), "y": ((1,), (1,), (1,))},
        {"x": ((8, 64), (8, 64), (9, 64)), "y": ((2,), (2,), (2,))},
    ]


def test_open_inputs_without_shapes() -> None:
    assert refusal([X, FIXED, END], None) == (
        "the model leaves open the shape or the value of x (batch, 64), end (1) read on the host: pass the range to "
        "build for as (min, opt, max), such as shapes={'x': ((1, 64), (8, 64), (32, 64)), 'end': ((1,), (8,), (32,))}"
    )


def test_the_example_in_the_message_is_right() -> None:
    inputs = [X, END, SCALAR, Input("z", (3, -1, -1))]
    text = refusal(inputs, {})
    example = eval(text[text.index("shapes=") + len("shapes=") :])
    assert len(profiles(inputs, example)) == 1


def test_unknown_name() -> None:
    assert refusal([X, Input("y", (-1,))], {"z": (4, 64)}) == (
        "shapes names 'z', which is not an input of the model; its inputs are: x (batch, 64), y (?)"
    )


@pytest.mark.parametrize("shapes", [(1, 64), "x", [("x", (1, 64))]])
def test_not_a_dictionary(shapes: Any) -> None:
    assert refusal([X], shapes) == f"shapes={shapes!r}: expected a dictionary from names of inputs to shapes"


MALFORMED: list[Any] = [5, None, "1x64", {1, 64}, (1.0, 64), (True, 64), ("1", "64"), ((1, 64), (2, 64), "3x64")]
MALFORMED += [[(1, 64), (2, 64)], [(1, 64)] * 4, [[(1, 64)] * 3, (4, 64)], [[(1, 64)] * 2], [[[(1, 64)] * 3]]]


@pytest.mark.parametrize("spec", MALFORMED)
def test_malformed(spec: Any) -> None:
    assert refusal([X], {"x": spec}) == (
        f"shapes['x']={spec!r}: expected a shape such as (1, 64), a (min, opt, max) triple of shapes, or a list of "
        "such triples, one for each optimisation profile"
    )


SIZES = "the model's input x (batch, 64) takes 2 dimensions in [0, 2147483647]"
VALUES = "1 values in [-9223372036854775808, 9223372036854775807]"
RANGES: list[tuple[Input, Any, str]] = [
    (X, (1, 64, 3), f": min is (1, 64, 3); {SIZES}"),
    (X, [], f": min is (); {SIZES}"),
    (
        X,
        [((1, 64), (2, 64), (3, 64)), ((1, 64), (2, 64), (3,))],
        f"[1]: max is (3,); {SIZES}",
    ),
    (END, ((1, 2),) * 3, f": min is (1, 2); the model's input end (1) read on the host takes {VALUES}"),
    (SCALAR, ((),) * 3, f": min is (); the model's input count () read on the host takes {VALUES}"),
    (X, (-1, 64), f": min is (-1, 64); {SIZES}"),
    (X, ((1, 64), (2, 64), (2**31, 64)), f": max is (2147483648, 64); {SIZES}"),
    (
        END,
        ((1,), (2,), (2**63,)),
        f": max is (9223372036854775808,); the model's input end (1) read on the host takes {VALUES}",
    ),
    (X, ((5, 64), (4, 64), (8, 64)), ", axis 0 (batch): min 5, opt 4, max 8; expected min <= opt <= max"),
    (END, ((1,), (9,), (8,)), ", axis 0: min 1, opt 9, max 8; expected min <= opt <= max"),
    (X, ((1, 32), (2, 64), (3, 64)), ", axis 1: min 32, opt 64, max 64; but the model fixes that axis at 64"),
]


@pytest.mark.parametrize(("each", "spec", "message"), RANGES)
def test_ranges_that_do_not_fit(each: Input, spec: Any, message: str) -> None:
    assert refusal([each], {each.name: spec}) == f"shapes[{each.name!r}]{message}"


def test_unequal_numbers_of_profiles() -> None:
    shapes = {"x": [((1, 64), (2, 64), (3, 64))] * 2, "mask": (2, 3)}
    assert refusal([X, FIXED], shapes) == (
        "shapes gives different numbers of optimisation profiles: {'x': 2, 'mask': 1}; expected as many "
        "(min, opt, max) triples for every input"
    )


@st.composite
def fitting(draw: st.DrawFn) -> tuple[list[Input], dict[str, Any], list[dict[str, Any]]]:
    """Inputs, a right way to write their shapes, and the profiles that this must give."""
    count = draw(st.integers(1, 3))
    inputs, shapes = [], {}
    expected: list[dict[str, Any]] = [{} for _ in range(count)]
    for index in range(draw(st.integers(1, 3))):
        host = draw(st.booleans())
        sizes = st.integers(-(2**63), 2**63 - 1) if host else st.integers(0, 2**31 - 1)
        dims = tuple(draw(st.lists(st.one_of(st.just(-1), st.integers(0, 2**31 - 1)), max_size=4)))
        if host:
            dims = draw(st.sampled_from([(), (1,), (3,)]))
        each = Input(f"i{index}", dims, host)
        wanted = (-1,) * each.values if host else dims
        ranges = []
        for number in range(count):
            axes = [sorted(draw(st.tuples(sizes, sizes, sizes))) if size < 0 else [size] * 3 for size in wanted]
            triple = tuple(tuple(axis[k] for axis in axes) for k in range(3))
            ranges.append(triple)
            expected[number][each.name] = triple
        form: Any = ranges if count > 1 or draw(st.booleans()) else ranges[0]
        if count == 1 and len(set(ranges[0])) == 1 and draw(st.booleans()):
            form = ranges[0][0]
        inputs.append(each)
        shapes[each.name] = draw(st.sampled_from([form, _as_lists(form)]))
    return inputs, shapes, expected


def _as_lists(value: Any) -> Any:
    return [_as_lists(item) for item in value] if isinstance(value, list | tuple) else value


@given(fitting())
def test_whatever_fits_is_taken_as_it_was_written(
    case: tuple[list[Input], dict[str, Any], list[dict[str, Any]]],
) -> None:
    inputs, shapes, expected = case
    assert profiles(inputs, shapes) == expected


WILD = st.recursive(
    st.one_of(st.integers(), st.booleans(), st.floats(), st.text(max_size=3), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.tuples(inner, inner, inner)),
    max_leaves=12,
)


@given(st.lists(st.integers(-1, 4), max_size=3), st.booleans(), WILD)
def test_anything_else_is_refused_by_name(dims: list[int], host: bool, spec: Any) -> None:
    each = Input("x", (2,) if host else tuple(dims), host)
    try:
        found = profiles([each], {"x": spec})
    except EngineBuildError as error:
        refused = str(error)
    else:
        refused = "shapes['x']"
        for profile in found:
            assert all(low <= usual <= high for low, usual, high in zip(*profile["x"], strict=True))
    assert refused.startswith("shapes['x']")


@pytest.mark.parametrize("workspace", [0, -1, True, 1.5, "1G"])
def test_bad_workspace(workspace: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        build(b"", workspace=workspace)
    assert str(caught.value) == f"workspace={workspace!r}: expected a number of bytes, 1 or more, or None"


def use(monkeypatch: pytest.MonkeyPatch, flavour: Any, **members: Any) -> None:
    module: Any = types.SimpleNamespace(**members)
    monkeypatch.setattr(room, "find", lambda name: Library(module, flavour, "9.9", MessageLog({})))


def test_a_flavour_without_a_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "tensorrt_lean")
    with pytest.raises(EngineBuildError) as caught:
        build(b"", library="lean")
    assert str(caught.value) == (
        "tensorrt_lean 9.9 runs engines but cannot build them; pass library='tensorrt_rtx', which needs no GPU to "
        "build, or library='tensorrt'"
    )


def test_the_full_tensorrt_builds_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "tensorrt", Builder=None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(NoGpuError, match=r"^building an engine with the full TensorRT needs a CUDA device") as caught:
        build(b"")
    assert "TensorRT-RTX still builds engines" in str(caught.value)


class TestRTX:
    """The real builder, on small models made here."""

    @pytest.fixture(autouse=True)
    def rtx(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("tensorrt_rtx")
        self.onnx = pytest.importorskip("onnx")
        monkeypatch.setenv("GRAPHCACHE_TENSORRT", "rtx")

    def model(self, *nodes: Any, inputs: dict[str, Any], outputs: dict[str, Any], **constants: Any) -> Any:
        """A model of ``self.node(...)``; inputs and outputs are float, or int64 where the first dimension says so."""
        helper, kinds = self.onnx.helper, self.onnx.TensorProto

        def info(name: str, dims: list[Any]) -> Any:
            int64 = dims[:1] == ["int64"]
            return helper.make_tensor_value_info(name, kinds.INT64 if int64 else kinds.FLOAT, dims[int64:])

        graph = helper.make_graph(
            list(nodes),
            "model",
            [info(*item) for item in inputs.items()],
            [info(*item) for item in outputs.items()],
            list(constants.values()),
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    def node(self, operator: str, *inputs: str, to: str) -> Any:
        return self.onnx.helper.make_node(operator, inputs, [to], name=f"the_{operator.lower()}")

    def mlp(self) -> Any:
        # raw: only raw data can be kept outside the file
        weights = struct.pack("64f", *range(64))
        return self.model(
            self.node("MatMul", "x", "w", to="h"),
            self.node("Relu", "h", to="y"),
            inputs={"x": ["batch", 8]},
            outputs={"y": ["batch", 8]},
            w=self.onnx.helper.make_tensor("w", self.onnx.TensorProto.FLOAT, [8, 8], weights, raw=True),
        )

    def relu(self) -> Any:
        return self.model(self.node("Relu", "x", to="y"), inputs={"x": [2, 3]}, outputs={"y": [2, 3]})

    def slice(self) -> Any:
        int64 = self.onnx.TensorProto.INT64
        return self.model(
            self.node("Slice", "x", "start", "end", "axis", to="y"),
            inputs={"x": ["n", 16], "end": ["int64", 1]},
            outputs={"y": ["n", "m"]},
            start=self.onnx.helper.make_tensor("start", int64, [1], [0]),
            axis=self.onnx.helper.make_tensor("axis", int64, [1], [1]),
        )

    shapes = {"x": ((1, 8), (4, 8), (16, 8))}  # noqa: RUF012

    def test_from_a_proto_from_bytes_and_from_a_path(self, tmp_path: Any) -> None:
        model, file = self.mlp(), tmp_path / "m.onnx"
        self.onnx.save(model, file)
        for source in (model, model.SerializeToString(), bytearray(model.SerializeToString()), file, str(file)):
            engine = build(source, shapes=self.shapes)
            assert isinstance(engine, bytes)
            assert len(engine) > 1000

    def test_from_a_path_with_external_weights(self, tmp_path: Any) -> None:
        file = tmp_path / "m.onnx"
        self.onnx.save(self.mlp(), file, save_as_external_data=True, location="w.bin", size_threshold=0)
        assert len(build(file, shapes=self.shapes)) > 1000
        (tmp_path / "w.bin").unlink()
        with pytest.raises(EngineBuildError, match=r"rejected .*m\.onnx: .*Failed to open file: .*w\.bin.* beside it$"):
            build(file, shapes=self.shapes)

    def test_options(self) -> None:
        plain = build(self.mlp(), shapes=self.shapes)
        two = [((1, 8), (4, 8), (16, 8)), ((17, 8), (32, 8), (32, 8))]
        assert len(build(self.mlp(), shapes={"x": two})) > len(plain)
        assert build(self.mlp(), shapes={"x": (4, 8)}, weight_streaming=True, workspace=1 << 26)
        assert build(self.relu())
        assert build(self.relu(), shapes={"x": (2, 3)}, refittable=())

    def test_host_inputs(self) -> None:
        shapes = {"x": ((1, 16), (4, 16), (8, 16)), "end": ((1,), (4,), (8,))}
        assert build(self.slice(), shapes=shapes)
        with pytest.raises(EngineBuildError, match=r"the shape or the value of end \(1\) read on the host: pass"):
            build(self.slice(), shapes={"x": shapes["x"]})

    def test_shapes_are_checked_against_the_model(self) -> None:
        with pytest.raises(EngineBuildError, match=r"leaves open the shape or the value of x \(batch, 8\): pass"):
            build(self.mlp())
        with pytest.raises(EngineBuildError, match=r"^shapes\['x'\], axis 1: min 9, opt 9, max 9; but the model fixes"):
            build(self.mlp(), shapes={"x": (1, 9)})

    def test_an_operator_that_the_parser_does_not_know(self) -> None:
        model = self.model(self.node("FooBar", "x", to="y"), inputs={"x": [2]}, outputs={"y": [2]})
        with pytest.raises(EngineBuildError) as caught:
            build(model)
        text = str(caught.value)
        assert f"rejected the ONNX model of {model.ByteSize()} bytes: node 'the_foobar' (FooBar): " in text
        assert "load plugins that implement them" in text

    def test_a_layer_without_an_implementation(self, caplog: pytest.LogCaptureFixture) -> None:
        model = self.model(self.node("NonZero", "x", to="y"), inputs={"x": [2, 3]}, outputs={"y": ["int64", 2, "k"]})
        with pytest.raises(EngineBuildError) as caught:
            build(model)
        text = str(caught.value)
        # The builder refuses it (1.4, 1.5), or the parser already, as an operator of an unknown plugin (1.7).
        assert "the_nonzero has no runners that implement it" in text or "node 'the_nonzero' (NonZero): " in text
        assert "run it in PyTorch" in text or "Take these operators out of the model" in text
        assert not [record for record in caplog.records if record.levelname == "ERROR"]

    def test_too_little_workspace(self) -> None:
        with pytest.raises(EngineBuildError, match=r"workspace limit.* workspace=1024 bytes may be too little\.$"):
            build(self.mlp(), shapes=self.shapes, workspace=1024)

    def test_weights_that_cannot_be_refitted(self) -> None:
        with pytest.raises(EngineBuildError) as caught:
            build(self.mlp(), shapes=self.shapes, refittable=["w", "nope"])
        assert str(caught.value).startswith(
            "refittable: the model has no weights named 'nope' that TensorRT could mark"
        )

    @pytest.mark.skipif("__import__('torch').cuda.is_available()")
    @pytest.mark.parametrize("refittable", [True, ["w"], "w"])
    def test_refittable_needs_a_gpu(self, refittable: Any) -> None:
        with pytest.raises(
            EngineBuildError, match=r"builds refittable engines only on a machine with a GPU; leave out"
        ):
            build(self.mlp(), shapes=self.shapes, refittable=refittable)

    @pytest.mark.parametrize("data", [b"", b"not an ONNX model", bytes(100)])
    def test_what_is_not_onnx(self, data: bytes, tmp_path: Any) -> None:
        file = tmp_path / "m.onnx"
        file.write_bytes(data)
        for source in (data, file):
            with pytest.raises(EngineBuildError, match=r"ONNX model"):
                build(source)

    def test_a_file_that_is_not_there(self, tmp_path: Any) -> None:
        for path in (tmp_path / "none.onnx", tmp_path):
            with pytest.raises(EngineBuildError, match=f"^there is no ONNX file at '{path}' \\(working directory"):
                build(path)

    def test_something_else_entirely(self) -> None:
        with pytest.raises(EngineBuildError, match=r"^cannot build from a int; expected the path of an ONNX file"):
            build(5)

    def test_a_proto_that_cannot_be_serialised(self) -> None:
        class Huge:
            def SerializeToString(self) -> bytes:
                raise ValueError("too large")

        with pytest.raises(
            EngineBuildError, match=r"too large\. Save it to a file with external data and pass its path"
        ):
            build(Huge())

    def test_progress(self) -> None:
        told: list[tuple[str, int, int]] = []
        build(self.relu(), progress=lambda *step: told.append(step))
        assert len(told) > 10
        assert all(0 <= done <= steps for _, done, steps in told)
        assert told[0][1] == 0
        assert told[-1] == (told[0][0], told[0][2], told[0][2])

    @pytest.mark.parametrize("error", [ValueError("enough"), KeyboardInterrupt("enough")])
    def test_progress_that_raises_cancels(self, error: BaseException, capfd: pytest.CaptureFixture[str]) -> None:
        calls = []

        def progress(*step: Any) -> None:
            calls.append(step)
            raise error

        with pytest.raises(type(error), match="enough"):
            build(self.relu(), progress=progress)
        assert len(calls) == 1
        assert "Exception caught" not in "".join(capfd.readouterr())
