"""Who hits a space: fault models, one a file."""

from flipproof.faults.base import FaultModel
from flipproof.faults.bit_error_rate import BitErrorRate
from flipproof.faults.bit_position import BitPosition
from flipproof.faults.random_bits import RandomBits
from flipproof.faults.sampling import TrialGenerator
from flipproof.faults.stuck_at import StuckAt

__all__ = ["BitErrorRate", "BitPosition", "FaultModel", "RandomBits", "StuckAt", "TrialGenerator"]
