"""Whether a model answers alike where it is deployed, against the same runs written out here."""

import copy
import warnings

import pytest
import torch
from torch import nn

import flipproof as fp
from flipproof._fields import Fields
from flipproof.errors import ConfigError, DataError
from flipproof.running import ways
from flipproof.running.deployment import Deployment, Way

pytestmark = pytest.mark.usefixtures("gated")


@pytest.fixture
def no_onnx(monkeypatch):
    monkeypatch.setattr(ways, "find_spec", lambda name: None)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


def images(samples=20):
    return torch.randn(samples, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def by_name(found):
    return {way.name: way for way in found.ways}


def state_of(model):
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    return tensors, places, {name: set(vars(module)) for name, module in model.named_modules()}, torch.get_rng_state()


def assert_as_before(model, before):
    tensors, places, attributes, random = state_of(model)
    assert tensors.keys() == before[0].keys()
    assert all(torch.equal(tensors[name], before[0][name]) for name in tensors)
    assert (places, attributes) == (before[1], before[2])
    assert torch.equal(random, before[3])


def test_each_way_is_what_it_says_and_the_model_comes_back():
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    net, x = network().train(), images()
    before = state_of(net)
    found = by_name(fp.check_deployment(net, [(x, torch.zeros(20))], samples=6))
    assert_as_before(net, before)
    assert net.training
    assert all(module.training for module in net.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())

    net.eval()
    with torch.no_grad():
        whole, half = net(x[:6]), net(x[:3])
        alone = torch.cat([net(x[i : i + 1]) for i in range(6)])
        program = torch.export.export(net, (x[:6],), dynamic_shapes=({0: torch.export.Dim("n")},))
        exported = [program.module()(x[:6]), program.module()(x[:3])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.onnx.export(program, dynamo=True, verbose=False, optimize=False).model_proto
    session = runtime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    there = [torch.from_numpy(session.run(None, {name: x[:n].numpy()})[0]) for n in (6, 3)]

    def gap(*pairs):
        return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)

    assert found["batch 1 against N"].difference == gap((alone, whole))
    assert found["torch.export"].difference == gap((exported[0], whole), (exported[1], half))
    assert found["onnxruntime"].difference == pytest.approx(gap((there[0], whole), (there[1], half)), abs=1e-6)
    room = 1e3 * 2.0**-23 * float(whole.abs().max())
    for way in found.values():
        assert way.result == ("within rounding" if way.difference else "bit-equal")
        assert (way.room, way.changed, way.reason) == (room, 0, "")
        assert way.seconds > 0


class OtherwiseWhereItIsExported(nn.Module):
    """Answers the second class once it is traced."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        scores = self.layer(x)
        return scores + torch.tensor([0.0, 10.0]) if torch.compiler.is_compiling() else scores


class AmongOthers(nn.Module):
    """A sample's scores depend on the samples beside it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        scores = self.layer(x)
        return scores - scores.mean(dim=0)


@pytest.mark.usefixtures("no_onnx")
def test_a_program_that_answers_otherwise_is_found():
    torch.manual_seed(0)
    net, x = OtherwiseWhereItIsExported(), torch.randn(12, 4)
    found = fp.check_deployment(net, [(x, torch.zeros(12))], samples=7)
    way = by_name(found)["torch.export"]
    assert way.result == "beyond rounding"
    assert way.difference == pytest.approx(10)
    with torch.no_grad():
        assert way.changed == int((net(x[:7]).argmax(dim=1) == 0).sum()) > 0
    assert not found.agrees
    assert by_name(found)["batch 1 against N"].result in ("bit-equal", "within rounding")


@pytest.mark.usefixtures("no_onnx")
def test_a_sample_that_depends_on_others_is_found():
    torch.manual_seed(0)
    net, x = AmongOthers(), torch.randn(12, 4)
    found = fp.check_deployment(net, [(x, torch.zeros(12))], plain=net.layer)
    way = by_name(found)["batch 1 against N"]
    with torch.no_grad():
        assert way.difference == pytest.approx(float(net(x[:8]).abs().max()))  # alone, it is 0
        assert way.changed == int((net(x[:8]).argmax(dim=1) != 0).sum())
    assert way.result == "beyond rounding"
    assert not found.agrees
    # a plain model of which the same is true leaves room for it
    alike = by_name(fp.check_deployment(net, [(x, torch.zeros(12))], plain=copy.deepcopy(net)))["batch 1 against N"]
    assert (alike.result, alike.room) == ("within rounding", pytest.approx(10 * way.difference))


@pytest.mark.usefixtures("no_onnx")
def test_the_task_says_what_another_decision_is():
    torch.manual_seed(0)
    net, x = AmongOthers(), torch.randn(12, 4)
    with torch.no_grad():
        scores = net(x[:8])  # alone, they are 0
    for tolerance in (0.2, 0.4):
        asked = fp.check_deployment(net, [(x, torch.randn(12, 2))], task=fp.Regression(tolerance=tolerance))
        moved = (scores.abs() > tolerance).any(dim=1)
        assert by_name(asked)["batch 1 against N"].changed == int(moved.sum()) > 0

    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11))

        def forward(self, tokens):
            scores = self.layers(tokens)
            if torch.compiler.is_compiling():  # other words where a sample begins with word 9
                return scores + 50.0 * torch.eye(11)[4] * (tokens[:, :1, None] == 9)
            return scores

    words, following = torch.randint(9, (10, 6)), torch.randint(11, (10, 6))
    words[2, 0] = 9
    way = by_name(fp.check_deployment(Text(), [(words, following)], task=fp.Tokens()))["torch.export"]
    assert (way.result, way.changed) == ("beyond rounding", 1)
    assert by_name(fp.check_deployment(Text(), [(words, following)]))["torch.export"].changed == 1  # recognised


class Eight(nn.Module):
    """Takes eight samples and no other number once it is traced, and keeps what it has computed."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        self.last = self.layer(x)
        return self.last.reshape(8, 3) if torch.compiler.is_compiling() else self.last + 0


class Branches(nn.Module):
    def forward(self, x):
        return x if float(x.sum()) > 0 else -x


def test_what_cannot_be_exported_is_refused_with_its_reason_and_leaves_no_trace():
    net, x = Eight(), torch.randn(12, 4)
    net(x)
    before = (net.last, net.last.clone())
    found = by_name(fp.check_deployment(net, [(x, torch.zeros(12))]))
    assert net.last is before[0]
    assert torch.equal(*before)
    assert found["torch.export"].result == "refused"
    assert "specialized it to be a constant (8)" in found["torch.export"].reason
    assert (found["torch.export"].difference, found["torch.export"].changed) == (None, None)
    assert found["onnxruntime"].reason == "there is no exported program to make a graph of"
    assert found["batch 1 against N"].result in ("bit-equal", "within rounding")
    branches = by_name(fp.check_deployment(Branches(), [(x, torch.zeros(12))]))["torch.export"]
    assert branches.result == "refused"
    assert "data-dependent" in branches.reason


@pytest.mark.usefixtures("no_onnx")
class TestInputs:
    def test_dictionaries_and_what_is_no_row_a_sample(self):
        class Named(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 3)

            def forward(self, *, x, shift, names):
                return {"scores": self.layer(x) + shift, "names": names}

        net = Named()
        data = [({"x": torch.randn(9, 4), "shift": torch.ones(3), "names": "abc"}, torch.zeros(9))]
        found = by_name(fp.check_deployment(net, data, output="scores"))
        assert found["torch.export"].result == "bit-equal"
        assert found["batch 1 against N"].result in ("bit-equal", "within rounding")

    def test_several_arguments(self):
        net = nn.Bilinear(3, 4, 5)
        found = by_name(fp.check_deployment(net, [((torch.randn(6, 3), torch.randn(6, 4)), torch.zeros(6))]))
        assert found["torch.export"].result == "bit-equal"

    def test_outputs_that_are_no_scores_have_no_decisions(self):
        net = nn.Conv2d(1, 2, 3)
        found = by_name(fp.check_deployment(net, [(images(5), torch.zeros(5))]))
        assert {way.changed for way in found.values()} == {None}
        assert found["torch.export"].result == "bit-equal"

    def test_one_sample_is_none_to_hold_against_another(self):
        found = fp.check_deployment(network(), [(images(1), torch.zeros(1))])
        assert {way.result for way in found.ways} == {"refused"}
        assert {way.reason for way in found.ways} == {"there is one sample alone"}

    def test_packed_words(self):
        net = network().eval()
        found = by_name(fp.check_deployment(fp.pack_(net, fp.SECDED(fp.Float(5, 6))), [(images(), torch.zeros(20))]))
        assert found["torch.export"].result == "bit-equal"


@pytest.mark.usefixtures("no_onnx")
def test_what_is_not_installed_is_said():
    way = by_name(fp.check_deployment(network(), [(images(), torch.zeros(20))]))["onnxruntime"]
    assert (way.result, way.reason) == ("not installed", "pip install onnx onnxscript onnxruntime")


def test_what_takes_too_many_operations_is_refused_before_it_takes_minutes():
    few = ways.Few.of(network(), [(images(), torch.zeros(20))], 4, None, None)
    found = by_name(few.compared(network(), None, operations=4))
    assert found["torch.export"].result == found["onnxruntime"].result == "refused"
    assert "more than 4 operations" in found["torch.export"].reason
    assert by_name(few.compared(network(), None, operations=50))["torch.export"].result == "bit-equal"


def test_half_precision_has_room_of_its_own_spacing():
    way = Way("", "within rounding")
    assert way.difference is None
    known = torch.tensor([[2.0, -4.0]], dtype=torch.float16)
    assert ways._room(known) == 1e3 * 2.0**-10 * 4
    a, b = torch.tensor([1.0, float("nan"), float("inf")]), torch.tensor([1.5, float("nan"), float("inf")])
    assert ways._difference(a, b) == 0.5
    assert ways._difference(a, torch.tensor([1.0, 2.0, float("inf")])) == float("inf")
    assert ways._difference(torch.tensor([float("inf")]), torch.tensor([-float("inf")])) == float("inf")


FOUND = Deployment(
    (
        Way("batch 1 against N", "bit-equal", 0.0, 1e-4, 0, seconds=0.5),
        Way("torch.export", "beyond rounding", 0.25, 1e-4, 1),
        Way("onnxruntime", "refused", reason="no <graph>"),
    ),
    samples=8,
)


def test_as_json_and_as_text():
    assert Deployment.from_json(Fields(FOUND.to_json(), "it")) == FOUND
    assert eval(repr(FOUND), {"Deployment": Deployment, "Way": Way}) == FOUND
    assert str(FOUND).splitlines() == [
        "Without faults, on 8 samples:",
        "  batch 1 against N: bit-equal",
        "  torch.export: beyond rounding, differs by up to 0.25 (room 0.0001); 1 decision change",
        "  onnxruntime: refused: no <graph>",
    ]
    assert list(FOUND.table()["result"]) == ["bit-equal", "beyond rounding", "refused"]
    for name, value in (("result", "fine"), ("changed", -1), ("difference", "0"), ("reason", None), ("more", 1)):
        written = FOUND.to_json()
        written["ways"][0][name] = value
        with pytest.raises(ConfigError, match="ways"):
            Deployment.from_json(Fields(written, "it"))


def test_what_is_not_asked_rightly_is_refused():
    net, x = network(), images()
    with pytest.raises(ConfigError, match="nothing was found out about it yet"):
        fp.check_deployment(net)
    with pytest.raises(ConfigError, match="from 2, got 1"):
        fp.check_deployment(net, [(x, torch.zeros(20))], samples=1)
    with pytest.raises(DataError, match="holds no samples"):
        fp.check_deployment(net, [])
    with pytest.raises(DataError, match="expected a pair"):
        fp.check_deployment(net, [x])


@pytest.mark.usefixtures("no_onnx")
def test_harden_pack_and_protect_end_with_it(tmp_path):
    net, x = network().eval(), images(64)
    with torch.no_grad():
        data = [(x, net(x).argmax(dim=1))]
    safe = fp.harden(net, data, fp.Ranger())
    found = fp.hardening_report(safe).deployment
    assert found.agrees
    assert [way.name for way in found.ways] == ["batch 1 against N", "torch.export", "onnxruntime"]
    assert fp.check_deployment(safe) == found
    assert str(found).splitlines()[2].strip() in str(fp.hardening_report(safe))
    again = fp.load_hardened(net, fp.save_hardened(safe, tmp_path / "safe.safetensors"))
    assert fp.hardening_report(again).deployment == found == fp.check_deployment(again)
    assert fp.hardening_report(fp.harden(net, data, fp.Ranger(), gate=False)).deployment is None
    with pytest.raises(ConfigError, match="nothing was found out"):
        fp.check_deployment(
            fp.harden(fp.pack_(copy.deepcopy(net), fp.Float16(), check=data), data, fp.Ranger(), gate=False)
        )

    packed = fp.pack_(copy.deepcopy(safe), fp.Float16())
    with pytest.raises(ConfigError, match="nothing was found out"):  # it is another model now
        fp.check_deployment(packed)
    packed = fp.pack_(safe, fp.Float16(), check=data)
    assert fp.check_deployment(packed).agrees
    with pytest.raises(ConfigError, match="nothing was found out"):
        fp.check_deployment(fp.unpack_(packed))

    made = fp.protect(net, data, ber=1e-3, trials=3, front=0, rivals={}, hardenings={})
    assert made.deployment.agrees
    assert fp.check_deployment(made.model) == made.deployment
    assert str(made).endswith(str(made.deployment))
    assert [way.name for way in made.deployment.ways][1:] == ["torch.export, decoded", "onnxruntime, decoded"]
    assert made.deployment.ways[1].result == "bit-equal"  # decoded once or at every use: the same values


def test_they_warn_of_answers_that_part(monkeypatch):
    net, x = network().eval(), images(64)
    with torch.no_grad():
        data = [(x, net(x).argmax(dim=1))]
    monkeypatch.setattr(ways.Few, "compared", lambda *_, **__: FOUND)
    with pytest.warns(fp.FlipproofWarning, match="hardened copy answers otherwise where it is deployed"):
        fp.harden(net, data, fp.Ranger())
    with pytest.warns(fp.FlipproofWarning, match="packed model answers otherwise"):
        fp.pack_(net, fp.Float16(), check=data)


def test_pack_refuses_data_that_do_not_fit_before_it_packs():
    net = network()
    with pytest.raises(DataError, match="rejects batch 0"):
        fp.pack_(net, fp.Float16(), check=[(torch.randn(3, 7), torch.zeros(3))])
    assert type(net[0]) is nn.Conv2d


@pytest.mark.usefixtures("no_onnx")
def test_the_fingerprint_of_a_campaign_does_not_see_what_was_found():
    net, x = network().eval(), images(30)
    data = [(x, torch.zeros(30, dtype=torch.int64))]
    setup = {"faults": fp.RandomBits(1), "trials": 2}
    a = fp.assess(fp.pack_(copy.deepcopy(net), fp.Float16(), check=data), data, **setup)
    b = fp.assess(fp.pack_(net, fp.Float16()), data, **setup)
    assert a.header.fingerprint == b.header.fingerprint


def test_the_page_shows_it(tmp_path):
    base = fp.assess(nn.Linear(2, 2), data=[(torch.eye(2), torch.tensor([0, 1]))], faults=fp.RandomBits(1), trials=2)
    page = fp.report(tmp_path / "page.html", base=base, safe=FOUND).read_text(encoding="utf-8")
    assert "safe: where it is deployed" in page
    assert "no &lt;graph&gt;" in page
    with pytest.raises(ConfigError, match="at least one assessment"):
        fp.report(tmp_path / "page.html", safe=FOUND)
