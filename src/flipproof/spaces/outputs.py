"""How much the layers of a model compute for one sample: what neuron coverage is a share of."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

_MULTIPLYING = (_ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


class Outputs:
    """Sizes of what modules with weights give, over all forwards that run while it is active.

    Args:
        model: hooks are on it only while this is active.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> with Outputs(net) as outputs:
        ...     _ = net(torch.zeros(5, 4))
        >>> outputs.bits_a_sample(samples=5)
        {'0': 96, '2': 64}
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._bits: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Outputs:
        for name, module in self._model.named_modules():
            if isinstance(module, _MULTIPLYING):
                self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def bits_a_sample(self, samples: int) -> dict[str, int]:
        """Bits of the outputs of each module, in their own type, all its calls together, for one sample."""
        return {name: round(bits / max(samples, 1)) for name, bits in self._bits.items()}

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, result: Any) -> None:
            output = result[0] if isinstance(result, tuple) and not isinstance(result, PackedSequence) else result
            output = output.data if isinstance(output, PackedSequence) else output
            if isinstance(output, Tensor):
                self._bits[name] = self._bits.get(name, 0) + 8 * output.nbytes

        return hook
