import copy
import re
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import flipproof as fp
from flipproof.errors import ConfigError, DataError, JournalError
from flipproof.hardening.fitting.calibration import Calibration
from flipproof.running.decision import drift
from flipproof.storage.budget import INNERS, Measuring
from flipproof.storage.codes import untouched
from flipproof.storage.protect import _drawn
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
    wrong = [(x, torch.where(torch.arange(len(y)) < 5, y, (y + 1) % 4)) for x, y in other]
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


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(8, 8)
        self.two = nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.three = nn.Linear(8, 8)

    def forward(self, x):
        return self.three(torch.relu(self.two(torch.relu(self.one(x)))))


def test_tied_parameters_stay_and_count():
    net, x = Tied(), torch.randn(80, 8)
    found = fp.protect(net, [(x, net(x).argmax(dim=1))], **SETUP | {"rivals": {}, "memory": 0.5}, hardenings={})
    assert "one.weight" not in found.formats
    assert "tied parameters cannot be packed: one.weight" in found.why
    assert found.certain == 0.0
    now = sum(p.numel() for p in net.parameters()) * 32  # tied ones once
    memory = (found.table["bits"].sum() + 64 * 32) / now - 1
    assert found.evidence["memory"].iloc[1] == pytest.approx(memory)
    assert memory <= 0.5


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
        ({"inners": []}, "one or more formats in a list as inners="),
        ({"inners": fp.Affine(3)}, "one or more formats in a list as inners="),
        ({"rivals": [fp.Float32()]}, "{name: format} as rivals="),
        ({"rivals": {"protected": fp.Float32()}}, "'protected': that names another row"),
        ({"rivals": {"as it came": fp.Float32()}}, "'as it came': that names another row"),
        ({"rivals": {"protect, memory +0 %": fp.Float32()}}, "that names another row"),
        ({"hardenings": {"a": fp.Guard}}, "bounds.* as hardenings="),
        ({"hardenings": [fp.Guard()]}, "bounds.* as hardenings="),
        ({"hardenings": {"none": fp.Guard()}}, "cannot be called 'none'"),
        ({"seed": "x"}, "seed= a whole number from 0"),
        ({"seed": 2**70}, "seed= a whole number from 0"),
        ({"workers": None}, "workers= a whole number from 1"),
        ({"journal": ""}, "path of a folder as journal="),
        ({"line": 8}, "line= a whole number from 64"),
        ({"device": "meta"}, "got 'meta': a meta device holds no values"),
        ({"ber": 0.49}, "are needed, and then some code words are lost: none of 512 bits"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(more, message):
    with pytest.raises(ConfigError, match=message):
        fp.protect(network(), batches(), **SETUP | more)


def test_a_rival_that_cannot_hold_a_weight_is_named():
    rivals = {"too long": fp.SECDED(fp.Affine(bits=8), block=4096)}
    found = fp.protect(network(), batches(), **SETUP | {"rivals": rivals})
    assert "Not compared, since they cannot hold some weight: too long." in found.why


def lazy():
    return nn.Sequential(nn.LazyLinear(4))


def normed():
    return nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(64, 4)))


def old_normed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = nn.Sequential(nn.Flatten(), nn.utils.weight_norm(nn.Linear(64, 4)))
    net(batches()[0][0])
    return net


def infinite():
    net = network()
    with torch.no_grad():
        net.norm.bias[0] = float("inf")
        net.fc.weight[:, :36] = 0
        net.norm.weight[0] = 0
    return net


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lazy, "not initialised yet"),
        (normed, "remove_parametrizations"),
        (old_normed, "cannot be copied"),
        (lambda: torch.compile(network(), backend="eager"), "_orig_mod"),
        (lambda: network().double(), "float64"),
        (infinite, "NaN"),
    ],
)
def test_models_that_cannot_be_packed_are_refused_by_name(make, message):
    data = [(x.double(), y) for x, y in batches()] if message == "float64" else batches()
    with pytest.raises(fp.FlipproofError, match=message):
        fp.protect(make(), data, **SETUP)


def test_labels_of_another_task_leave_nothing_to_keep():
    wrong = [(x, (y + 1) % 4) for x, y in batches()]
    with pytest.raises(DataError, match="nothing to keep"):
        fp.protect(network(), wrong, **SETUP)


@pytest.mark.parametrize("asked", [{"memory": -0.9}, {"memory": -0.85, "ber": 0.03}, {"memory": -0.95, "ber": 1e-3}])
def test_the_memory_that_is_said_to_be_needed_is_enough(asked):
    given = SETUP | {"rivals": {}, "hardenings": {}} | asked
    with pytest.raises(ConfigError, match="are needed") as refused:
        fp.protect(network(), batches(), **given)
    need = float(re.search(r"([+-][\d.]+) % are needed", str(refused.value)).group(1)) / 100
    found = fp.protect(network(), batches(), **given | {"memory": need})
    assert found.evidence.set_index("form").loc["protected", "memory"] <= need + 1e-9


def test_time_is_a_budget_too():
    found = fp.protect(network(), batches(), **SETUP | {"rivals": {}}, hardenings={}, time=1e-3)
    assert found.verdict == "not met"
    assert found.why.startswith("Not met")
    assert "more than the 0.001 asked for" in found.why


def test_samples_are_drawn_and_not_the_first_ones():
    """Data in order of their labels: the front of the first samples would be the front of one class."""
    data = batches(480)
    x, y = torch.cat([b[0] for b in data]), torch.cat([b[1] for b in data])
    order = y[240:].argsort(stable=True) + 240
    setup = SETUP | {"front": 60, "rivals": {}, "memory": -0.75}
    found = fp.protect(network(), [(x[:240], y[:240])], verify=[(x[order], y[order])], hardenings={}, **setup)
    front = found.front.set_index("form").loc["as it came"]
    sample = _drawn(Calibration.read(network(), [(x[order], y[order])], torch.device("cpu")), 60, 0)
    assert sample.batches.targets.unique().numel() == 4
    again = fp.assess(
        network(),
        list(zip(sample.batches.inputs, sample.batches.targets.split(list(sample.batches.sizes)), strict=True)),
        faults=fp.BitErrorRate(LADDER, exact=False),
        trials=5,
        progress=False,
    )
    means = dict(zip(again.summary["ber"], again.summary["accuracy"], strict=True))
    assert means[front["ber"]] == pytest.approx(front["accuracy"])


def test_bounds_are_judged_on_the_data_of_the_choice_and_have_to_fit():
    net = Tied()
    x = torch.randn(240, 8)
    data, setup = [(x, net(x).argmax(dim=1))], SETUP | {"rivals": {}, "ber": 1e-3}
    verify = [(x[:120], (net(x[:120]).argmax(dim=1) + (torch.arange(120) % 3 == 0)) % 8)]
    roomy = fp.protect(net, data, verify=verify, memory=2.0, hardenings={"guard": fp.Guard()}, **setup)
    again = fp.protect(net, data, memory=2.0, hardenings={"guard": fp.Guard()}, verify=data, **setup)
    assert roomy.hardening == again.hardening == "guard"
    tight = fp.protect(net, data, memory=0.0, hardenings={"guard": fp.Guard()}, **setup | {"inners": [fp.Float32()]})
    assert tight.hardening in ("none", "guard")
    rows = roomy.evidence.set_index("form")
    added = sum(p.numel() * 32 for n, p in roomy.hardened.named_parameters() if n not in dict(net.named_parameters()))
    now = sum(p.numel() for p in net.parameters()) * 32
    assert rows.loc["protected, guard", "memory"] - rows.loc["protected", "memory"] == pytest.approx(added / now)


def test_a_model_is_a_module():
    with pytest.raises(fp.FlipproofError, match=r"torch\.nn\.Module, got int"):
        fp.protect(3, batches(), **SETUP)


def test_a_file_is_no_folder_for_journals(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="a folder"):
        fp.protect(network(), batches(), journal=tmp_path / "file", **SETUP)


def test_numbers_of_numpy_are_numbers(safe):
    given = {name: np.int64(value) if type(value) is int else value for name, value in SETUP.items()}
    given["ber"] = np.float64(SETUP["ber"])
    found = fp.protect(network(), batches(), **given, seed=np.int64(0))
    assert found.formats == safe.formats
    assert found.verdict == safe.verdict


def test_a_number_of_single_precision_is_that_number():
    found = fp.protect(network(), batches(), **SETUP | {"ber": np.float32(0.015625), "rivals": {}})
    assert found.ber == 1 / 64


def test_rivals_are_charged_their_constants_as_we_are(safe):
    net = network()
    weights = [p for p in net.parameters() if p.dim() > 1]
    ours = safe.table.set_index("name")["bits"]
    rest = sum(int(ours[name]) for name, p in net.named_parameters() if p.dim() < 2)
    now = 32 * sum(p.numel() for p in net.parameters())
    expected = sum(8 * w.numel() + 32 * 2 for w in weights) + rest  # a scale and a zero point a tensor
    assert safe.evidence.set_index("form").loc["8 bits", "memory"] == pytest.approx(expected / now - 1)


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
    found = survival(mean, least, trials=3, best=100.0, ladder=LONG)  # no trial is that bad: none ends early
    enough = [rate for rate in LONG if 1 / (1 + rate * 1e4) >= least]
    if found.ber:
        assert found.accuracy >= least
    assert found.ber == max(enough, default=0.0)
    assert not found.next >= least
    assert np.isnan(found.accuracy) if not found.ber else found.accuracy >= least


def test_a_rate_that_only_few_trials_call_enough_is_not_the_answer():
    def lucky(index, trials):
        return 1 / (1 + LONG[index] * 10 ** (2 if trials < 10 else 4))

    found = survival(lucky, 0.9, trials=10, ladder=LONG)
    assert found.ber == 1e-5
    assert found.accuracy == lucky(LONG.index(1e-5), 10) >= 0.9 > found.next


class Drawn:
    """Trials whose accuracies were drawn, the same ones each time."""

    def __init__(self, rates, trials, seed):
        generator = np.random.default_rng(seed)
        falls = np.linspace(1.0, 0.4, rates)[:, None]
        self.table = np.where(generator.random((rates, trials)) < 0.15, 0.1, falls - 0.1 * generator.random((rates, 1)))
        self.asked = set()

    def __call__(self, index, trials):
        self.asked |= {(index, trial) for trial in range(trials)}
        return self.table[index, :trials].mean()


@pytest.mark.parametrize("seed", range(40))
def test_trials_that_are_left_out_could_not_have_changed_the_answer(seed):
    short, long = Drawn(12, 8, seed), Drawn(12, 8, seed)
    found = survival(short, 0.7, trials=8, best=1.0, ladder=LONG)
    assert found[:2] == pytest.approx(survival(long, 0.7, trials=8, best=100.0, ladder=LONG)[:2], nan_ok=True)
    assert short.asked <= long.asked
    if found.ber:
        assert long.table[LONG.index(found.ber)].mean() >= 0.7


def test_a_rate_that_is_clearly_out_costs_few_trials():
    mean = Curve()
    assert survival(mean, 0.9, trials=10, ladder=LONG).ber == 1e-5
    asked = [count for index, count in mean.asked if LONG[index] == 1e-4]  # 0.5 there, where 0.9 is asked for
    assert max(asked) == 3  # (3 · 0.5 + 7) / 10 < 0.9
    assert all(count == 1 for index, count in mean.asked if LONG[index] > 1e-4)


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


def test_a_folder_is_used_again_for_other_bounds_and_other_memory(tmp_path):
    net = Tied()
    x = torch.randn(240, 8)
    data = [(x, net(x).argmax(dim=1))]
    setup = SETUP | {"rivals": {}, "ber": 1e-3, "journal": tmp_path}
    for change in (
        {"memory": 2.0, "hardenings": {"guard": fp.Guard()}},
        {"memory": 2.0, "hardenings": {"guard": fp.Ranger()}},
        {"memory": 1.0, "hardenings": {"guard": fp.Guard()}},
        {"memory": 2.0, "line": 64, "hardenings": {"guard": fp.Guard()}},
    ):
        fresh = fp.protect(net, data, **setup | change | {"journal": None})
        assert fp.protect(net, data, **setup | change).why == fresh.why


def test_the_verdict_says_what_is_certain_and_what_is_outside(safe):
    assert "so often" not in safe.why
    assert "the chance that no code word has more faults than its code corrects, × the accuracy" in safe.why
    alone = fp.protect(network(), batches(), **SETUP | {"rivals": {}}, where=fp.Parameters(kinds=("weight",)))
    assert "buffers, and what where= leaves out" in alone.why
    assert "conv.bias" in alone.why


def test_what_no_format_of_the_choice_can_hold_is_said():
    with pytest.raises(ConfigError, match="none of inners= can hold"):
        fp.protect(network(), batches(), **SETUP | {"rivals": {}, "inners": [fp.RangeChecked(fp.Float16())]})


def test_a_rate_at_which_no_code_is_enough_says_how_much_the_strongest_need():
    given = SETUP | {"rivals": {}, "hardenings": {}, "ber": 0.1, "memory": -0.7}
    with pytest.raises(ConfigError, match=r"\+?-?[\d.]+ % are needed, and then some code words are lost") as refused:
        fp.protect(network(), batches(), **given)
    need = float(re.search(r"([+-][\d.]+) % are needed", str(refused.value)).group(1)) / 100
    fp.protect(network(), batches(), **given | {"memory": need})
    with pytest.raises(ConfigError, match="are needed"):
        fp.protect(network(), batches(), **given | {"memory": need - 0.01})


def test_infinite_constants_keep_their_bits():
    """A mask of −∞, as exported graphs hold it, is coded as it is."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fc, self.mask = nn.Linear(8, 4), nn.Parameter(torch.tensor([0.0, 0.0, 0.0, float("-inf")]))

        def forward(self, x):
            return torch.softmax(self.fc(x) + self.mask, dim=1)

    net = Masked().eval()
    x = torch.randn(200, 8)
    data = [(x, net(x).argmax(dim=1))]
    asked = {"ber": 1e-2, "memory": 1.0, "trials": 3, "front": 0, "rivals": {}, "decision": "probabilities"}
    safe = fp.protect(net, data, **asked)
    assert safe.verdict == "met"
    assert torch.equal(safe.model.mask, net.mask)
    assert isinstance(safe.formats["mask"], fp.BCH)
