"""ONNX graphs as modules: onnxruntime computes, and every stored number is a tensor that it reads at each run.

The numbers of a graph (its initialisers and constants) become inputs of the graph. Inputs cannot be folded, packed or
kept by a session, so that what lies in their memory is what the kernels read: a fault is there from the next run on.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from flipproof.errors import ConfigError
from flipproof.spaces.quantised import role_of

if TYPE_CHECKING:
    import onnx

_QUANTISING = ("quantize", "qlinear", "integer", "qgemm", "qattention", "nbits")
_NORMS = ("BatchNormalization", "LayerNormalization", "InstanceNormalization", "GroupNormalization")
_WHOLE_BYTES = {  # kinds of numbers that NumPy has no name for, as torch calls them
    "BFLOAT16": torch.bfloat16,
    "FLOAT8E4M3FN": torch.float8_e4m3fn,
    "FLOAT8E5M2": torch.float8_e5m2,
}
_HALF_BYTES = ("INT4", "UINT4")


class Initialisers(nn.Module):
    """What a graph stores under names that begin alike.

    Attributes:
        kinds: what each of its tensors is for, by its own name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kinds: dict[str, str] = {}


@dataclass(frozen=True)
class _Feed:
    """One stored number of the graph, as onnxruntime takes it."""

    name: str
    place: str
    kind: int
    shape: tuple[int, ...]


class OnnxModel(Initialisers):
    """A network that onnxruntime runs, with all that it stores as parameters and buffers.

    Its parameters are the floating-point and quantised numbers of the graph, under the names that the graph gives them
    (dots lead into modules): weights in their own type (two of 4 bits in a byte), scales, zero points, biases. Shapes,
    axes and other indices are buffers. Constants of the graph are there too. Faults in any of them are in the memory
    that the next run reads. `assess`, `FaultSpace` and the rest take it like any other module.

    The graph runs as it is written: onnxruntime's own rewriting is off, which would fold stored numbers into others.

    Args:
        model: the path of an .onnx file, its bytes, or an `onnx.ModelProto`. What a file keeps in other files has to be
            in its folder.
        providers: execution providers of onnxruntime, in order; None for its CPU.

    Raises:
        ConfigError: if onnx and onnxruntime are missing, or naming what cannot be read or run.

    Example:
        >>> import flipproof as fp, numpy as np, onnx, torch
        >>> from onnx import helper, numpy_helper
        >>> value = lambda name, *shape: helper.make_tensor_value_info(name, 1, shape)
        >>> graph = helper.make_graph(
        ...     [helper.make_node("MatMul", ["x", "fc.weight"], ["y"])], "g", [value("x", 2, 3)], [value("y", 2, 2)],
        ...     [numpy_helper.from_array(np.ones((3, 2), np.float32), "fc.weight")],
        ... )
        >>> opset = [helper.make_opsetid("", 17)]
        >>> net = fp.OnnxModel(helper.make_model(graph, opset_imports=opset, ir_version=8))
        >>> net(torch.ones(2, 3)).tolist(), fp.FaultSpace(net).sites[0].name
        ([[3.0, 3.0], [3.0, 3.0]], 'fc.weight')
        >>> space = fp.FaultSpace(net)
        >>> with space.corrupted(space.faults([("fc.weight", 0, 31)])):  # a sign
        ...     net(torch.ones(2, 3)).tolist()
        [[1.0, 3.0], [1.0, 3.0]]
    """

    def __init__(
        self, model: str | os.PathLike[str] | bytes | onnx.ModelProto, providers: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        proto = _read(model)
        self.providers = _providers(providers)
        self.feeds: tuple[_Feed, ...] = ()  # before tensors, which are not to take the names of attributes
        self.graph = b""
        self.inputs: tuple[str, ...] = ()
        self.outputs: tuple[str, ...] = ()
        self._session = _Session(self.graph, self.providers)
        found = _lifted(proto)
        uses = list(_uses(proto.graph))
        quantised = any(_quantises(op) for _, (op, _) in uses)
        feeds = []
        for name, (kind, array, shape) in found.items():
            place = self._place(name)
            owner, _, own = place.rpartition(".")
            holder = self.get_submodule(owner)
            assert isinstance(holder, Initialisers)
            what = _kind(name, array, [use for used, use in uses if used == name], quantised)
            if what == "buffer":
                holder.register_buffer(own, array)
            else:
                holder.register_parameter(own, nn.Parameter(array, requires_grad=False))
                holder.kinds[own] = what
            feeds.append(_Feed(name, place, kind, shape))
        self.feeds = tuple(feeds)
        self.inputs = tuple(value.name for value in proto.graph.input if value.name not in found)
        self.outputs = tuple(value.name for value in proto.graph.output)
        _as_inputs(proto.graph, self.feeds)
        self.graph = proto.SerializeToString(deterministic=True)
        self._session = _Session(self.graph, self.providers)
        self.eval()

    def _place(self, name: str) -> str:
        """Where a tensor of the graph is to be: dots lead into modules, unless something is there already."""
        parts = [part or "_" for part in name.split(".")]
        holder: nn.Module = self
        for part in parts[:-1]:
            child = holder._modules.get(part)
            if child is None and hasattr(holder, part):
                return self._free(name.replace(".", "/"))
            if child is None:
                child = Initialisers()
                holder.add_module(part, child)
            holder = child
        if hasattr(holder, parts[-1]):
            return self._free(name.replace(".", "/"))
        return ".".join(parts)

    def _free(self, name: str) -> str:
        while hasattr(self, name):
            name += "_"
        return name

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor | dict[str, Tensor]:
        """What the graph gives: its one output, or all of them by their names.

        Args:
            args: its inputs, in their order.
            kwargs: or by their names.

        Raises:
            ConfigError: for other inputs than the graph has.
        """
        given = dict(zip(self.inputs, args, strict=False)) | kwargs
        if len(args) > len(self.inputs) or set(given) != set(self.inputs):
            raise ConfigError(
                f"this graph takes the inputs {list(self.inputs)}, got {len(args)} and {sorted(kwargs)} by name"
            )
        stored = [self.get_parameter_or_buffer(feed.place) for feed in self.feeds]
        found = self._session.run(self.feeds, stored, given, self.outputs)
        return found[self.outputs[0]] if len(self.outputs) == 1 else found

    def get_parameter_or_buffer(self, place: str) -> Tensor:
        """One of its tensors, by its qualified name."""
        owner, _, name = place.rpartition(".")
        tensor = getattr(self.get_submodule(owner), name)
        assert isinstance(tensor, Tensor)
        return tensor


def _providers(given: Sequence[str] | None) -> tuple[str, ...]:
    """Execution providers, all of which are there.

    Raises:
        ConfigError: naming one that is not.
    """
    if given is None:
        return ("CPUExecutionProvider",)
    import onnxruntime

    known = onnxruntime.get_available_providers()
    if isinstance(given, str) or any(one not in known for one in given):
        raise ConfigError(f"OnnxModel: providers= takes a list of some of {', '.join(known)}, got {given!r}")
    return tuple(given)


class _Session:
    """A session of onnxruntime, made when it is first used; copies and other processes make their own."""

    def __init__(self, graph: bytes, providers: tuple[str, ...]) -> None:
        self._made = (graph, providers)
        self._session: Any = None
        self._where: list[int] = []
        self._values: dict[str, Any] = {}

    def __reduce__(self) -> tuple[type[_Session], tuple[bytes, tuple[str, ...]]]:
        return _Session, self._made

    def __deepcopy__(self, memo: dict[int, Any]) -> _Session:
        return _Session(*self._made)

    def run(
        self, feeds: tuple[_Feed, ...], stored: list[Tensor], given: Mapping[str, Tensor], outputs: tuple[str, ...]
    ) -> dict[str, Tensor]:
        """The outputs by their names."""
        session = self._opened()
        where = [tensor.data_ptr() for tensor in stored]
        if where != self._where:  # a tensor may be given other memory
            self._values = {feed.name: _value(feed, tensor) for feed, tensor in zip(feeds, stored, strict=True)}
            self._where = where
        values = {**self._values, **{name: _input(tensor) for name, tensor in given.items()}}
        found = session.run_with_ort_values(list(outputs), values)
        return {name: torch.from_numpy(value.numpy()) for name, value in zip(outputs, found, strict=True)}

    def _opened(self) -> Any:
        if self._session is None:
            import onnxruntime

            graph, providers = self._made
            options = onnxruntime.SessionOptions()
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.intra_op_num_threads = 1  # sums are taken in one order
            options.log_severity_level = 4  # what faults make of a graph is no news
            try:
                self._session = onnxruntime.InferenceSession(graph, options, providers=list(providers))
            except Exception as error:  # onnxruntime has a class for each of its reasons
                raise ConfigError(
                    f"onnxruntime cannot run this graph where its stored numbers are inputs, which faults need: "
                    f"{str(error).strip().splitlines()[0][:300]}"
                ) from error
        return self._session


def _value(feed: _Feed, tensor: Tensor) -> Any:
    """A tensor's own memory, as onnxruntime takes it."""
    from onnxruntime import OrtValue

    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ConfigError(f"{feed.place} has to be contiguous and on the CPU, where onnxruntime reads it")
    size = int(np.prod(feed.shape, dtype=np.int64))
    itemsize = max(tensor.element_size(), 1)
    if not tensor.numel():
        memory = np.zeros(feed.shape, f"u{itemsize}")
    else:  # of two numbers a byte, onnxruntime reads half of what it is told there is
        there = (ctypes.c_uint8 * (size * itemsize)).from_address(tensor.data_ptr())
        memory = np.ctypeslib.as_array(there).view(f"u{itemsize}").reshape(feed.shape)
    return OrtValue.ortvalue_from_numpy_with_onnx_type(memory, feed.kind)


def _input(tensor: Tensor) -> Any:
    from onnxruntime import OrtValue

    return OrtValue.ortvalue_from_numpy(np.ascontiguousarray(tensor.detach().cpu().numpy()))


def _read(model: object) -> onnx.ModelProto:
    """A checked graph, without functions, with all that it keeps in other files."""
    try:
        import onnx
        import onnx.external_data_helper
        import onnx.inliner
        import onnxruntime  # noqa: F401  (it is needed at the first run)
    except ImportError as error:
        raise ConfigError(f"OnnxModel needs onnx and onnxruntime: pip install 'flipproof[onnx]' ({error})") from None
    try:
        if isinstance(model, (str, os.PathLike)):
            path = Path(model)
            proto = onnx.load(path, load_external_data=False)
            _check_folder(proto, path.resolve().parent)
            onnx.external_data_helper.load_external_data_for_model(proto, str(path.resolve().parent))
        elif isinstance(model, bytes):
            proto = onnx.load_from_string(model)
        elif isinstance(model, onnx.ModelProto):
            proto = onnx.ModelProto()
            proto.CopyFrom(model)
        else:
            raise ConfigError(f"OnnxModel takes a path, bytes or an onnx.ModelProto, got {type(model).__name__}")
        if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in _every_tensor(proto)):
            raise ConfigError("this graph keeps numbers in other files: pass the path of its file")
        if proto.functions:
            proto = onnx.inliner.inline_local_functions(proto)
        onnx.checker.check_model(proto)
    except ConfigError:
        raise
    except Exception as error:  # of protobuf, of the checker, of the file system
        raise ConfigError(f"this is no ONNX graph that can be read: {type(error).__name__}: {error}") from error
    return proto


def _every_tensor(proto: onnx.ModelProto) -> Iterable[Any]:
    from onnx.external_data_helper import _get_all_tensors

    return _get_all_tensors(proto)


def _check_folder(proto: onnx.ModelProto, folder: Path) -> None:
    """Refuse numbers that a file keeps outside its own folder."""
    import onnx

    for tensor in _every_tensor(proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        if not location or not (folder / location).resolve().is_relative_to(folder):
            raise ConfigError(f"{tensor.name} lies in {location!r}, outside the folder of the graph: it is not read")


def _lifted(proto: onnx.ModelProto) -> dict[str, tuple[int, Tensor, tuple[int, ...]]]:
    """Take initialisers and constants out of a graph: (kind, memory, shape) by name."""
    import onnx
    from onnx import numpy_helper

    graph = proto.graph
    for node in graph.node:
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else list(attribute.graphs)
            if any(part.initializer or any(n.op_type == "Constant" for n in part.node) for part in inner):
                raise ConfigError(
                    f"{node.op_type} {node.name} stores numbers in a graph of its own, which faults do not reach; "
                    f"export the model without branches and loops"
                )
    if graph.sparse_initializer:
        raise ConfigError(f"{graph.sparse_initializer[0].values.name} is sparse; store it densely")
    found: dict[str, tuple[int, Tensor, tuple[int, ...]]] = {}
    for tensor in graph.initializer:
        if tensor.data_type != onnx.TensorProto.STRING:
            found[tensor.name] = _memory(tensor)
    kept = []
    for node in graph.node:
        value = next((a for a in node.attribute if node.op_type == "Constant"), None)
        if value is None or value.type in (onnx.AttributeProto.STRING, onnx.AttributeProto.STRINGS):
            kept.append(node)
        elif value.type == onnx.AttributeProto.TENSOR:
            found[node.output[0]] = _memory(value.t)
        elif value.type in (onnx.AttributeProto.FLOAT, onnx.AttributeProto.FLOATS):
            numbers = onnx.helper.get_attribute_value(value)
            found[node.output[0]] = _memory(numpy_helper.from_array(np.array(numbers, np.float32)))
        elif value.type in (onnx.AttributeProto.INT, onnx.AttributeProto.INTS):
            numbers = onnx.helper.get_attribute_value(value)
            found[node.output[0]] = _memory(numpy_helper.from_array(np.array(numbers, np.int64)))
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
    left = [tensor for tensor in graph.initializer if tensor.name not in found]
    del graph.initializer[:]
    graph.initializer.extend(left)
    return found


def _memory(tensor: Any) -> tuple[int, Tensor, tuple[int, ...]]:
    """(kind, its numbers as torch holds them, shape) of a tensor of a graph."""
    import onnx
    from onnx import numpy_helper

    kind, shape = int(tensor.data_type), tuple(int(size) for size in tensor.dims)
    name = onnx.TensorProto.DataType.Name(kind)
    array = numpy_helper.to_array(tensor)
    if name in _HALF_BYTES:
        codes = array.reshape(-1).astype(np.int8).view(np.uint8) & 15
        codes = np.append(codes, np.zeros(codes.size % 2, np.uint8))
        return kind, torch.from_numpy(codes[::2] | codes[1::2] << 4), shape
    if name in _WHOLE_BYTES:
        words = np.ascontiguousarray(array).view(f"i{array.itemsize}")
        return kind, torch.from_numpy(words.copy()).view(_WHOLE_BYTES[name]).reshape(shape), shape
    try:
        return kind, torch.from_numpy(np.array(array, order="C")).reshape(shape), shape
    except TypeError:
        raise ConfigError(f"{tensor.name} is {name}, which torch has no type for") from None


def _uses(graph: onnx.GraphProto) -> Iterator[tuple[str, tuple[str, str]]]:
    """(tensor, (operator, what the operator calls it)) for every input of every node."""
    import onnx.defs

    for node in graph.node:
        try:
            formal = [value.name for value in onnx.defs.get_schema(node.op_type, domain=node.domain).inputs]
        except Exception:  # an operator of onnxruntime's own, whose schema onnx does not know
            formal = list(_OWN.get(node.op_type, ()))
        for i, name in enumerate(node.input):
            yield name, (node.op_type, formal[i] if i < len(formal) else "")


_OWN = {
    "QGemm": ("A", "a_scale", "a_zero_point", "B", "b_scale", "b_zero_point", "C", "y_scale", "y_zero_point"),
    "QLinearAdd": ("A", "A_scale", "A_zero_point", "B", "B_scale", "B_zero_point", "C_scale", "C_zero_point"),
    "QLinearMul": ("A", "A_scale", "A_zero_point", "B", "B_scale", "B_zero_point", "C_scale", "C_zero_point"),
    "QLinearSigmoid": ("X", "X_scale", "X_zero_point", "Y_scale", "Y_zero_point"),
    "QLinearLeakyRelu": ("X", "X_scale", "X_zero_point", "Y_scale", "Y_zero_point"),
    "QLinearGlobalAveragePool": ("X", "x_scale", "x_zero_point", "y_scale", "y_zero_point"),
    "QLinearAveragePool": ("X", "x_scale", "x_zero_point", "y_scale", "y_zero_point"),
    "QLinearSoftmax": ("X", "X_scale", "X_zero_point", "Y_scale", "Y_zero_point"),
    "DynamicQuantizeMatMul": ("A", "B", "b_scale", "b_zero_point", "bias"),
    "MatMulIntegerToFloat": ("A", "B", "a_scale", "b_scale", "a_zero_point", "b_zero_point", "bias"),
    "MatMulNBits": ("A", "B", "scales", "zero_points", "g_idx", "bias"),
    "DequantizeLinear": ("x", "x_scale", "x_zero_point"),
    "QuantizeLinear": ("x", "y_scale", "y_zero_point"),
}


def _quantises(op: str) -> bool:
    return any(word in op.lower() for word in _QUANTISING)


def _kind(name: str, array: Tensor, uses: list[tuple[str, str]], quantised: bool) -> str:
    """What a stored tensor is for, as the operators say that read it, or else its name."""
    quantising = [formal for op, formal in uses if _quantises(op)]
    if any(any(norm in op for norm in _NORMS) for op, _ in uses):
        return "norm"
    if (role := next(filter(None, map(role_of, quantising)), None)) is not None:
        return role
    wide = array.dtype in (torch.int64, torch.int32, torch.int16, torch.uint32, torch.uint64, torch.uint16)
    if array.dtype == torch.bool or (wide and not quantising):
        return "buffer"
    if quantised and (role := role_of(name)) is not None:
        return role
    if array.dtype == torch.int32 or "bias" in name or (array.dim() == 1 and any(f in ("B", "C") for _, f in uses)):
        return "bias"
    return "weight" if array.dim() >= 2 or quantising else "other"


def _as_inputs(graph: onnx.GraphProto, feeds: tuple[_Feed, ...]) -> None:
    """Declare stored tensors as inputs of the graph."""
    from onnx import helper

    known = {value.name for value in graph.input}
    graph.input.extend(
        helper.make_tensor_value_info(feed.name, feed.kind, feed.shape) for feed in feeds if feed.name not in known
    )
