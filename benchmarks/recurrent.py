"""What weight bit clipping and activation value clipping cost: ÷ PyTorch's own recurrent layers, ÷ a forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import flipproof as fp
from benchmarks.measure import Row, Size, interleaved, seconds
from flipproof.models import digits_cnn, resnet18, stage_384, stage_conv_72
from flipproof.running.evaluation import one_thread

WBC = fp.BitClipped(fp.Float32(), zeros=(30,))
SHAPES = ((1, 128), (1, 256), (32, 128), (32, 256), (128, 256), (64, 384))
STEPS = 50


def run(size: Size) -> list[Row]:
    """One thread, T = 50 steps of 93 features; a bounded layer clamps all its gates."""
    rows = []
    with one_thread(torch.device("cpu")), torch.no_grad():
        for kind in (nn.LSTM, nn.GRU):
            for batch, hidden in SHAPES[: size.choose(6, 6, 1)]:
                layer, x = _Wrapped(kind(93, hidden)).eval(), torch.randn(STEPS, batch, 93)
                calibration = [(torch.randn(STEPS, 8, 93), torch.zeros(8))]
                safe = fp.harden(layer, fp.AVC(), data=calibration, progress=False)
                ratio = _ratio(layer, safe, (x,), size)
                name = f"{kind.__name__}, batch {batch}, H = {hidden}: gates clamped ÷ nn.{kind.__name__}"
                rows.append(Row(name, ratio, at_most=1.35 if kind is nn.LSTM else None))
        for name, build in (("Stage-CONV-72", stage_conv_72), ("Stage-384", stage_384))[: size.choose(2, 2, 1)]:
            net, x = build().eval(), torch.randn(64, 48, 93)
            at = torch.zeros(64, 48, dtype=torch.bool)
            at[:, -1] = True
            halves = [({"x": x[part], "at": at[part]}, torch.arange(32) % 2) for part in (slice(32), slice(32, 64))]
            safe = fp.harden(net, fp.AVC(), data=halves, progress=False)
            rows.append(Row(f"{name}, batch 64, 48 steps: AVC ÷ plain", _ratio(net, safe, (x,), size)))
            rows.append(_scrubbing(name, net, x, size))
        net = digits_cnn().eval() if size is Size.SMOKE else resnet18().eval()
        images = torch.rand(8, 1, 8, 8) if size is Size.SMOKE else torch.randn(64, 3, 32, 32)
        rows.append(_scrubbing("digits CNN" if size is Size.SMOKE else "ResNet-18", net, images, size))
    return rows


class _Wrapped(nn.Module):
    """The last output's mean: one score a sample, as `harden` wants it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        last: Tensor = self.layer(x)[0][-1]
        return last.mean(dim=1)


def _scrubbing(name: str, net: nn.Module, x: Tensor, size: Size) -> Row:
    medians = interleaved(
        {"scrub": lambda turn: seconds(lambda: fp.scrub_(net, WBC)), "plain": lambda turn: seconds(lambda: net(x))},
        size.choose(31, 9, 1),
    )
    return Row(f"{name}, batch {len(x)}: scrub_ (WBC as deployed) ÷ a forward", medians["scrub"] / medians["plain"])


def _ratio(plain: nn.Module, safe: nn.Module, inputs: tuple[Tensor, ...], size: Size) -> float:
    medians = interleaved(
        {
            "plain": lambda turn: seconds(lambda: plain(*inputs)),
            "bounded": lambda turn: seconds(lambda: safe(*inputs)),
        },
        size.choose(31, 9, 1),
    )
    return medians["bounded"] / medians["plain"]
