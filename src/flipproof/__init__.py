"""flipproof: how a neural network behaves when its memory loses bits, and how to make it survive."""

from flipproof.analysis.deepvigor import DeepVigor, analyze
from flipproof.analysis.factors import estimate_factors
from flipproof.analysis.propagation import Propagation, propagation
from flipproof.analysis.vulnerability import VulnerabilityMap
from flipproof.campaigns.assess import assess
from flipproof.campaigns.assessment import Assessment
from flipproof.campaigns.statistics import sample_size
from flipproof.errors import FlipproofError, FlipproofWarning
from flipproof.faults import BitErrorRate, BitPosition, RandomBits, StuckAt
from flipproof.formats import (
    SECDED,
    Affine,
    BFloat16,
    BitClipped,
    FixedPoint,
    Float8E4M3,
    Float8E5M2,
    Float16,
    Float32,
    Parity,
    TripleMSB,
)
from flipproof.hardening.files import load_hardened, save_hardened
from flipproof.hardening.harden import harden
from flipproof.hardening.methods.avc import AVC
from flipproof.hardening.methods.fitact import FitAct
from flipproof.hardening.methods.ft_clipact import FTClipAct
from flipproof.hardening.methods.guard import Guard
from flipproof.hardening.methods.proact import ProAct
from flipproof.hardening.methods.ranger import Ranger
from flipproof.hardening.overhead import overhead
from flipproof.hardening.report import HardeningReport, hardening_report
from flipproof.reports.html import report
from flipproof.reports.tables import compare
from flipproof.running.metrics import Metric
from flipproof.spaces.neuron_sites import Neurons
from flipproof.spaces.parameters import FaultSpace
from flipproof.spaces.sites import Parameters
from flipproof.storage.choose import protected_formats, select
from flipproof.storage.clipping import bit_criticality, bit_profile, clip_bits, clip_tensors
from flipproof.storage.explore import Exploration, explore
from flipproof.storage.indicators import p_drop, rap
from flipproof.storage.measure import protection
from flipproof.storage.mixed import explore_mixed
from flipproof.storage.pack import pack_, packed_bytes
from flipproof.storage.scrub import scrub_

__version__ = "0.1.0"

__all__ = [
    "AVC",
    "SECDED",
    "Affine",
    "Assessment",
    "BFloat16",
    "BitClipped",
    "BitErrorRate",
    "BitPosition",
    "DeepVigor",
    "Exploration",
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
    "Metric",
    "Neurons",
    "Parameters",
    "Parity",
    "ProAct",
    "Propagation",
    "RandomBits",
    "Ranger",
    "StuckAt",
    "TripleMSB",
    "VulnerabilityMap",
    "analyze",
    "assess",
    "bit_criticality",
    "bit_profile",
    "clip_bits",
    "clip_tensors",
    "compare",
    "estimate_factors",
    "explore",
    "explore_mixed",
    "harden",
    "hardening_report",
    "load_hardened",
    "overhead",
    "p_drop",
    "pack_",
    "packed_bytes",
    "propagation",
    "protected_formats",
    "protection",
    "rap",
    "report",
    "sample_size",
    "save_hardened",
    "scrub_",
    "select",
]
