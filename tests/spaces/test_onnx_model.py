"""ONNX graphs that onnxruntime runs: what is hit is what a file with these bits would hold."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import flipproof as fp
from flipproof.errors import ConfigError
from flipproof.faults import TrialGenerator
from flipproof.formats import Integer
from flipproof.spaces.contract import Faults, Space
from flipproof.spaces.parameters import FaultSpace
from flipproof.testing import SpaceContract

onnx = pytest.importorskip("onnx", reason="onnx is not installed (flipproof[onnx])")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (flipproof[onnx])")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

KINDS = ("float", "dynamic", "QDQ", "QOperator")


def images() -> Tensor:
    return torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One network, as a float graph and as onnxruntime quantises it."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter([{"x": images().numpy()}])

        def get_next(self) -> Any:
            return next(self.left, None)

    folder = tmp_path_factory.mktemp("graphs")
    paths = {kind: folder / f"{kind}.onnx" for kind in KINDS}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 6), nn.ReLU(), nn.Linear(6, 4))
        onnx.save(float_graph(net), paths["float"])
        quantize_dynamic(paths["float"], paths["dynamic"])
        quantize_static(paths["float"], paths["QDQ"], Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
        quantize_static(paths["float"], paths["QOperator"], Reader(), quant_format=QuantFormat.QOperator)
    return {kind: onnx.load(path) for kind, path in paths.items()}


def float_graph(net: nn.Module) -> Any:
    """The network written down node by node."""
    stored = [numpy_helper.from_array(p.detach().numpy(), name) for name, p in net.named_parameters()]
    nodes = [
        helper.make_node("Conv", ["x", "0.weight", "0.bias"], ["c"], kernel_shape=[3, 3]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Flatten", ["r"], ["f"]),
        helper.make_node("Gemm", ["f", "3.weight", "3.bias"], ["g"], transB=1),
        helper.make_node("Relu", ["g"], ["s"]),
        helper.make_node("Gemm", ["s", "5.weight", "5.bias"], ["y"], transB=1),
    ]
    return model_of(nodes, [("x", ["n", 1, 6, 6])], [("y", ["n", 4])], stored)


def model_of(nodes: list[Any], inputs: list[Any], outputs: list[Any], stored: list[Any], opset: int = 17) -> Any:
    def values(named: list[Any]) -> list[Any]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in named]

    graph = helper.make_graph(nodes, "g", values(inputs), values(outputs), stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def plainly(proto: Any, x: Tensor, *, rewritten: bool = False) -> Tensor:
    """What onnxruntime gives for the graph as it is, its numbers being initialisers."""
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if rewritten else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def edited(proto: Any, places: list[tuple[str, int, int]]) -> Any:
    """A graph with these bits of its initialisers changed, in the bytes of the message."""
    found = onnx.ModelProto()
    found.CopyFrom(proto)
    for name, value, bit in places:
        (stored,) = (tensor for tensor in found.graph.initializer if tensor.name == name)
        array = np.atleast_1d(numpy_helper.to_array(stored).copy())
        memory = array.reshape(-1).view(np.uint8)
        memory[value * array.itemsize + bit // 8] ^= np.uint8(1 << bit % 8)
        stored.CopyFrom(numpy_helper.from_array(array.reshape(tuple(stored.dims)), name))
    return found


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("kind", KINDS)
def test_without_faults_it_is_onnxruntime_bit_by_bit(kind, graphs):
    net, x = fp.OnnxModel(graphs[kind]), images()
    assert same(net(x), plainly(graphs[kind], x))
    assert torch.allclose(net(x), plainly(graphs[kind], x, rewritten=True), atol=1e-5)
    assert not net.training


@pytest.mark.parametrize("kind", KINDS)
def test_answers_under_faults_are_those_of_an_edited_file(kind, graphs):
    net, x = fp.OnnxModel(graphs[kind]), images()
    space = FaultSpace(net, where=fp.Parameters(buffers=True))
    golden = net(x)
    before = {name: tensor.clone() for name, tensor in space.tensors.items()}
    stored = {tensor.name for tensor in graphs[kind].graph.initializer}
    assert {site.name for site in space.sites} == stored
    assert space.coverage == 1
    differing = 0
    for trial in range(150):
        draw = Faults(TrialGenerator(0, kind, trial).distinct(1 if trial < 100 else 10, space.bits))
        try:
            expected: Any = plainly(edited(graphs[kind], space.places(draw)), x)
        except Exception as error:  # onnxruntime has a class for each of its reasons
            expected = error
        with space.corrupted(draw) as changed:
            assert changed == len(draw)
            try:
                found: Any = net(x)
            except Exception as error:
                found = error
        assert isinstance(found, Tensor) == isinstance(expected, Tensor), (space.places(draw), found, expected)
        if isinstance(found, Tensor):
            assert same(found, expected), space.places(draw)
            differing += not same(found, golden)
    assert differing > 75
    assert same(net(x), golden)
    assert all(torch.equal(tensor, before[name]) for name, tensor in space.tensors.items())


def test_what_is_stored_is_described(graphs):
    kinds = {site.name: (site.kind, site.format) for site in FaultSpace(fp.OnnxModel(graphs["QDQ"])).sites}
    assert kinds["0.weight_quantized"] == kinds["5.weight_quantized"] == ("weight", Integer(8))
    assert kinds["0.weight_scale"] == kinds["x_scale"] == ("scale", fp.Float32())
    assert kinds["0.weight_zero_point"] == ("zero_point", Integer(8))
    assert kinds["0.bias_quantized"] == ("bias", Integer(32))
    floats = {site.name: site.kind for site in FaultSpace(fp.OnnxModel(graphs["float"])).sites}
    assert floats == {f"{layer}.{part}": part for layer in (0, 3, 5) for part in ("weight", "bias")}
    dynamic = FaultSpace(fp.OnnxModel(graphs["dynamic"]))
    (shape,) = dynamic.left_out  # of the bias, for a Reshape
    assert dynamic.left_out[shape] == "a buffer: fp.Parameters(buffers=True) takes it"


@pytest.mark.parametrize("kind", KINDS)
def test_campaigns_are_audited_and_the_same_in_two_processes(kind, graphs):
    net = fp.OnnxModel(graphs[kind])
    batches = [(x, net(x).argmax(dim=1)) for x in images().split(4)]
    setup = {"faults": fp.RandomBits([1, 12]), "trials": 6, "where": fp.Parameters(exclude="*shape*")}
    found = fp.assess(net, batches, **setup, audit=1.0)
    assert found.trials["audited"].all()
    assert found.summary["masked"].iloc[1] < 1
    two = fp.assess(net, batches, **setup, workers=2)
    drop = ["seconds", "audited"]
    assert two.trials.drop(columns=drop).equals(found.trials.drop(columns=drop))


def test_other_numbers_or_another_graph_are_another_campaign(graphs, tmp_path):
    def run(proto: Any) -> None:
        net = fp.OnnxModel(proto)
        batches = [(images(), torch.arange(8) % 4)]
        fp.assess(net, batches, faults=fp.RandomBits(1), trials=2, journal=tmp_path / "j.jsonl")

    run(graphs["float"])
    with pytest.raises(fp.errors.JournalError, match="weights"):
        run(edited(graphs["float"], [("3.weight", 0, 22)]))
    changed = onnx.ModelProto()
    changed.CopyFrom(graphs["float"])
    changed.graph.node[4].op_type = "LeakyRelu"
    with pytest.raises(fp.errors.JournalError, match="attributes"):
        run(changed)


def test_formats_and_codes(graphs):
    net, x = fp.OnnxModel(graphs["QOperator"]), images()
    golden = net(x)
    space = FaultSpace(
        net, format={"*.weight_quantized": fp.BCH(fp.Integer(8), t=1)}, where=fp.Parameters(kinds="weight")
    )
    with space.stored():
        for trial in range(10):
            with space.corrupted(Faults(TrialGenerator(0, "bch", trial).distinct(1, space.bits))):
                assert space.word_outcomes == (1, 0, 0)
                assert same(net(x), golden)
    halves = fp.OnnxModel(graphs["float"])
    with FaultSpace(halves, format=fp.Float16()).stored():
        expected = plainly(with_halves(graphs["float"]), x)
        assert same(halves(x), expected)


def with_halves(proto: Any) -> Any:
    found = onnx.ModelProto()
    found.CopyFrom(proto)
    for stored in found.graph.initializer:
        rounded = numpy_helper.to_array(stored).astype(np.float16).astype(np.float32)
        stored.CopyFrom(numpy_helper.from_array(rounded, stored.name))
    return found


PACKED = {
    "float": {"*.weight": fp.Affine(5)},
    "QDQ": {"*.weight_quantized": fp.SECDED(fp.Integer(8), block=64), "*.bias_quantized": fp.SECDED(fp.Integer(32))},
    "QOperator": {"*.weight_quantized": fp.BCH(fp.Integer(8), t=1)},
}


@pytest.mark.parametrize("kind", PACKED)
def test_numbers_of_a_graph_are_really_packed_as_they_are_simulated(kind, graphs):
    net, x = fp.OnnxModel(graphs[kind]), images()
    packed = fp.pack_(fp.OnnxModel(graphs[kind]), PACKED[kind])
    space, really = FaultSpace(net, format=PACKED[kind]), FaultSpace(packed)
    assert [(s.name, s.kind, s.format) for s in really.sites] == [(s.name, s.kind, s.format) for s in space.sites]
    with space.stored():
        assert same(net(x), packed(x))
        for trial in range(20):
            draw = Faults(TrialGenerator(0, "packed", trial).distinct(20, space.bits))
            with space.corrupted(draw), really.corrupted(draw):
                assert space.word_outcomes == really.word_outcomes
                assert same(net(x), packed(x))


def test_protect_chooses_how_the_numbers_of_a_graph_are_stored(graphs):
    net = fp.OnnxModel(graphs["float"])
    x = torch.randn(160, 1, 6, 6, generator=torch.Generator().manual_seed(2))
    found = fp.protect(net, [(x, net(x).argmax(dim=1))], ber=1e-3, trials=3, front=0, hardenings={}, rivals={})
    assert found.verdict == "met"
    assert set(found.formats) == {site.name for site in FaultSpace(net).sites}
    assert isinstance(found.model, fp.OnnxModel)


def test_paths_bytes_and_messages_are_one_graph(graphs, tmp_path):
    x = images()
    onnx.save(graphs["QDQ"], tmp_path / "graph.onnx")
    answers = [
        fp.OnnxModel(given)(x)
        for given in (
            graphs["QDQ"],
            graphs["QDQ"].SerializeToString(),
            tmp_path / "graph.onnx",
            str(tmp_path / "graph.onnx"),
        )
    ]
    assert all(same(answer, answers[0]) for answer in answers)


def test_numbers_in_other_files_are_read_from_the_folder_alone(graphs, tmp_path):
    x = images()
    (tmp_path / "inside").mkdir()
    path = tmp_path / "inside" / "graph.onnx"
    proto = onnx.ModelProto()
    proto.CopyFrom(graphs["float"])
    onnx.save(proto, path, save_as_external_data=True, location="numbers.bin", size_threshold=0)
    assert same(fp.OnnxModel(path)(x), plainly(graphs["float"], x))
    apart = onnx.load(path, load_external_data=False)
    with pytest.raises(ConfigError, match="keeps numbers in other files: pass the path"):
        fp.OnnxModel(apart)
    for location in ("../numbers.bin", str(tmp_path / "numbers.bin")):
        for stored in apart.graph.initializer:
            for entry in stored.external_data:
                if entry.key == "location":
                    entry.value = location
        path.write_bytes(apart.SerializeToString())
        (tmp_path / "numbers.bin").write_bytes((tmp_path / "inside" / "numbers.bin").read_bytes())
        with pytest.raises(ConfigError, match="outside the folder of the graph"):
            fp.OnnxModel(path)


def test_constants_of_the_graph_are_stored_numbers_too():
    weight = numpy_helper.from_array(np.full((3, 2), 2.0, np.float32), "inner")
    nodes = [
        helper.make_node("Constant", [], ["w"], value=weight),
        helper.make_node("Constant", [], ["h"], value_float=0.5),
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Mul", ["m", "h"], ["y"]),
    ]
    proto = model_of(nodes, [("x", [1, 3])], [("y", [1, 2])], [])
    net = fp.OnnxModel(proto)
    space = FaultSpace(net)
    assert {site.name: site.values for site in space.sites} == {"w": 6, "h": 1}
    x = torch.ones(1, 3)
    assert net(x).tolist() == plainly(proto, x).tolist() == [[3, 3]]
    with space.corrupted(space.faults([("h", 0, 31)])):
        assert net(x).tolist() == [[-3, -3]]


@pytest.mark.parametrize(
    "kind", [TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2]
)
def test_words_of_half_a_byte_and_eight_bit_floats(kind):
    """Weights that are decoded by DequantizeLinear; two words of 4 bits share a byte, the first in its low half."""
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 112, 7 * 3, dtype=np.uint8)  # without NaN
    half = kind in (TensorProto.INT4, TensorProto.UINT4)
    codes = raw & 15
    padded = np.append(codes, np.uint8(0))
    memory = padded[::2] | padded[1::2] << 4 if half else raw
    stored = helper.make_tensor("w", kind, [7, 3], memory.tobytes(), raw=True)
    scale = numpy_helper.from_array(np.array([0.1, 0.2, 0.3], np.float32), "w_scale")
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "w_scale"], ["d"], axis=1),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    proto = model_of(nodes, [("x", [7, 7])], [("y", [7, 3])], [stored, scale], opset=21)
    net, x = fp.OnnxModel(proto), torch.eye(7)
    space = FaultSpace(net)
    assert {site.name: (site.kind, site.bits) for site in space.sites} == {
        "w": ("weight", 8 * len(memory)),
        "w_scale": ("scale", 96),
    }

    def by_hand(memory: np.ndarray) -> Tensor:
        words = torch.from_numpy(memory)
        if half:
            values = torch.stack([words & 15, words >> 4], dim=1).reshape(-1)[:21].float()
            values = torch.where(values > 7, values - 16, values) if kind == TensorProto.INT4 else values
        else:
            values = words.view(torch.float8_e4m3fn if kind == TensorProto.FLOAT8E4M3FN else torch.float8_e5m2).float()
        return values.reshape(7, 3) * torch.tensor([0.1, 0.2, 0.3])

    assert torch.allclose(net(x), by_hand(memory))
    for value in (0, 4, len(memory) - 1):
        for bit in (0, 3, 4, 6):
            changed = memory.copy()
            changed[value] ^= np.uint8(1 << bit)
            with space.corrupted(space.faults([("w", value, bit)])):
                assert torch.allclose(net(x), by_hand(changed), equal_nan=True)
    assert torch.allclose(copy.deepcopy(net)(x), by_hand(memory))


def test_bfloat16_numbers():
    array = torch.randn(3, 2).bfloat16()
    stored = helper.make_tensor("w", TensorProto.BFLOAT16, [3, 2], array.view(torch.int16).numpy().tobytes(), raw=True)
    nodes = [
        helper.make_node("Cast", ["w"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "f"], ["y"]),
    ]
    net = fp.OnnxModel(model_of(nodes, [("x", [3, 3])], [("y", [3, 2])], [stored]))
    space = FaultSpace(net)
    assert space.sites[0].format == fp.BFloat16()
    with space.corrupted(space.faults([("w", 1, 15)])):
        found = net(torch.eye(3))
    expected = array.float().clone()
    expected.view(-1)[1] *= -1
    assert torch.equal(found, expected)


def test_names_that_are_modules_or_attributes_already():
    one = {
        name: numpy_helper.from_array(np.ones(2, np.float32), name)
        for name in ("a", "a.b", "graph", "training", "c..d")
    }
    names, nodes = list(one), []
    last = "x"
    for i, name in enumerate(names):
        nodes.append(helper.make_node("Add", [last, name], [f"s{i}"]))
        last = f"s{i}"
    nodes[-1].output[0] = "y"
    net = fp.OnnxModel(model_of(nodes, [("x", [2])], [("y", [2])], list(one.values())))
    assert net(torch.zeros(2)).tolist() == [5, 5]
    space = FaultSpace(net)
    assert [site.name for site in space.sites] == ["a", "a/b", "graph_", "training_", "c._.d"]
    with space.corrupted(space.faults([("graph_", 0, 31)])):
        assert net(torch.zeros(2)).tolist() == [3, 5]


def test_several_inputs_and_outputs():
    nodes = [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Mul", ["sum", "k"], ["scaled"])]
    stored = [numpy_helper.from_array(np.float32(3).reshape(()), "k")]
    net = fp.OnnxModel(model_of(nodes, [("a", [2]), ("b", [2])], [("sum", [2]), ("scaled", [2])], stored))
    a, b = torch.ones(2), torch.ones(2)
    assert net(a, b=b)["scaled"].tolist() == [6, 6]
    assert set(net(a, b)) == {"sum", "scaled"}
    for wrong in (lambda: net(a), lambda: net(a, b, a), lambda: net(a, c=b)):
        with pytest.raises(ConfigError, match=r"takes the inputs \['a', 'b'\]"):
            wrong()


def test_what_cannot_be_read_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "no.onnx").write_bytes(b"no graph at all")
    for given, message in (
        (tmp_path / "no.onnx", "is no ONNX graph that can be read"),
        (tmp_path / "absent.onnx", "is no ONNX graph that can be read"),
        (b"\xff\xff", "is no ONNX graph that can be read"),
        (3, "takes a path, bytes or an onnx.ModelProto, got int"),
    ):
        with pytest.raises(ConfigError, match=message):
            fp.OnnxModel(given)
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["one"], value_float=1.0)],
        "then",
        [],
        [helper.make_tensor_value_info("one", TensorProto.FLOAT, [])],
    )
    nodes = [
        helper.make_node("Cast", ["x"], ["c"], to=TensorProto.BOOL),
        helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner),
    ]
    with pytest.raises(ConfigError, match="stores numbers in a graph of its own"):
        fp.OnnxModel(model_of(nodes, [("x", [])], [("y", [])], []))


class TestOnnx(SpaceContract):
    def network(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = nn.Sequential(
                nn.Conv2d(1, 1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3), nn.ReLU(), nn.Linear(3, 4)
            )
        return fp.OnnxModel(float_graph(net))

    def space(self, network: nn.Module) -> Space:
        return FaultSpace(network)

    def run(self, network: nn.Module) -> Tensor:
        return network(images())


def test_the_folder_of_a_link_is_where_it_leads(graphs, tmp_path: Path):
    (tmp_path / "real").mkdir()
    proto = onnx.ModelProto()
    proto.CopyFrom(graphs["float"])
    onnx.save(proto, tmp_path / "real" / "g.onnx", save_as_external_data=True, location="n.bin", size_threshold=0)
    (tmp_path / "link.onnx").symlink_to(tmp_path / "real" / "g.onnx")
    assert same(fp.OnnxModel(tmp_path / "link.onnx")(images()), plainly(graphs["float"], images()))
