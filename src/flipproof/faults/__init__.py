"""Who hits a space: fault models, one a file."""

from flipproof._literals import read_typed
from flipproof.faults.base import FaultModel
from flipproof.faults.bit_error_rate import BitErrorRate
from flipproof.faults.bit_position import BitPosition
from flipproof.faults.random_bits import RandomBits
from flipproof.faults.sampling import TrialGenerator
from flipproof.faults.stuck_at import StuckAt

__all__ = ["BitErrorRate", "BitPosition", "FaultModel", "RandomBits", "StuckAt", "TrialGenerator", "parse_faults"]


def parse_faults(text: str) -> FaultModel:
    """A fault model from its repr.

    Raises:
        ConfigError: if it is none of those exported here.

    Example:
        >>> parse_faults("BitErrorRate([1e-6, 1e-5])")
        BitErrorRate(ber=(1e-06, 1e-05), exact=True, spread='bits')
        >>> parse_faults("__import__('os')")
        Traceback (most recent call last):
            ...
        flipproof.errors.ConfigError: cannot read "__import__('os')": __import__ is not among BitErrorRate, ...
    """
    found: FaultModel = read_typed(text, FaultModel, map(globals().get, __all__), "BitErrorRate([1e-6, 1e-5])")
    return found
