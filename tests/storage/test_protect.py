import copy

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import flipproof as fp
from flipproof.errors import ConfigError, JournalError
from flipproof.hardening.fitting.calibration import Calibration
from flipproof.storage.budget import INNERS, Measuring, drift
from flipproof.storage.codes import untouched
from flipproof.storage.survival import LADDER, survival

RIVALS = {"8 bits": fp.Affine(bits=8), "SECDED": fp.SECDED(fp.Float32(), block=64)}
SETUP = {"ber": 1e-2, "trials": 5, "front": 0, "rivals": RIVALS, "images": 60, "progress": False}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 12, 3)
        self.norm = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12 * 36, 4)

    def forward(self, x):
        return self.fc(torch.relu(self.norm(self.conv(x))).flatten(1))


def network():
    torch.manual_seed(0)
    return Net().eval()


def batches(count=240, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 8, 8, generator=generator)
    with torch.no_grad():
        y = network()(x).argmax(dim=1)
    return [(x[i : i + 60], y[i : i + 60]) for i in range(0, count, 60)]


@pytest.fixture(scope="module")
def safe():
    with torch.random.fork_rng(devices=[]):
        return fp.protect(network(), batches(), **SETUP)


def test_it_survives_in_the_memory_it_had_where_nothing_else_does(safe):
    rows = safe.evidence.set_index("form")
    assert safe.verdict == "met"
    assert rows.loc["as it came", "accuracy"] < 0.6
    assert rows.loc["protected", "accuracy"] >= safe.least
    assert rows.loc["protected", "memory"] <= 0
    assert set(rows.index) == {"as it came", "protected", "8 bits", "SECDED"}
    assert "Met: at a bit error rate of 0.01" in safe.why
    assert "running_mean" in safe.why  # what faults cannot hit is said


def test_memory_is_that_of_the_packed_bytes_and_of_charged_constants(safe):
    layers = [m for m in safe.model.modules() if isinstance(m, nn.utils.parametrize.ParametrizationList)]
    stored = sum(8 * layer.original0.numel() for layer in layers)
    constants = sum(
        32 * buffer.shape[-1] if buffer.dim() > 1 else 32
        for layer in layers
        for name, buffer in layer.named_buffers()
        if name != "original0"
    )
    now = 32 * sum(p.numel() for p in network().parameters())
    claimed = (1 + safe.evidence.set_index("form").loc["protected", "memory"]) * now
    assert stored <= claimed  # the constants are charged with their code
    assert stored + constants <= claimed + 8 * len(layers)  # bytes are rounded up
    assert claimed <= now


def test_the_packed_model_answers_as_the_campaign_says(safe):
    rows = safe.evidence.set_index("form")
    verifying = safe.assessments["protected"]
    assert verifying.golden["accuracy"] == rows.loc["protected", "clean"]
    with torch.no_grad():
        x = batches()[0][0]
        simulated = network()
        space = fp.FaultSpace(simulated, format=safe.formats)
        with space.stored():
            assert torch.equal(simulated(x), safe.model(x))


def test_certain_is_a_product_of_binomials_and_no_trial_is_below_it(safe):
    net = network()
    whole = np.prod([untouched(f, tuple(net.get_parameter(n).shape), 1e-2) for n, f in safe.formats.items()])
    clean = safe.evidence.set_index("form").loc["protected", "clean"]
    assert safe.certain == pytest.approx(whole * clean)
    trials = safe.assessments["protected"].trials
    intact = trials[(trials["detected"] == 0) & (trials["miscorrected"] == 0)]
    assert (intact["accuracy"] == clean).all()
    assert (intact["masked"] == intact["samples"]).all()


def test_nothing_is_chosen_on_what_it_is_verified_on():
    """Other labels to verify on change the verdict, and nothing that was chosen."""
    data, other = batches(), batches(seed=2)
    wrong = [(x, (y + 1) % 4) for x, y in other]
    one = fp.protect(network(), data, verify=other, **SETUP | {"rivals": {}})
    two = fp.protect(network(), data, verify=wrong, accuracy=0.5, **SETUP | {"rivals": {}}, hardenings={})
    assert one.formats == two.formats
    assert (one.verdict, two.verdict) == ("met", "not met")


def test_workers_and_a_second_run_give_the_same(safe, tmp_path):
    folder = tmp_path / "runs"
    first = fp.protect(network(), batches(), journal=folder, workers=2, **SETUP)
    written = {path: path.read_bytes() for path in folder.glob("*.jsonl")}
    again = fp.protect(network(), batches(), journal=folder, **SETUP)
    assert {path: path.read_bytes() for path in folder.glob("*.jsonl")} == written
    for one in (first, again):
        assert one.formats == safe.formats
        assert one.why == safe.why
        pd.testing.assert_frame_equal(one.evidence.drop(columns="time"), safe.evidence.drop(columns="time"))
    other = network()
    with torch.no_grad():
        other.fc.weight.mul_(1.5)
    with pytest.raises(JournalError):
        fp.protect(other, batches(), journal=folder, **SETUP)


def test_the_model_is_given_back_untouched():
    net = network().train()
    net.fc.bias.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    fp.protect(net, batches(), **SETUP | {"rivals": {}})
    assert net.training
    assert not net.fc.bias.requires_grad
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not any(isinstance(m, nn.utils.parametrize.ParametrizationList) for m in net.modules())


def test_the_front_is_what_injection_finds():
    data = batches()
    rivals = {"8 bits": fp.Affine(8), "FORTUNE P-4": fp.TripleMSB(fp.Affine(bits=4, axis=0))}
    found = fp.protect(network(), data[:2], verify=data[2:], **SETUP | {"front": 60, "rivals": rivals})
    front = found.front.set_index("form")
    assert front.loc["protect, memory +0 %", "ber"] >= 1e-2 > 10 * front.loc["as it came", "ber"]
    ours = front[front["ours"]]
    assert ours["memory"].is_monotonic_increasing
    assert (ours["ber"] > 0).all()  # no form of ours loses by rounding alone what it is asked to keep
    # a rival of less memory than any budget is met by a form that takes no more
    assert ours["memory"].min() <= front.loc["FORTUNE P-4", "memory"] < -0.75
    assert (ours["ber"] < ours["limit"]).all()
    assert (front["accuracy"].dropna() >= found.least).all()
    assert set(front["ber"]) <= {0.0, *LADDER}


def test_tied_parameters_are_left_out_by_name():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(8, 8)
            self.two = nn.Linear(8, 8)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(torch.relu(self.one(x)))

    torch.manual_seed(0)
    net, x = Tied(), torch.randn(80, 8)
    found = fp.protect(net, [(x, net(x).argmax(dim=1))], **SETUP | {"rivals": {}}, hardenings={})
    assert "one.weight" not in found.formats
    assert "tied parameters cannot be packed: one.weight" in found.why
    assert found.certain == 0.0


def test_saved_words_come_back(safe, tmp_path):
    folder = safe.save(tmp_path / "safe")
    again = fp.load_packed(network(), folder / "words.safetensors")
    x = batches()[0][0]
    assert torch.equal(again(x), safe.model(x))
    assert (folder / "verdict.txt").read_text().startswith("Met: ")
    assert len(pd.read_csv(folder / "evidence.csv")) == len(safe.evidence)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"memory": -0.99}, r"nothing that survives ber=0.01 fits memory=-0.99 .*are needed"),
        ({"ber": 0.0}, "ber= a number between 0 and 0.5"),
        ({"ber": "1e-3"}, "ber= a number"),
        ({"memory": -1.0}, "memory= a number"),
        ({"trials": 0}, "trials= a whole number from 1"),
        ({"front": -1}, "front= a whole number from 0"),
        ({"accuracy": 1.5}, "accuracy= a number"),
        ({"rivals": {"a": 3}}, "formats as rivals=.*got 3"),
        ({"inners": [fp.Affine]}, "formats as inners="),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(more, message):
    with pytest.raises(ConfigError, match=message):
        fp.protect(network(), batches(), **SETUP | more)


def test_a_rival_that_cannot_hold_a_weight_is_named():
    rivals = {"too long": fp.SECDED(fp.Affine(bits=8), block=4096)}
    found = fp.protect(network(), batches(), **SETUP | {"rivals": rivals})
    assert "Not compared, since they cannot hold some weight: too long." in found.why


def test_a_model_is_a_module():
    with pytest.raises(fp.FlipproofError, match=r"torch\.nn\.Module, got int"):
        fp.protect(3, batches(), **SETUP)


def test_a_file_is_no_folder_for_journals(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="a folder"):
        fp.protect(network(), batches(), journal=tmp_path / "file", **SETUP)


def test_packed_models_are_refused(safe):
    with pytest.raises(ConfigError, match="packed already"):
        fp.protect(safe.model, batches(), **SETUP)


LONG = tuple(10.0**-power for power in range(12, 0, -1))


class Curve:
    """Accuracy that is a known function of the rate; one trial alone sees it so many decades off."""

    def __init__(self, off=0.0):
        self.off, self.asked = off, []

    def __call__(self, index, trials):
        self.asked.append((index, trials))
        return 1 / (1 + LONG[index] * 10 ** (4 + (self.off if trials == 1 else 0)))


@pytest.mark.parametrize("off", [-9, -3, -1, 0, 1, 2, 8])
@pytest.mark.parametrize("least", [0.2, 0.5, 0.9, 1.1, 0.0])
def test_the_search_ends_at_the_last_rate_that_is_enough_wherever_one_trial_points_to(least, off):
    mean = Curve(off)
    found = survival(mean, least, trials=3, ladder=LONG)
    # what one trial says is clearly out is not asked again, of the rates that it was asked of
    out = {index for index, trials in mean.asked if trials == 1 and Curve(off)(index, 1) < least - 0.1}
    enough = [rate for index, rate in enumerate(LONG) if 1 / (1 + rate * 1e4) >= least]
    first_out = min((LONG[index] for index in out), default=1.0)
    assert found.ber == max((rate for rate in enough if rate < first_out), default=0.0)
    assert not found.next >= least
    assert np.isnan(found.accuracy) if not found.ber else found.accuracy >= least
    assert len(mean.asked) == len(set(mean.asked)) <= 12


def test_a_rate_at_which_one_trial_is_clearly_out_is_not_tried_again():
    mean = Curve()
    assert survival(mean, 0.9, trials=3, ladder=LONG).ber == 1e-5
    assert [index for index, trials in mean.asked if trials == 3] == [LONG.index(1e-5)]


def test_drift_is_the_relative_entropy():
    torch.manual_seed(0)
    golden, other = torch.randn(5, 7), torch.randn(5, 7)
    p, q = torch.softmax(golden.double(), 1), torch.softmax(other.double(), 1)
    assert drift(other, golden) == pytest.approx(float((p * (p / q).log()).sum(1).mean()))


class Counting(Net):
    """Its answers depend on how often it was asked."""

    def __init__(self):
        super().__init__()
        self.register_buffer("asked", torch.zeros(()))

    def forward(self, x):
        self.asked += 1
        return super().forward(x) * (1 + self.asked)


class Forgetful(Net):
    """Traced, it loses what a weight decides: a branch on a plain number that is read once."""

    def forward(self, x):
        hidden = torch.relu(self.norm(self.conv(x))).flatten(1)
        with torch.no_grad():
            share = float((self.fc.weight == 0).float().mean())
        return self.fc(hidden) * (1 + 10 * share)


def measured(model, shortcut=True):
    part = Calibration.read(model.eval(), batches(), torch.device("cpu"))
    names = [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
    measuring = Measuring(model, names, INNERS[:2], part, 0)
    used = measuring._suffixes is not None
    if not shortcut:
        measuring._suffixes = None
    return used, measuring, {(t, k): measuring(t, k).drift for t in range(len(names)) for k in (1, -1, 0)}


def test_what_a_tensor_costs_is_the_same_with_and_without_kept_values():
    used, _, kept = measured(network())
    assert used
    assert kept == measured(network(), shortcut=False)[2]
    assert min(kept.values()) > 0


def test_what_a_tensor_costs_does_not_depend_on_what_was_measured_before():
    model = Counting().eval()
    before = copy.deepcopy(model.state_dict())
    used, measuring, costs = measured(model)
    assert not used
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {key: measuring(*key).drift for key in reversed(costs)} == costs


def test_a_model_that_loses_something_when_it_is_cut_is_measured_as_a_whole():
    model = Forgetful().eval()
    used, _, costs = measured(copy.deepcopy(model))
    assert not used
    assert costs == measured(model, shortcut=False)[2]
