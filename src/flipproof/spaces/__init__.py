"""What can be hit: spaces that number every bit."""

from flipproof._literals import read_typed
from flipproof.spaces.cache import Cache
from flipproof.spaces.contract import Where
from flipproof.spaces.sites import Neurons, Parameters

__all__ = ["Cache", "Neurons", "Parameters", "Where", "parse_where"]


def parse_where(text: str) -> Parameters | Neurons | Where:
    """What is hit, from its repr.

    Raises:
        ConfigError: if it is none of those exported here.

    Example:
        >>> parse_where("Neurons('conv*')").include
        ('conv*',)
    """
    found: Parameters | Neurons | Where = read_typed(
        text, (Parameters, Neurons, Where), map(globals().get, __all__), "Parameters(include='conv*')"
    )
    return found
