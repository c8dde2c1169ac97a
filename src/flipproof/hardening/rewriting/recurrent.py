"""LSTM, GRU and RNN layers whose gates are modules, so that each can be bounded (Parchekani et al. 2024, III-B).

PyTorch's recurrent layers compute their gates in one kernel that shows nothing of them. The classes here take their
place with the same parameters under the same names and compute the same values up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from flipproof.hardening.bounds.bounded import ClampInput
from flipproof.hardening.bounds.clamping import is_plain
from flipproof.hardening.rewriting._gates import gru_sequence, gru_step, lstm_sequence, lstm_step

State = tuple[Tensor, ...]
"""(h, c) of an LSTM, (h,) of the others; rows first."""


class Opened:
    """A recurrent layer or cell whose gates are modules: `{gate}` in cells, `{gate}_l{layer}[_reverse]` in layers.

    Attributes:
        gates: gate → the activation of its input.
    """

    gates: ClassVar[dict[str, type[nn.Module]]]

    def pointwise(self, a: Tensor, b: Tensor, state: State, act: Sequence[nn.Module]) -> State:
        """The step after its matrix products.

        Args:
            a: the input's part W_ih x + b_ih, (rows, gates · H).
            b: the state's part W_hh h + b_hh.
            state: before the step.
            act: the gates' activations, in the order of `gates`.
        """
        raise NotImplementedError

    kernel: ClassVar[Callable[..., None] | None] = None
    """The same, compiled: for float32 on a CPU with every gate bounded."""

    sequence: ClassVar[Callable[..., None] | None] = None
    """All steps of one sequence, compiled."""


class _LSTM(Opened):
    gates: ClassVar = {
        "input_gate": nn.Sigmoid,
        "forget_gate": nn.Sigmoid,
        "candidate": nn.Tanh,
        "output_gate": nn.Sigmoid,
        "cell": nn.Tanh,
    }
    kernel = staticmethod(lstm_step)
    sequence = staticmethod(lstm_sequence)

    def pointwise(self, a: Tensor, b: Tensor, state: State, act: Sequence[nn.Module]) -> State:
        """C ← f · c + i · g; h = o · tanh(c)."""
        i, f, g, o = (gate(part) for gate, part in zip(act, (a + b).chunk(4, dim=-1), strict=False))
        c = f * state[1] + i * g
        return o * act[4](c), c


class _GRU(Opened):
    gates: ClassVar = {"reset_gate": nn.Sigmoid, "update_gate": nn.Sigmoid, "candidate": nn.Tanh}
    kernel = staticmethod(gru_step)
    sequence = staticmethod(gru_sequence)

    def pointwise(self, a: Tensor, b: Tensor, state: State, act: Sequence[nn.Module]) -> State:
        """N = tanh(a_n + r · b_n); h ← n + z · (h − n)."""
        (ar, az, an), (br, bz, bn) = a.chunk(3, dim=-1), b.chunk(3, dim=-1)
        n = act[2](an + act[0](ar + br) * bn)
        return (n + act[1](az + bz) * (state[0] - n),)


class _RNN(Opened):
    gates: ClassVar = {"candidate": nn.Tanh}

    def pointwise(self, a: Tensor, b: Tensor, state: State, act: Sequence[nn.Module]) -> State:
        """H = act(a + b)."""
        return (act[0](a + b),)


class _Layers(nn.RNNBase, Opened):
    """All layers and directions of a recurrent module, step by step."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As PyTorch's own: tensors batched or not, batch first or not, packed sequences, initial states."""
        packed = input if isinstance(input, PackedSequence) else None
        x = input.data if packed is not None else input
        lone = packed is None and x.dim() == 2
        if lone:
            x = x.unsqueeze(0 if self.batch_first else 1)
        if packed is None and self.batch_first:
            x = x.transpose(0, 1)
        sizes = packed.batch_sizes.tolist() if packed is not None else [x.shape[1]] * x.shape[0]
        rows = sizes[0] if sizes else x.shape[1]
        states = self._start(x, rows, hx, lone, packed)
        y, finals = self._layers(x.reshape(-1, x.shape[-1]), sizes, states)
        if packed is not None:
            out: Any = PackedSequence(y, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
            if packed.unsorted_indices is not None:
                finals = tuple(f.index_select(1, packed.unsorted_indices) for f in finals)
        else:
            out = y.reshape(len(sizes), rows, y.shape[-1])
            if self.batch_first:
                out = out.transpose(0, 1)
        if lone:
            out, finals = out.squeeze(0 if self.batch_first else 1), tuple(f.squeeze(1) for f in finals)
        return out, finals if len(finals) == 2 else finals[0]

    def _start(self, x: Tensor, rows: int, hx: Any, lone: bool, packed: PackedSequence | None) -> State:
        """Initial states, each (layers · directions, rows, size)."""
        count = self.num_layers * (2 if self.bidirectional else 1)
        widths = (self.proj_size or self.hidden_size, self.hidden_size)[: 2 if isinstance(self, _LSTM) else 1]
        if hx is None:
            return tuple(x.new_zeros(count, rows, width) for width in widths)
        given = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        given = tuple(h.unsqueeze(1) for h in given) if lone else given
        for h, width in zip(given, widths, strict=True):
            if h.shape != (count, rows, width):
                raise RuntimeError(f"Expected hidden size {(count, rows, width)}, got {list(h.shape)}")
        if packed is not None and packed.sorted_indices is not None:
            return tuple(h.index_select(1, packed.sorted_indices) for h in given)
        return given

    def _layers(self, x: Tensor, sizes: list[int], states: State) -> tuple[Tensor, State]:
        finals: list[State] = []
        directions = ("", "_reverse") if self.bidirectional else ("",)
        for layer in range(self.num_layers):
            outs = []
            for direction in directions:
                start = tuple(s[len(finals)] for s in states)
                y, final = self._direction(x, sizes, start, f"_l{layer}{direction}")
                outs.append(y)
                finals.append(final)
            x = torch.cat(outs, dim=-1) if len(outs) > 1 else outs[0]
            if self.dropout and self.training and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout)
        return x, tuple(torch.stack(part) for part in zip(*finals, strict=True))

    def _direction(self, x: Tensor, sizes: list[int], state: State, suffix: str) -> tuple[Tensor, State]:
        """One layer in one direction over steps that lie behind each other in `x`, (sum of sizes, features)."""
        act = [self.get_submodule(gate + suffix) for gate in self.gates]
        w_ih, w_hh = getattr(self, f"weight_ih{suffix}"), getattr(self, f"weight_hh{suffix}")
        b_ih, b_hh = (getattr(self, f"bias_{which}{suffix}") if self.bias else None for which in ("ih", "hh"))
        w_hr = getattr(self, f"weight_hr{suffix}") if self.proj_size else None
        limits = _limits(act) if self.kernel is not None and w_hr is None and is_plain(x) else None
        a = F.linear(x, w_ih, b_ih) if limits is None else product(x, w_ih, b_ih)
        firsts = [0]
        for size in sizes:
            firsts.append(firsts[-1] + size)
        order = range(len(sizes) - 1, -1, -1) if suffix.endswith("reverse") else range(len(sizes))
        if limits is not None:
            return self._compiled(a, sizes, firsts, order, state, w_hh, b_hh, limits)
        outs: list[Tensor] = [a[:0]] * len(sizes)
        for t in order:
            now = tuple(s[: sizes[t]] for s in state)
            new = self.pointwise(a[firsts[t] : firsts[t + 1]], F.linear(now[0], w_hh, b_hh), now, act)
            if w_hr is not None:
                new = (F.linear(new[0], w_hr), *new[1:])
            outs[t] = new[0]
            state = tuple(
                n if n.shape[0] == s.shape[0] else torch.cat([n, s[sizes[t] :]])
                for n, s in zip(new, state, strict=True)
            )
        return torch.cat(outs), state

    def _compiled(
        self,
        a: Tensor,
        sizes: list[int],
        firsts: list[int],
        order: range,
        state: State,
        w_hh: Tensor,
        b_hh: Tensor | None,
        limits: tuple[NDArray[np.float32], NDArray[np.float32]],
    ) -> tuple[Tensor, State]:
        assert self.kernel is not None
        state = tuple(s.detach().clone(memory_format=torch.contiguous_format) for s in state)
        out = a.new_empty(a.shape[0], self.hidden_size)
        inside, outside = a.detach().contiguous().numpy(), out.numpy()
        memory = [s.numpy() for s in state]
        if sizes[0] == 1:
            assert self.sequence is not None
            weight = w_hh.detach().contiguous().numpy()
            bias = np.zeros(len(weight), np.float32) if b_hh is None else b_hh.detach().contiguous().numpy()
            self.sequence(inside, weight, bias, *memory[::-1], outside, *limits, order.step < 0)
            return out, state
        # h is the last of an LSTM's arrays (c, h) and the only one of a GRU's
        kernel, memory = self.kernel, memory[::-1]
        if sizes[-1] == sizes[0]:
            times, h = repeated_product(w_hh, b_hh, sizes[0]), state[0]
            for t in order:
                first, last = firsts[t], firsts[t + 1]
                kernel(inside[first:last], times(h).numpy(), *memory, outside[first:last], *limits)
            return out, state
        for t in order:
            rows, first, last = sizes[t], firsts[t], firsts[t + 1]
            b = product(state[0][:rows], w_hh, b_hh).numpy()
            kernel(inside[first:last], b, *(m[:rows] for m in memory), outside[first:last], *limits)
        return out, state


class OpenLSTM(_LSTM, _Layers, nn.LSTM):
    """`nn.LSTM` whose gates are modules; the same `state_dict`.

    Example:
        >>> layer, x = nn.LSTM(4, 3), torch.randn(5, 2, 4)
        >>> expected = layer(x)[0]
        >>> open_recurrent_(layer)
        ['']
        >>> torch.allclose(layer(x)[0], expected, atol=1e-6), layer.forget_gate_l0
        (True, Sigmoid())
    """


class OpenGRU(_GRU, _Layers, nn.GRU):
    """`nn.GRU` whose gates are modules; the same `state_dict`."""


class OpenRNN(_RNN, _Layers, nn.RNN):
    """`nn.RNN` whose activation is a module; the same `state_dict`."""


class _Cell(nn.RNNCellBase, Opened):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """As PyTorch's own: (rows, features) or (features,), with the state or without."""
        lone = input.dim() == 1
        x = input.unsqueeze(0) if lone else input
        given = () if hx is None else tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        count = 2 if isinstance(self, _LSTM) else 1
        state = (
            tuple(h.unsqueeze(0) if lone else h for h in given) or (x.new_zeros(x.shape[0], self.hidden_size),) * count
        )
        act = [self.get_submodule(gate) for gate in self.gates]
        b_ih, b_hh = (self.bias_ih, self.bias_hh) if self.bias else (None, None)
        new = self.pointwise(F.linear(x, self.weight_ih, b_ih), F.linear(state[0], self.weight_hh, b_hh), state, act)
        new = tuple(n.squeeze(0) for n in new) if lone else new
        return new if count == 2 else new[0]


class OpenLSTMCell(_LSTM, _Cell, nn.LSTMCell):
    """`nn.LSTMCell` whose gates are modules; the same `state_dict`."""


class OpenGRUCell(_GRU, _Cell, nn.GRUCell):
    """`nn.GRUCell` whose gates are modules; the same `state_dict`."""


class OpenRNNCell(_RNN, _Cell, nn.RNNCell):
    """`nn.RNNCell` whose activation is a module; the same `state_dict`."""


_OPEN: dict[type[nn.Module], type[Opened]] = {
    nn.LSTM: OpenLSTM,
    nn.GRU: OpenGRU,
    nn.RNN: OpenRNN,
    nn.LSTMCell: OpenLSTMCell,
    nn.GRUCell: OpenGRUCell,
    nn.RNNCell: OpenRNNCell,
}


def can_be_opened(module: nn.Module) -> bool:
    """Whether `open_recurrent_` opens this layer or cell: one of PyTorch's own classes, with its own forward."""
    return type(module) in _OPEN and "forward" not in vars(module)


def open_recurrent_(model: nn.Module) -> list[str]:
    """Open every LSTM, GRU and RNN layer or cell of a model in place; returns their names.

    Parameters, hooks and flags stay the very same objects. Subclasses, which may compute anything, stay closed.
    """
    opened = []
    for name, module in model.named_modules():
        if not can_be_opened(module):
            continue
        module.__class__ = kind = _OPEN[type(module)]
        opened.append(name)
        suffixes = [""]
        if isinstance(module, nn.RNNBase):
            ways = ("", "_reverse") if module.bidirectional else ("",)
            suffixes = [f"_l{layer}{way}" for layer in range(module.num_layers) for way in ways]
        for suffix in suffixes:
            for gate, activation in kind.gates.items():
                new = nn.ReLU() if getattr(module, "nonlinearity", "tanh") == "relu" else activation()
                new.training = module.training
                module.add_module(gate + suffix, new)
    return opened


def product(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W h + b by whichever kernel is quickest for few rows; oneDNN's takes half the time of the default one."""
    if h.shape[0] > 1 and torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        result: Tensor = torch.ops.mkldnn._linear_pointwise(h, weight, bias, "none", [], "")
        return result
    return F.linear(h, weight, bias)


_SMALL, _FEW = 2**16, 16
"""Entries of a weight, and rows, up to which BLAS beats oneDNN."""


def repeated_product(weight: Tensor, bias: Tensor | None, rows: int) -> Callable[[Tensor], Tensor]:
    """W h + b again and again for `rows` rows: into the same memory, or with W laid out once as oneDNN wants it.

    It holds only as long as the weight stays as it is: within one forward.
    """
    weight = weight.detach()
    if weight.numel() <= _SMALL or rows <= _FEW:
        out, turned = weight.new_empty(rows, len(weight)), weight.t()
        if bias is None:
            return lambda h: torch.mm(h, turned, out=out)
        bias = bias.detach()
        return lambda h: torch.addmm(bias, h, turned, out=out)
    if not torch._C._has_mkldnn or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return lambda h: product(h, weight, bias)
    linear = torch.ops.mkldnn._linear_pointwise.default
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    return lambda h: linear(h, laid_out, bias, "none", [], "")


def _limits(act: Sequence[nn.Module]) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """(low, high) of all gates, if every one of them is a bound a layer and nobody watches it."""
    found = []
    for gate in act:
        if type(gate) is not ClampInput or gate.threshold.dim() or gate._forward_hooks or gate._forward_pre_hooks:
            return None
        found.append([float(limit) for limit in gate.limits()])
    low, high = np.array(found, np.float32).T.copy()
    return low, high
