from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections import OrderedDict, defaultdict, deque, namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import flipproof as fp
from flipproof.errors import ConfigError, ModelError
from flipproof.hardening._example_inputs import _is_shape as is_shape
from flipproof.hardening._example_inputs import from_plain, shapes_of, to_plain
from flipproof.hardening.bounds.bounded import Saturate
from flipproof.hardening.methods.base import Hardening
from flipproof.hardening.report import hardening_report

DTYPES = [torch.float64, torch.float32, torch.float16, torch.int64, torch.uint8, torch.bool]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["two", "one"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def mutated(tree, place, value, wipe):
    """A JSON tree in which one part, chosen by `place`, is replaced or taken out."""
    slots = []

    def visit(node):
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            slots.append((node, key))
            visit(node[key])

    visit(tree)
    node, key = slots[place % len(slots)]
    if wipe:
        del node[key]
    else:
        node[key] = value
    return tree


METHODS: list[Hardening] = [
    fp.Ranger(),
    fp.Ranger(per="neuron", replace="zero"),
    fp.ProAct(epochs=1, epochs_last=1, held_out=0.5),
    fp.Guard(),
]


class Tokens(nn.Module):
    """Integer inputs in a dict, functional activations with and without a lower bound, BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.one, self.two = (
            nn.Embedding(5, 4),
            nn.BatchNorm1d(4),
            nn.Linear(4, 6),
            nn.Linear(6, 3),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = nn.functional.gelu(self.norm(self.embed(tokens).mean(dim=1)))
        return self.two(torch.relu(self.one(x)))


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    return [({"tokens": torch.randint(5, (20, 7), generator=generator)}, torch.arange(20) % 3) for _ in range(2)]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_comes_back_bit_for_bit(method, data, tmp_path):
    model = Tokens()
    safe = fp.harden(model, method, data=data)
    path = fp.save_hardened(safe, tmp_path / "new" / "safe.safetensors")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = Tokens()  # other weights: those of the file count
    again = fp.load_hardened(other, path)
    assert again.state_dict().keys() == safe.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in safe.state_dict().items())
    for inputs, _ in data:
        assert torch.equal(again.eval()(**inputs), safe.eval()(**inputs))
    assert hardening_report(again).table().equals(hardening_report(safe).table())
    assert hardening_report(again).method == hardening_report(safe).method
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["safe.safetensors"]


def test_the_same_campaign_runs_on_it(data, tmp_path):
    safe = fp.harden(Tokens(), fp.Guard(), data=data).eval()
    again = fp.load_hardened(Tokens(), fp.save_hardened(safe, tmp_path / "s.safetensors")).eval()
    setup = {"data": data, "faults": fp.BitErrorRate([1e-2]), "trials": 5}
    one, two = (fp.assess(m, **setup).trials.drop(columns="seconds") for m in (safe, again))
    assert one.equals(two)


def test_another_network_is_refused(data, tmp_path):
    path = fp.save_hardened(fp.harden(Tokens(), fp.Guard(), data=data), tmp_path / "s.safetensors")

    class Wider(Tokens):
        def forward(self, tokens: Tensor) -> Tensor:
            return self.two(torch.tanh(self.one(self.norm(self.embed(tokens).mean(dim=1)))))

    with pytest.raises(ModelError, match="which this Wider does not have"):
        fp.load_hardened(Wider(), path)


@pytest.mark.parametrize("content", [b"", b"no tensors at all", b"\x08\0\0\0\0\0\0\0{}      "])
def test_other_files_are_refused(content, tmp_path):
    (tmp_path / "f.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match="is not a hardened model that flipproof wrote"):
        fp.load_hardened(Tokens(), tmp_path / "f.safetensors")
    with pytest.raises(ConfigError, match="is not a hardened model"):
        fp.load_hardened(Tokens(), tmp_path / "absent.safetensors")


def test_what_a_file_cannot_hold_is_refused(data, tmp_path):
    with pytest.raises(ModelError, match="was not hardened by flipproof"):
        fp.save_hardened(Tokens(), tmp_path / "x.safetensors")

    class Own(Saturate):
        pass

    safe = fp.harden(Tokens(), fp.Ranger(), data=data)
    site = hardening_report(safe).sites[0]
    safe.get_submodule(site.module).__class__ = Own
    with pytest.raises(ModelError, match="is bounded by a Own"):
        fp.save_hardened(safe, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> tuple[dict, dict[str, Tensor]]:
    """What a file says, and its tensors."""
    torch.manual_seed(4)
    data = [({"tokens": torch.randint(5, (20, 7))}, torch.arange(20) % 3)]
    path = fp.save_hardened(fp.harden(Tokens(), fp.Guard(), data=data), tmp_path_factory.mktemp("g") / "g.safetensors")
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["flipproof_hardened"]), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118


class TestHostileFiles:
    """A file may come from anybody: it is data, whatever it says."""

    def refused(self, folder, about, tensors, message, kind=fp.FlipproofError):
        path = folder / "hostile.safetensors"
        text = about if isinstance(about, str) else json.dumps(about)
        save_file(tensors, path, {"flipproof_hardened": text})
        modules, files = set(sys.modules), set(folder.iterdir())
        with pytest.raises(kind, match=message):
            fp.load_hardened(Tokens(), path)
        assert set(sys.modules) == modules
        assert set(folder.iterdir()) == files

    def test_a_module_that_the_file_names_is_not_imported(self, good, tmp_path, monkeypatch):
        (tmp_path / "evil.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\nX = 1\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        about, tensors = good
        key = json.dumps([{"__enum__": True, "fqn": "evil:X", "name": "X"}])
        leaf = {"type": None, "context": None, "children_spec": []}
        spec = [1, {"type": "builtins.dict", "context": key, "children_spec": [leaf]}]
        old = {**about, "example": json.dumps(spec), "leaves": [[[20, 7], "torch.int64"]]}
        self.refused(tmp_path, old, tensors, "hostile.safetensors, example: expected an object", ConfigError)
        named = {
            **about,
            "example": {"dict": [[{"__enum__": True, "fqn": "evil:X"}, {"shape": [1], "dtype": "int64"}]]},
        }
        self.refused(tmp_path, named, tensors, r"example, dict\[0\]: expected a key", ConfigError)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        ("example", "message"),
        [
            ({"shape": [2**40], "dtype": "int64"}, "inputs of at most 1,073,741,824 bytes, got 8796093022208"),
            ({"shape": [2**62, 2**62], "dtype": "int64"}, r"shape\[0\]: expected a whole number from 0"),
            ({"shape": [2**53] * 16, "dtype": "int64"}, "inputs of at most 1,073,741,824 bytes"),
            ({"shape": [1] * 17, "dtype": "int64"}, "at most 16 axes"),
            ({"shape": [-1], "dtype": "int64"}, r"shape\[0\]: expected a whole number from 0 .*got -1"),
            ({"shape": [1.5], "dtype": "int64"}, "a whole number"),
            ({"shape": [True], "dtype": "int64"}, "a whole number"),
            ({"shape": [1], "dtype": "load"}, "dtype: expected one of bfloat16, bool.*got 'load'"),
            ({"shape": [1], "dtype": ["int64"]}, "dtype: expected a text"),
            ({"shape": [1]}, "expected a field 'dtype'"),
            ({"shape": [1], "dtype": "int64", "more": 1}, r"expected only dtype, shape, got \['more'\] too"),
            ({"module": "os"}, "expected a shape, list, tuple, deque"),
            ({"tuple": [{"shape": [1], "dtype": "bool"}] * 5000}, "at most 4,096 parts"),
            ({"deque": [], "longest": -1}, "longest: expected a whole number"),
            ({"dict": [["x"]]}, r"dict\[0\]: expected a key"),
            (None, "example: expected an object with named fields, got None"),
        ],
    )
    def test_an_example_that_is_none(self, good, tmp_path, example, message):
        about, tensors = good
        self.refused(tmp_path, {**about, "example": example}, tensors, message, ConfigError)

    def test_nesting_without_end(self, good, tmp_path):
        about, tensors = good
        deep: dict = {"shape": [1], "dtype": "int64"}
        for _ in range(200):
            deep = {"list": [deep]}
        self.refused(tmp_path, {**about, "example": deep}, tensors, "nested at most 32 deep", ConfigError)
        self.refused(tmp_path, "[" * 10**6, tensors, "nested a few levels deep", ConfigError)
        self.refused(
            tmp_path, json.dumps({**about, "version": "N"}).replace('"N"', "9" * 5000), tensors, "expected JSON"
        )
        self.refused(tmp_path, json.dumps({**about, "notes": ["x" * 2**24]}), tensors, "at most 16,777,216 characters")

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("version", 1, "expected version 4 of the format, got 1; save the model again"),
            ("method", 3, "method: expected a text, got 3"),
            ("sites", {"0": 1}, "sites: expected a list, got a?.*'0'"),
            ("sites", ["x"], r"sites\[0\]: expected an object with named fields, got 'x'"),
            ("notes", [1], r"notes\[0\]: expected a text, got 1"),
            ("parameters", "9", "parameters: expected a whole number from 0 to .*, got '9'"),
            ("clean_drop", "0", "clean_drop: expected a number, got '0'"),
            ("forwards", True, "forwards: expected a number, got True"),
            ("opened", 1, "opened: expected true or false, got 1"),
            ("guarded", "two", "guarded: expected a list, got 'two'"),
            ("guarded", ["one"], "no threshold a class and one resting score for the outputs of 'one'"),
            ("guarded", ["two", "two"], "guards the outputs of 'two', which is no linear layer"),
            ("fenced", "two", "fenced: expected a list, got 'two'"),
            ("fenced", ["act"], r"fences the outputs of \['act'\], no layers of this"),
            ("unreachable", [{"name": "a"}], r"unreachable\[0\]: expected a field 'reason'"),
            ("surprise", 1, r"expected only .*, got \['surprise'\] too"),
        ],
    )
    def test_a_field_of_another_kind(self, good, tmp_path, field, value, message):
        about, tensors = good
        self.refused(tmp_path, {**about, field: value}, tensors, message)

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("kind", "Module", r"sites\[0\], kind: expected one of ClampInput, Saturate, Smooth, ZeroAbove"),
            ("calls", -1, r"sites\[0\], calls: expected a whole number"),
            ("more", {"weight": 1}, r"sites\[0\], more: expected only"),
            ("function", "gelu ", "which this Tokens does not have"),
            ("module", "two", "which this Tokens does not have"),
        ],
    )
    def test_a_site_of_another_kind(self, good, tmp_path, field, value, message):
        about, tensors = good
        sites = [{**about["sites"][0], field: value}, *about["sites"][1:]]
        self.refused(tmp_path, {**about, "sites": sites}, tensors, message)

    def test_the_slope_of_a_smooth_bound(self, good, tmp_path):
        about, tensors = good
        for slope in (0, -1.0, float("nan"), float("inf"), "20"):
            sites = [{**about["sites"][0], "kind": "Smooth", "more": {"slope": slope}}, *about["sites"][1:]]
            self.refused(tmp_path, {**about, "sites": sites}, tensors, "slope: expected a number")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.double(), r"torch.float64 \(6,\) in the file and torch.float32 \(6,\) in the model"),
            (lambda t: t.int(), r"torch.int32 \(6,\) in the file"),
            (lambda t: t[:5].clone(), r"torch.float32 \(5,\) in the file and torch.float32 \(6,\)"),
        ],
    )
    def test_a_weight_of_another_kind(self, good, tmp_path, change, message):
        about, tensors = good
        self.refused(tmp_path, about, {**tensors, "one.bias": change(tensors["one.bias"])}, message, ModelError)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.int(), "expected floating-point numbers, got torch.int32"),
            (lambda t: t.double(), "which does not fit the torch.float32"),
            (lambda t: t.expand(1000, *t.shape).contiguous(), "which does not fit the torch.float32"),
            (lambda t: torch.zeros(5), r"is torch.float32 \(5,\), which does not fit"),
        ],
    )
    def test_a_threshold_of_another_kind(self, good, tmp_path, change, message):
        about, tensors = good
        name = next(n for n in tensors if n.endswith("threshold") and not n.startswith("two"))
        self.refused(tmp_path, about, {**tensors, name: change(tensors[name])}, message)

    def test_tensors_that_are_too_many_or_too_few(self, good, tmp_path):
        about, tensors = good
        self.refused(tmp_path, about, {**tensors, "x": torch.zeros(1)}, r"unexpected \['x'\]", ModelError)
        fewer = {name: tensor for name, tensor in tensors.items() if name != "one.bias"}
        self.refused(tmp_path, about, fewer, r"missing \['one.bias'\]", ModelError)

    def test_a_file_that_ends_early(self, good, tmp_path):
        about, tensors = good
        save_file(tensors, tmp_path / "whole", {"flipproof_hardened": json.dumps(about)})
        content = (tmp_path / "whole").read_bytes()
        for length in (7, 8, 100, len(content) // 2, len(content) - 1):
            (tmp_path / "part").write_bytes(content[:length])
            with pytest.raises(ConfigError, match="part is not a hardened model that flipproof wrote"):
                fp.load_hardened(Tokens(), tmp_path / "part")

    @settings(max_examples=25, deadline=None)
    @given(place=st.integers(0, 10**6), value=JSON, wipe=st.booleans())
    def test_any_part_replaced_by_anything(self, good, place, value, wipe):
        about, tensors = good
        changed = mutated(json.loads(json.dumps(about)), place, value, wipe)
        self.loads_or_is_refused(json.dumps(changed), tensors)

    @settings(max_examples=20, deadline=None)
    @given(name=st.integers(0, 100), shape=st.lists(st.integers(0, 7), max_size=3), dtype=st.sampled_from(DTYPES))
    def test_any_tensor_replaced_by_any_other(self, good, name, shape, dtype):
        about, tensors = good
        key = sorted(tensors)[name % len(tensors)]
        self.loads_or_is_refused(json.dumps(about), {**tensors, key: torch.ones(shape).to(dtype)})

    @settings(max_examples=60, deadline=None)
    @given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), cut=st.booleans())
    def test_any_byte_replaced_or_all_after_it_cut(self, good, place, byte, cut):
        about, tensors = good

        def damage(content: bytes) -> bytes:
            at = int(place * len(content))
            return content[:at] if cut else content[:at] + bytes([byte]) + content[at + 1 :]

        self.loads_or_is_refused(json.dumps(about), tensors, damage)

    def loads_or_is_refused(self, text, tensors, damage=lambda content: content):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "f.safetensors"
            save_file(tensors, path, {"flipproof_hardened": text})
            path.write_bytes(damage(path.read_bytes()))
            modules = set(sys.modules)
            with contextlib.suppress(fp.FlipproofError):
                fp.load_hardened(Tokens(), path)
            assert set(sys.modules) == modules
            assert list(Path(folder).iterdir()) == [path]


@pytest.mark.parametrize(
    "inputs",
    [
        lambda x: {"x": [x, (x, {"y": x})]},
        lambda x: (OrderedDict(a=x, b=[x]), deque([x], 3)),
        lambda x: [x.half(), {1: x.to(torch.complex64)}],
    ],
)
def test_every_container_of_inputs_is_described(inputs):
    example = shapes_of(inputs(torch.ones(2, 3)))
    again = from_plain(json.loads(json.dumps(to_plain(example))), "here")
    assert again == example
    assert type(again) is type(example)
    assert pytree.tree_flatten(again, is_leaf=is_shape)[1] == pytree.tree_flatten(example, is_leaf=is_shape)[1]


def test_inputs_that_no_file_can_describe(data, tmp_path):
    Pair = namedtuple("Pair", "a b")
    x = torch.ones(2, 3)
    for inputs in ({"x": Pair(x, x)}, {"x": defaultdict(list, a=x)}, {"x": {(1, 2): x}}):
        with pytest.raises(ModelError, match="a file can describe tensors in lists"):
            to_plain(shapes_of(inputs))
    with pytest.raises(ModelError, match="takes 4,294,967,296 bytes; a file describes up to 1,073,741,824"):
        to_plain(((2**30,), torch.float32))
