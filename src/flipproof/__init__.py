"""flipproof: how a neural network behaves when its memory loses bits, and how to make it survive."""

from flipproof.analysis import (
    DeepVigor,
    Propagation,
    VulnerabilityMap,
    analyze,
    bit_criticality,
    bit_profile,
    clip_bits,
    clip_tensors,
    propagation,
    select,
)
from flipproof.campaigns import Assessment, assess, sample_size
from flipproof.errors import FlipproofError, FlipproofWarning
from flipproof.faults import BitErrorRate, BitPosition, FaultSpace, Parameters, RandomBits, StuckAt
from flipproof.faults.neurons import Neurons
from flipproof.formats import Affine, BFloat16, BitClipped, FixedPoint, Float8E4M3, Float8E5M2, Float16, Float32
from flipproof.hardening import (
    AVC,
    FitAct,
    FTClipAct,
    Guard,
    HardeningReport,
    ProAct,
    Ranger,
    harden,
    hardening_report,
    load_hardened,
    overhead,
    save_hardened,
    scrub_,
)
from flipproof.reports import compare, report

__version__ = "0.1.0"

__all__ = [
    "AVC",
    "Affine",
    "Assessment",
    "BFloat16",
    "BitClipped",
    "BitErrorRate",
    "BitPosition",
    "DeepVigor",
    "FTClipAct",
    "FaultSpace",
    "FitAct",
    "FixedPoint",
    "FlipproofError",
    "FlipproofWarning",
    "Float8E4M3",
    "Float8E5M2",
    "Float16",
    "Float32",
    "Guard",
    "HardeningReport",
    "Neurons",
    "Parameters",
    "ProAct",
    "Propagation",
    "RandomBits",
    "Ranger",
    "StuckAt",
    "VulnerabilityMap",
    "analyze",
    "assess",
    "bit_criticality",
    "bit_profile",
    "clip_bits",
    "clip_tensors",
    "compare",
    "harden",
    "hardening_report",
    "load_hardened",
    "overhead",
    "propagation",
    "report",
    "sample_size",
    "save_hardened",
    "scrub_",
    "select",
]
