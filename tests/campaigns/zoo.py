"""Models that keep state, and models that do under faults what they never do without: ordinary code of other people."""

from __future__ import annotations

import itertools
import random
from collections import deque

import numpy as np
import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, MinMaxObserver, MovingAverageMinMaxObserver
from torch.nn import functional as F
from torch.utils import _pytree as pytree

FEATURES, CLASSES = 6, 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.a, self.b = nn.Linear(FEATURES, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


class Observed(Net):
    """An observer that was left on: its range widens with what a fault makes, and scales everything after it."""

    def __init__(self) -> None:
        super().__init__()
        self.observer = MinMaxObserver(quant_min=0, quant_max=255)

    def forward(self, x: Tensor) -> Tensor:
        h = self.observer(F.relu(self.a(x)))
        scale, zero = self.observer.calculate_qparams()
        return self.b(torch.fake_quantize_per_tensor_affine(h, scale, zero.int(), 0, 255))


class FakeQuantized(Net):
    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeQuantize(MovingAverageMinMaxObserver)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.fake(F.relu(self.a(x))))


class MaxNorm(nn.Module):
    """An embedding that shrinks its own weights whenever their norm is above 1: faults make that happen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.words = nn.Embedding(20, 8, max_norm=1.0)
        with torch.no_grad():
            self.words.weight.mul_(0.2)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words(x.abs().mul(7).long().clamp(max=19)).sum(dim=1))


class TrainedNorm(Net):
    """BatchNorm that stays in train mode, as some papers adapt to a new domain."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.norm.train()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.norm(self.a(x))))


class Latch(Net):
    """A Python attribute that remembers one large value for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.tripped = False

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        if float(h.abs().max()) > 50:
            self.tripped = True
        return self.b(h * 0 if self.tripped else h)


class Latch60(Net):
    """The same answers as one that remembers values above 60 and forgets them after every batch."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.b(h * 0 if float(h.nan_to_num(1e9).abs().max()) > 60 else h)


class Containers(Net):
    """State in a list, a dictionary, a set, a deque, an array, an object, an object with slots, and on the class."""

    calls = 0

    class Slotted:
        __slots__ = ("worst",)

    class Plain:
        worst = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []
        self.table = {"inner": {"worst": 0.0}}
        self.marks: set[int] = set()
        self.last: deque[float] = deque(maxlen=3)
        self.array = np.zeros(2)
        self.slotted, self.plain = Containers.Slotted(), Containers.Plain()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        worst = float(h.nan_to_num().abs().max().clamp(max=1e6))
        type(self).calls += 1
        self.seen.append(worst)
        self.last.append(worst)
        self.marks.add(round(worst))
        self.table["inner"]["worst"] = max(self.table["inner"]["worst"], worst)
        self.array[0] += worst
        self.slotted.worst = self.plain.worst = worst
        shift = len(self.seen) + len(self.marks) + len(self.last) + type(self).calls + float(self.array[0]) % 7
        return self.b(h) + shift * torch.tensor([0.0, 0.1, 0.2])


class Buffers(Net):
    """A buffer made anew, one that grows, and one written where no version counter sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("silent", torch.zeros(5))
        self.register_buffer("grown", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        self.mean = 0.9 * self.mean + 0.1 * h.mean(dim=0)
        self.silent.data += h.mean(dim=0)
        self.grown.resize_(self.grown.numel() + 1).fill_(1.0)
        return self.b(h + self.mean + self.silent) * self.grown.sum()


class Random(Net):
    """Random numbers of torch, NumPy, Python and a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.rng = torch.Generator().manual_seed(3), np.random.default_rng(3)
        self.python = random.Random(3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(F.relu(self.a(x)), 0.2, training=True)
        noise = torch.randn(1, generator=self.own) + float(self.rng.normal()) + self.python.random()
        noise = noise + random.random() + float(np.random.rand())  # noqa: NPY002
        return self.b(h) + 0.1 * noise * torch.tensor([0.0, 1.0, 2.0])


class Counter(Net):
    """An iterator is used up call by call."""

    def __init__(self) -> None:
        super().__init__()
        self.step = itertools.count()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x))) + next(self.step) * torch.tensor([0.0, 0.1, 0.2])


class Merging(Net):
    """An adapter that adds itself to the weights in eval(), as LoRA layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(2, FEATURES)), nn.Parameter(torch.randn(5, 2))
        self.merged = False

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        if mode == self.merged:
            self.a.weight.data += (-1 if mode else 1) * (self.up @ self.down).detach()
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) if self.merged else self.a(x) + x @ self.down.t() @ self.up.t()
        return self.b(F.relu(h))


STATEFUL = [
    Observed, FakeQuantized, MaxNorm, TrainedNorm, Latch, Containers, Buffers, Random, Counter, Merging
]  # fmt: skip


class Guarded(Net):
    """A check whose exception is caught: without faults it never fails."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        try:
            if bool((h.abs() > 30).any()):
                raise OverflowError
        except OverflowError:
            h = torch.zeros_like(h)
        return self.b(F.relu(h))


class Solved(Net):
    """An exception that only values raise, and no question that a trace would see."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        gram = h.t() @ h / 10 + torch.eye(5)
        try:
            root = torch.linalg.cholesky(gram)
        except RuntimeError:
            root = torch.zeros_like(gram)
        return self.b(F.relu(h @ root))


class Called(Net):
    """`__call__` does more than `forward`."""

    class Clamping(nn.Linear):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x).clamp(-20, 20)

    def __init__(self) -> None:
        super().__init__()
        self.a = Called.Clamping(FEATURES, 5)


class Replaced(Net):
    """A forward put on one instance, which reads another layer's weights."""

    def __init__(self) -> None:
        super().__init__()
        plain = self.a.forward
        self.a.forward = lambda x: plain(x) * self.b.weight.abs().max().clamp(max=5)


class Mapped(Net):
    """Clamps whatever is a tensor; the stand-in of a trace is none."""

    def forward(self, x: Tensor) -> Tensor:
        h = pytree.tree_map_only(Tensor, lambda t: t.clamp(-20, 20), self.a(x))
        return self.b(F.relu(h))


class Asking(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if isinstance(h, Tensor):
            h = h.clamp(-20, 20)
        return self.b(F.relu(h))


class Baked(Net):
    """A number read off all parameters, which a trace would keep for ever."""

    def forward(self, x: Tensor) -> Tensor:
        largest = max(float(p.abs().max()) for p in self.parameters())
        return self.b(F.relu(self.a(x))) / (1 + largest)


class ViewOfWeight(Net):
    """A buffer that is a view of another layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", self.b.weight.data[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)) * self.gain)


class Auxiliary(Net):
    """Keeps what is judged on itself."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = F.relu(self.a(x))
        self.aux = self.b(h) + self.a.weight.sum() * torch.tensor([0.0, 0.1, 0.2])
        return {"main": self.b(h)}


class Hooked(Net):
    """A hook on a layer of torch's that reads another layer's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a.register_forward_hook(lambda module, args, result: result * self.b.weight.abs().max().clamp(max=5))


class Reshaping(Net):
    """Answers in batches of its own: an LSTM computes rows otherwise in a smaller batch."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.lstm(x.reshape(-1, 3, 2))[0][:, -1]))


CROOKED = [Guarded, Solved, Called, Replaced, Mapped, Asking, Baked, ViewOfWeight, Hooked, Reshaping]


class Dynamic(Net):
    """Dynamic quantisation with one scale a batch: a huge value in one row coarsens all others."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        scale = h.abs().amax() / 127
        return self.b((h / scale).round() * scale)


class CentredBatch(Net):
    """Subtracts the mean over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(F.relu(h - h.mean(dim=0)))


MIXING = [Dynamic, CentredBatch, TrainedNorm]


def batches(sizes: tuple[int, ...] = (4, 4, 2)) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [(torch.randn(n, FEATURES, generator=generator), torch.arange(n) % CLASSES) for n in sizes]
