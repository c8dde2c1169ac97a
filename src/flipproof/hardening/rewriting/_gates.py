"""The pointwise half of a recurrent step, with bounded gates, in one compiled pass over memory."""

from __future__ import annotations

import numpy as np

from flipproof._kernels import kernel

# tanh as a rational function x · P(x²) / Q(x²) on ±7.9, beyond which float32 cannot tell it from ±1 (the minimax fit
# that Eigen and XLA use too): additions and multiplications alone, so that the compiler can use the whole vector unit
_END = np.float32(7.90531110763549805)
_P0, _P1 = np.float32(4.89352455891786e-03), np.float32(6.37261928875436e-04)
_P2, _P3 = np.float32(1.48572235717979e-05), np.float32(5.12229709037114e-08)
_P4, _P5 = np.float32(-8.60467152213735e-11), np.float32(2.00018790482477e-13)
_P6 = np.float32(-2.76076847742355e-16)
_Q0, _Q1 = np.float32(4.89352518554385e-03), np.float32(2.26843463243900e-03)
_Q2, _Q3 = np.float32(1.18534705686654e-04), np.float32(1.19825839466702e-06)
_HALF = np.float32(0.5)


@kernel(inline="always", error_model="numpy", fastmath={"contract"})
def _clamp(x, low, high):  # type: ignore[no-untyped-def]
    """Into [low, high]; NaN takes `low`, as every comparison with it is false."""
    x = x if x > low else low
    return x if x < high else high


@kernel(inline="always", error_model="numpy", fastmath={"contract"})
def _tanh(x):  # type: ignore[no-untyped-def]
    x = _clamp(x, -_END, _END)
    y = x * x
    p = _P0 + y * (_P1 + y * (_P2 + y * (_P3 + y * (_P4 + y * (_P5 + y * _P6)))))
    return x * p / (_Q0 + y * (_Q1 + y * (_Q2 + y * _Q3)))


@kernel(inline="always", error_model="numpy", fastmath={"contract"})
def _sigmoid(x):  # type: ignore[no-untyped-def]
    return _HALF + _HALF * _tanh(_HALF * x)


@kernel(error_model="numpy", fastmath={"contract"})
def lstm_step(a, b, c, h, out, low, high):  # type: ignore[no-untyped-def]
    """One step of an LSTM after its matrix products.

    Args:
        a: the input's part of the gates, biases included, (rows, 4H) in PyTorch's order i, f, g, o.
        b: the state's part, (rows, 4H).
        c: cell state (rows, H), updated.
        h: o · tanh(c) goes here, (rows, H).
        out: and here.
        low: lower bounds of the inputs of i, f, g, o and of the cell's tanh, (5,).
        high: upper bounds.
    """
    size = c.shape[1]
    li, lf, lg, lo, lc = low[0], low[1], low[2], low[3], low[4]
    hi, hf, hg, ho, hc = high[0], high[1], high[2], high[3], high[4]
    for row in range(c.shape[0]):
        ai, af, ag, ao = (
            a[row, :size],
            a[row, size : 2 * size],
            a[row, 2 * size : 3 * size],
            a[row, 3 * size :],
        )
        bi, bf, bg, bo = (
            b[row, :size],
            b[row, size : 2 * size],
            b[row, 2 * size : 3 * size],
            b[row, 3 * size :],
        )
        cr, hr, outr = c[row], h[row], out[row]
        for k in range(size):
            i = _sigmoid(_clamp(ai[k] + bi[k], li, hi))
            f = _sigmoid(_clamp(af[k] + bf[k], lf, hf))
            g = _tanh(_clamp(ag[k] + bg[k], lg, hg))
            o = _sigmoid(_clamp(ao[k] + bo[k], lo, ho))
            new = f * cr[k] + i * g
            cr[k] = new
            value = o * _tanh(_clamp(new, lc, hc))
            hr[k] = value
            outr[k] = value


@kernel(error_model="numpy", fastmath={"contract"})
def gru_step(a, b, h, out, low, high):  # type: ignore[no-untyped-def]
    """One step of a GRU after its matrix products.

    Args:
        a: the input's part of the gates, (rows, 3H) in PyTorch's order r, z, n.
        b: the state's part, (rows, 3H), biases included.
        h: state (rows, H), updated.
        out: and here.
        low: lower bounds of the inputs of r, z and n, (3,).
        high: upper bounds.
    """
    size = h.shape[1]
    lr, lz, ln = low[0], low[1], low[2]
    hr, hz, hn = high[0], high[1], high[2]
    for row in range(h.shape[0]):
        ar, az, an = a[row, :size], a[row, size : 2 * size], a[row, 2 * size :]
        br, bz, bn = b[row, :size], b[row, size : 2 * size], b[row, 2 * size :]
        state, outr = h[row], out[row]
        for k in range(size):
            r = _sigmoid(_clamp(ar[k] + br[k], lr, hr))
            z = _sigmoid(_clamp(az[k] + bz[k], lz, hz))
            n = _tanh(_clamp(an[k] + r * bn[k], ln, hn))
            new = n + z * (state[k] - n)
            state[k] = new
            outr[k] = new


@kernel(inline="always", error_model="numpy", fastmath={"contract", "reassoc"})
def _matvec(weight, bias, h, result):  # type: ignore[no-untyped-def]
    for j in range(weight.shape[0]):
        total = bias[j]
        row = weight[j]
        for k in range(h.size):
            total += row[k] * h[k]
        result[j] = total


@kernel(error_model="numpy", fastmath={"contract", "reassoc"})
def lstm_sequence(a, weight, bias, c, h, out, low, high, backwards):  # type: ignore[no-untyped-def]
    """All steps of one sequence, matrix products included: at one row a step, calling anything costs more.

    Args:
        a: the input's part, (T, 4H).
        weight: W_hh, (4H, H).
        bias: b_hh, (4H,).
        c: cell state (1, H), updated.
        h: state (1, H), updated.
        out: states (T, H).
        low: see `lstm_step`.
        high: see `lstm_step`.
        backwards: whether the last step comes first.
    """
    b = np.empty((1, weight.shape[0]), np.float32)
    for i in range(a.shape[0]):
        t = a.shape[0] - 1 - i if backwards else i
        _matvec(weight, bias, h[0], b[0])
        lstm_step(a[t : t + 1], b, c, h, out[t : t + 1], low, high)


@kernel(error_model="numpy", fastmath={"contract", "reassoc"})
def gru_sequence(a, weight, bias, h, out, low, high, backwards):  # type: ignore[no-untyped-def]
    """The same for a GRU; see `lstm_sequence` and `gru_step`."""
    b = np.empty((1, weight.shape[0]), np.float32)
    for i in range(a.shape[0]):
        t = a.shape[0] - 1 - i if backwards else i
        _matvec(weight, bias, h[0], b[0])
        gru_step(a[t : t + 1], b, h, out[t : t + 1], low, high)
