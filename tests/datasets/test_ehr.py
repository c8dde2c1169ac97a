import gzip
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

import flipproof as fp
from flipproof.datasets.ehr import mimic3, physionet2012, synthetic_ehr
from flipproof.datasets.timelines import CHANNELS, FEATURES, FIRSTS, INDEX, Problems, read_value, timeline
from flipproof.errors import DataError
from flipproof.models import stage_72
from flipproof.models.training import risk_loss, train_classifier

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "physionet2012"
HEADER = ["Hours", *(channel.name for channel in CHANNELS)]


def test_the_layout_is_76_features_and_17_intervals():
    assert len(CHANNELS) == 17
    assert sum(1 for channel in CHANNELS if not channel.categories) == 12
    assert sum(len(channel.categories) for channel in CHANNELS) == 47
    assert FEATURES == 76
    assert all(len(set(channel.categories)) == len(channel.categories) for channel in CHANNELS)
    assert timeline(np.array([0.0]), np.array([0]), np.array([1.0]), 3).shape == (3, 93)


def twin(events, length):
    """Hour by hour in plain Python."""
    rows = []
    last = [(None, channel.normal) for channel in CHANNELS]
    for hour in range(length):
        mask = [0.0] * 17
        for _, channel, value in sorted((e for e in events if int(e[0]) == hour), key=lambda e: e[0]):
            last[channel] = (hour, value)
            mask[channel] = 1.0
        row = []
        for channel, (_, value) in zip(CHANNELS, last, strict=True):
            row += [float(k == int(value)) for k in range(len(channel.categories))] if channel.categories else [value]
        rows.append(row + mask + [(hour - h if h is not None else hour + 1) / 24 for h, _ in last])
    return np.array(rows, np.float32)


def test_timelines_equal_an_hour_by_hour_twin():
    random = np.random.default_rng(0)
    for _ in range(20):
        count = int(random.integers(1, 60))
        channels = random.integers(0, 17, count)
        values = [
            float(random.integers(0, len(CHANNELS[c].categories))) if CHANNELS[c].categories else float(random.normal())
            for c in channels
        ]
        hours = random.uniform(0, 14, count)
        events = list(zip(hours.tolist(), channels.tolist(), values, strict=True))
        assert np.array_equal(timeline(hours, channels, np.array(values), 12), twin(events, 12))


def write_benchmark(folder, *, stays=6, hours=30, seed=0):
    """A folder of the benchmark's exact format, without a byte of anybody's data."""
    random = np.random.default_rng(seed)
    for part in ("train", "test"):
        (folder / part).mkdir(parents=True)
    lists = {"train": [], "val": [], "test": []}
    for number in range(3 * stays):
        which = ("train", "val", "test")[number // stays]
        name = f"{1000 + number}_episode{1 + number % 3}_timeseries.csv"
        lines = [",".join(HEADER)]
        for hour in range(hours):
            row = [f"{hour + 0.25}"]
            for channel in CHANNELS:
                if random.random() > 0.4:
                    row.append("")
                elif channel.categories:
                    row.append(channel.categories[int(random.integers(len(channel.categories)))])
                else:
                    row.append(f"{channel.normal * random.uniform(0.98, 1.0):.3f}")
            lines.append(",".join(row))
        (folder / ("test" if which == "test" else "train") / name).write_text("\n".join(lines) + "\n")
        lists[which] += [f"{name},{float(t)},{int(random.random() < 0.3)}" for t in range(5, hours + 1)]
    for which, rows in lists.items():
        (folder / f"{which}_listfile.csv").write_text("\n".join(["stay,period_length,y_true", *rows]) + "\n")


def test_mimic_folder_is_read_whole(tmp_path):
    write_benchmark(tmp_path)
    data = mimic3(tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (6, 6, 6)
    assert data.problems.table().empty
    values = np.concatenate([stay.x for stay in data.train.stays])
    heart = values[:, FIRSTS[INDEX["Heart Rate"]]]
    assert abs(heart.mean()) < 1e-4
    assert heart.std() == pytest.approx(1, abs=1e-3)
    (inputs, targets), *rest = data.test.batches(4)
    assert inputs["x"].shape == (4, 30, 93)
    assert inputs["at"].sum() == 4 * 26 == len(targets)
    assert not bool(inputs["at"][:, :4].any())
    assert len(rest) == 1
    listed = [line.split(",") for line in (tmp_path / "test_listfile.csv").read_text().split()[1:]]
    assert int(data.test.labels.sum()) == sum(int(y) for _, _, y in listed)
    name = data.test.stays[0].name
    first = next(float(y) for stay, t, y in listed if stay == name and t == "5.0")
    assert data.test.stays[0].labels[4] == first
    with torch.no_grad():
        assert stage_72().eval()(**inputs).shape == targets.shape


def test_long_stays_are_cut(tmp_path):
    write_benchmark(tmp_path)
    data = mimic3(tmp_path, longest=10)
    assert {len(stay.x) for stay in data.train.stays} == {10}


def test_whatever_is_wrong_is_counted_named_and_left_out(tmp_path):
    write_benchmark(tmp_path)
    good = mimic3(tmp_path)
    bad = tmp_path / "train" / "1000_episode1_timeseries.csv"
    lines = bad.read_text().split("\n")
    blank = [""] * 17
    lines[3:3] = [
        ",".join(["-2.5", *blank[:8], "70", *blank[9:]]),
        ",".join(["oops", *blank]),
        ",".join(["2.9", *blank, "extra"]),
        ",".join(["2.9", *blank[:14], "98.6", *blank[15:]]),  # Fahrenheit
        ",".join(["2.9", *blank[:8], "fast", *blank[9:]]),
        ",".join(["2.9", *blank[:3], "6 Dancing", *blank[4:]]),
    ]
    bad.write_text("\n".join(lines))
    other = tmp_path / "train" / "1001_episode2_timeseries.csv"
    other.write_text(other.read_text().replace("Heart Rate", "Pulse", 1))
    with (tmp_path / "train_listfile.csv").open("a") as file:
        file.write("gone_episode1_timeseries.csv,5.0,0\nrubbish\nx,4.0,1\nx,6.0,2\n../x,6.0,1\n")
    data = mimic3(tmp_path)
    counts = data.problems.counts
    assert counts["hours below 0, before admission"] == 1
    assert counts["Hours is no number"] == 1
    assert counts["row with another number of fields than the header"] == 1
    assert counts["Temperature outside 14.2 to 47: another unit, or no measurement"] == 1
    assert counts["Heart Rate is no number"] == 1
    assert counts["Glascow coma scale eye opening: unknown category '6 Dancing'"] == 1
    assert counts["missing column Heart Rate"] == counts["unknown column 'Pulse'"] == 1
    assert counts["stay without a file"] == counts["listfile: malformed row"] == 1
    assert counts["listfile: period that is no whole number of hours above 4"] == 1
    assert counts["listfile: label other than 0 and 1"] == counts["listfile: a stay that is no plain file name"] == 1
    assert sum(counts.values()) == 13
    assert (
        "1000_episode1_timeseries.csv:4"
        in data.problems.table().set_index("problem").loc["hours below 0, before admission", "examples"]
    )
    masks = slice(FIRSTS[-1], FEATURES)
    assert np.array_equal(data.train.stays[0].x[:, masks], good.train.stays[0].x[:, masks])
    assert not data.train.stays[1].x[:, FIRSTS[-1] + INDEX["Heart Rate"]].any()


def test_missing_files_say_what_was_expected(tmp_path):
    with pytest.raises(DataError, match="decompensation"):
        mimic3(tmp_path)
    with pytest.raises(DataError, match=r"physionet\.org"):
        physionet2012(tmp_path)
    (tmp_path / "Outcomes-a.txt").write_text("RecordID,In-hospital_death\n1,0\n")
    with pytest.raises(DataError, match="neither set-a"):
        physionet2012(tmp_path)
    write_benchmark(tmp_path / "m")
    (tmp_path / "m" / "val_listfile.csv").write_text("stay,period_length,y_true\n")
    with pytest.raises(DataError, match="no labelled stay is left for validation"):
        mimic3(tmp_path / "m")


def test_a_record_that_claims_any_size_is_refused(tmp_path):
    (tmp_path / "Outcomes-a.txt").write_text("RecordID,In-hospital_death\n1,0\n")
    claim = tarfile.TarInfo("set-a/1.txt")
    claim.type = tarfile.GNUTYPE_SPARSE  # a file of holes: it takes no bytes in the archive
    header = bytearray(claim.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"%011o\0" % 2**32
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "set-a.tar.gz").write_bytes(gzip.compress(bytes(header) + bytes(1024)))
    with pytest.raises(DataError, match="says it has 4,294,967,296 bytes"):
        physionet2012(tmp_path)
    (tmp_path / "set-a.tar.gz").write_bytes(b"no archive")
    with pytest.raises(DataError, match="cannot read "):
        physionet2012(tmp_path)


def test_categories_are_read_as_text_and_as_numbers():
    problems = Problems()
    total = CHANNELS[INDEX["Glascow coma scale total"]]
    assert read_value(total, "15", "", problems) == read_value(total, "15.0", "", problems) == 4
    assert read_value(CHANNELS[0], "1", "", problems) == 1
    assert read_value(total, "16", "a:1", problems) is None
    assert problems.counts["Glascow coma scale total: unknown category '16'"] == 1


RECORD = """Time,Parameter,Value
00:00,RecordID,{0}
00:00,Height,-1
00:00,Weight,70
00:30,HR,80
00:40,HR,90
03:10,Temp,37.0
03:10,Temp,3.7
nonsense
05:00,Sausage,3
47:59,GCS,7
"""


def test_physionet_records_in_a_folder(tmp_path):
    for letter in "ab":
        (tmp_path / f"set-{letter}").mkdir()
        numbers = [f"{letter}{i}" for i in range(6)]
        for number in numbers:
            (tmp_path / f"set-{letter}" / f"{number}.txt").write_text(RECORD.format(number))
        rows = "".join(f"{number},{i % 2}\n" for i, number in enumerate(numbers[:-1]))
        (tmp_path / f"Outcomes-{letter}.txt").write_text(f"RecordID,In-hospital_death\n{rows}a9,x\n")
    data = physionet2012(tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (4, 1, 5)
    assert data.test.labels.tolist() == [0, 1, 0, 1, 0]
    counts = data.problems.counts
    assert counts["record without an outcome"] == counts["outcome other than 0 and 1"] == 2
    assert counts["malformed row"] == counts["unknown parameter 'Sausage'"] == 10
    assert counts["Temperature outside 14.2 to 47: another unit, or no measurement"] == 10
    stay = data.test.stays[0]
    assert np.isnan(stay.labels[:-1]).all()
    assert stay.x[47, FIRSTS[INDEX["Glascow coma scale total"]] :][:13].tolist() == [float(i == 9) for i in range(13)]
    assert stay.x[0, FIRSTS[-1] + INDEX["Height"]] == 0
    assert data.mean[3] == 90.0  # the hour's last heart rate


@pytest.mark.skipif(not REAL.exists(), reason="needs the PhysioNet 2012 records beside the repository")
def test_the_real_records():
    data = physionet2012(REAL, stays=150)
    assert (len(data.train), len(data.validation), len(data.test)) == (120, 30, 150)
    outcomes = dict(line.split(",")[::5] for line in (REAL / "Outcomes-b.txt").read_text().split()[1:])
    assert data.test.labels.tolist() == [int(outcomes[stay.name]) for stay in data.test.stays]
    assert data.mean[3] == pytest.approx(87, abs=8)  # heart rate
    assert set(data.problems.counts) <= {
        *(f"{c.name} outside {c.low:g} to {c.high:g}: another unit, or no measurement" for c in CHANNELS),
        "record without a measurement",
    }


def test_made_up_stays_repeat_and_can_be_learned():
    data, again = synthetic_ehr(300, hours=16, seed=3), synthetic_ehr(300, hours=16, seed=3)
    assert all(np.array_equal(a.x, b.x) for a, b in zip(data.train.stays, again.train.stays, strict=True))
    assert torch.equal(data.test.labels, again.test.labels)
    torch.manual_seed(0)
    net = train_classifier(stage_72(), data.train.batches(32, shuffle=True), epochs=6, lr=5e-3, loss=risk_loss)
    test = data.test.batches(32)
    with torch.no_grad():
        risk = torch.cat([net(**inputs) for inputs, _ in test])
    truth = torch.cat([targets for _, targets in test])
    area = float(binary_auroc(risk, truth))
    assert area > 0.75
    found = fp.assess(net, data=test, faults=fp.BitErrorRate(1e-3), trials=2, metrics=("accuracy", "auroc"))
    assert found.golden["auroc"] == pytest.approx(area)
    with pytest.raises(DataError, match="at least 10 stays"):
        synthetic_ehr(3)


def test_batches_pad_at_the_end_and_keep_every_label():
    data = synthetic_ehr(40, hours=20)
    for shuffle in (False, True):
        batches = data.train.batches(7, shuffle=shuffle)
        assert sum(len(targets) for _, targets in batches) == len(data.train.labels)
        assert sum(int(targets.sum()) for _, targets in batches) == int(data.train.labels.sum())
        for inputs, _ in batches:
            assert not bool((inputs["mask"][:, 1:] > inputs["mask"][:, :-1]).any())
            assert not bool((inputs["at"] & (inputs["mask"] == 0)).any())
            assert not bool(inputs["x"][inputs["mask"] == 0].any())
