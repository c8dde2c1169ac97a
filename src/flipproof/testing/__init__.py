"""Contract suites: inherit one, and a new format, space, fault model or hardening is held to what the others are.

They are ordinary pytest classes and need pytest, which the ``dev`` extra installs (``pip install 'flipproof[dev]'``);
nothing else in flipproof imports them.
"""

import pytest

# so that a failing contract shows values, as a failing test does; it has to come before the import
pytest.register_assert_rewrite(
    "flipproof.testing.formats", "flipproof.testing.spaces", "flipproof.testing.faults", "flipproof.testing.hardening"
)

from flipproof.testing.faults import FaultModelContract  # noqa: E402
from flipproof.testing.formats import FormatContract  # noqa: E402
from flipproof.testing.hardening import HardeningContract  # noqa: E402
from flipproof.testing.spaces import SpaceContract  # noqa: E402

__all__ = ["FaultModelContract", "FormatContract", "HardeningContract", "SpaceContract"]
