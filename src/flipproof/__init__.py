"""flipproof: how a neural network behaves when its memory loses bits, and how to make it survive.

Names are imported when they are first used, from where `__init__.pyi` says they are: `import flipproof` costs nothing.
"""

import lazy_loader as _lazy

__version__ = "0.1.0"

__getattr__, __dir__, _names = _lazy.attach_stub(__name__, __file__)

_folders = (
    "analysis campaigns datasets engine errors faults formats hardening models reports running spaces storage testing"
)
__all__ = sorted({*_names} - {*_folders.split()})
