from __future__ import annotations

import importlib.resources

import flipproof as fp


def test_public_names_are_exactly_these():
    assert sorted(fp.__all__) == [
        "AVC",
        "Affine",
        "Assessment",
        "BCH",
        "BFloat16",
        "BitClipped",
        "BitErrorRate",
        "BitPosition",
        "BitTable",
        "BlockFloat",
        "CEP",
        "Cache",
        "Classification",
        "Custom",
        "DeepVigor",
        "Deployment",
        "Detection",
        "Embedding",
        "Exploration",
        "FTClipAct",
        "FaultSpace",
        "Fence",
        "FitAct",
        "FixedPoint",
        "FlipproofError",
        "FlipproofWarning",
        "Float",
        "Float16",
        "Float32",
        "Float8E4M3",
        "Float8E5M2",
        "Generation",
        "Guard",
        "HardeningReport",
        "InPlaceECC",
        "Integer",
        "LSBParity",
        "MSET",
        "MX",
        "Metric",
        "MultiLabel",
        "Neurons",
        "OnnxModel",
        "Parameters",
        "Parity",
        "ProAct",
        "Propagation",
        "Protection",
        "RandomBits",
        "RangeChecked",
        "Ranger",
        "RateEstimate",
        "Regression",
        "Rounded",
        "SECDED",
        "Segmentation",
        "Selection",
        "SignVote",
        "StuckAt",
        "Symmetric",
        "Task",
        "Tokens",
        "TripleMSB",
        "VulnerabilityMap",
        "analyze",
        "assess",
        "bit_criticality",
        "bit_profile",
        "check_deployment",
        "choose_clipping",
        "compare",
        "damaged_words",
        "estimate_factors",
        "estimate_rates",
        "explore",
        "explore_mixed",
        "harden",
        "hardening_report",
        "inject_all",
        "load_coded",
        "load_hardened",
        "load_packed",
        "measure_protection",
        "merge",
        "overhead",
        "p_drop",
        "pack_",
        "packed_bytes",
        "propagation",
        "protect",
        "rap",
        "report",
        "sample_size",
        "save_coded",
        "save_hardened",
        "save_packed",
        "scrub_",
        "select_bits",
        "unpack_",
    ]


def test_every_public_name_exists_and_is_explained():
    for name in fp.__all__:
        assert getattr(fp, name).__doc__, name


def test_errors_are_caught_by_their_root_and_bad_arguments_also_as_value_errors():
    from flipproof import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    raised = [kind for kind in kinds if not issubclass(kind, Warning)]
    assert len(raised) == 13
    assert all(issubclass(kind, fp.FlipproofError) for kind in raised)
    assert issubclass(errors.DataError, ValueError)
    assert issubclass(errors.MetricError, ValueError)
    assert issubclass(errors.JournalMismatch, errors.JournalError)


def test_types_are_shipped():
    assert importlib.resources.files("flipproof").joinpath("py.typed").is_file()
