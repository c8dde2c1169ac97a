"""Press Ctrl-C at every function entry of a call, one after the other, and look at what it leaves.

`python tests/interrupt_points.py` goes through all of them and prints what `docs/results/interrupts/README.md` shows.
"""

from __future__ import annotations

import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import flipproof as fp
from flipproof import _interrupts as interrupts

OWN = str(Path(__file__).parent)
"""Where the tests are, which are not interrupted themselves."""

WATCHED = (
    "/flipproof/",
    "/contextlib.py",
    "/signal.py",
    "/torch/fx/",
    "/torch/autograd/grad_mode.py",
    "/torch/overrides.py",
    "/torch/utils/_contextlib.py",
    "/torch/utils/hooks.py",
    "/torch/nn/modules/module.py",
)
"""Files whose functions are interrupted at their entry: all that change a model, or global state of PyTorch."""


class Small(nn.Module):
    """Every kind of layer that the injector, the tracer and the hardenings treat differently, as small as can be."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU()
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x)))
        return self.head(torch.relu(self.act(x).mean(dim=(2, 3))))


def small() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A model with every flag that can be lost, and data."""
    torch.manual_seed(0)
    model = Small().train()
    model.norm.eval()  # as one freezes a layer
    model.head.bias.requires_grad_(False)
    model.act.register_forward_hook(_nothing)
    model.norm.running_mean.uniform_()
    return model, [(torch.randn(4, 1, 3, 3), torch.arange(4) % 3), (torch.randn(2, 1, 3, 3), torch.arange(2))]


def _nothing(module: nn.Module, args: Any, result: Any) -> None:
    """A hook of the user's."""


def _quiet(call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call(*args, **kwargs)


def _corrupted(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
    space = fp.FaultSpace(model, format={"head*": fp.Float16(), "*": fp.Float32()})
    with space.corrupted(space.faults([("conv.weight", 0, 30), ("head.weight", 1, 3)])):
        model(data[0][0])


def _stored(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
    space = fp.FaultSpace(model, format=fp.Float16())
    with space.stored(), space.corrupted(space.faults([("conv.weight", 0, 3)])):
        model(data[0][0])


SETUP = {"trials": 2, "progress": False}
CALLS: dict[str, Callable[[nn.Module, list[tuple[Tensor, Tensor]]], None]] = {
    "assess": lambda m, d: _quiet(fp.assess, m, data=d, faults=fp.RandomBits(2), **SETUP),
    "assess, quantised": lambda m, d: _quiet(
        fp.assess, m, data=d, faults=fp.RandomBits(2), format=fp.Affine(bits=4), **SETUP
    ),
    "assess, neurons": lambda m, d: _quiet(fp.assess, m, data=d, faults=fp.RandomBits(1), where=fp.Neurons(), **SETUP),
    "analyze": lambda m, d: _quiet(fp.analyze, m, d[:1], fp.DeepVigor(neurons=2), where=fp.Neurons(include="head")),
    "analyze, parameters": lambda m, d: _quiet(
        fp.analyze, m, d[:1], fp.DeepVigor(neurons=2), where=fp.Parameters(include="head*")
    ),
    "inject_all": lambda m, d: _quiet(fp.inject_all, m, d, where=fp.Parameters("head.bias"), progress=False),
    "harden": lambda m, d: _quiet(fp.harden, m, fp.Guard(), data=d, progress=False),
    "harden, trained": lambda m, d: _quiet(
        fp.harden, m, fp.ProAct(epochs=1, epochs_last=1, held_out=0.5, batch_size=4), data=d, progress=False
    ),
    "propagation": lambda m, d: _quiet(fp.propagation, m, d, faults=fp.RandomBits(2), trials=1),
    "pack_": lambda m, d: _quiet(fp.pack_, m, fp.Affine(bits=4)),
    "corrupted": _corrupted,
    "stored": _stored,
}


@dataclass
class State:
    """All that a call may change for a while."""

    facts: dict[str, Any]
    bits: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> State:
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        facts = {
            "training": {name: module.training for name, module in model.named_modules()},
            "requires_grad": {name: t.requires_grad for name, t in named.items()},
            "addresses": {name: t.data_ptr() for name, t in named.items()},
            "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
            "classes": {name: type(module) for name, module in model.named_modules()},
            "hooks": {
                (name, key): list(value)
                for name, module in model.named_modules()
                for key, value in vars(module).items()
                if "_hooks" in key
            },
            "gradient mode": torch.is_grad_enabled(),
            "inference mode": torch.is_inference_mode_enabled(),
            "threads": torch.get_num_threads(),
            "fx patches": (nn.Module.__call__, nn.Module.__getattr__, torch.cat, len),
            "function modes": torch.overrides._len_torch_function_stack(),
            "signals": [signal.getsignal(number) for number in interrupts.SIGNALS],
            "waiting": (interrupts._signals.active, interrupts._signals.held, tuple(interrupts._signals.waiting)),
        }
        copies = {name: t.detach().clone().contiguous().reshape(-1).view(torch.uint8) for name, t in named.items()}
        return cls(facts, copies)

    def damage(self, other: State) -> list[str]:
        """What differs."""
        found = [name for name, fact in self.facts.items() if fact != other.facts[name]]
        same = self.bits.keys() == other.bits.keys()
        return found + ([] if same and all(torch.equal(b, other.bits[n]) for n, b in self.bits.items()) else ["bits"])


class Ctrl_C:
    """Counts function entries in the watched files, and presses Ctrl-C at one of them, by number or "file.py:name"."""

    def __init__(self, at: int | str | None = None) -> None:
        self.at, self.count, self.place = at, 0, ""
        self._watched: dict[str, bool] = {}

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        file = frame.f_code.co_filename
        known = self._watched.get(file)
        if known is None:
            here = file.startswith(OWN)
            known = self._watched[file] = not here and any(part in file for part in WATCHED)
        if known:
            self.count += 1
            place = f"{Path(file).name}:{frame.f_code.co_name}" if self.at is not None and not self.place else ""
            if place and self.at in (self.count, place):
                self.place = place
                signal.raise_signal(signal.SIGINT)


def points(name: str) -> int:
    """How many function entries a call has."""
    model, data = small()
    CALLS[name](model, data)  # compiles, imports, and fills caches
    model, data = small()
    counter = Ctrl_C()
    sys.settrace(counter)
    try:
        CALLS[name](model, data)
    finally:
        sys.settrace(None)
    return counter.count


def press(name: str, at: int | str) -> tuple[str, list[str]]:
    """Where Ctrl-C was pressed, and what it left; "lost" if nobody heard it."""
    model, data = small()
    before = State.of(model)
    pressing = Ctrl_C(at)
    heard = False
    swallowed: list[Any] = []  # Python itself drops what is raised while it takes a generator down
    sys.unraisablehook = swallowed.append
    sys.settrace(pressing)
    try:
        CALLS[name](model, data)
    except KeyboardInterrupt:
        heard = True
    finally:
        sys.settrace(None)
        sys.unraisablehook = sys.__unraisablehook__
    after = State.of(model)
    damage = before.damage(after)
    if name == "pack_" and damage:  # all or nothing: what it changes stays
        model, data = small()
        CALLS[name](model, data)
        damage = [n for n in State.of(model).damage(after) if n not in ("addresses", "classes", "hooks")]
    if pressing.place and not heard and not swallowed:
        damage.append("lost")
    return pressing.place, damage


def main() -> None:
    """Every point of every call, or every n-th of the calls that are named: `interrupt_points.py [N] [CALL] …`."""
    torch.set_num_threads(2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    every = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    print("| call | function entries | tried | damaged | what, where |\n|---|---:|---:|---:|---|")
    for name in sys.argv[2:] or CALLS:
        total, began = points(name), time.time()
        found: Counter[str] = Counter()
        bad = tried = 0
        for at in range(1, total + 1, every):
            place, damage = press(name, at)
            tried += 1
            bad += bool(damage)
            found.update(f"{each} ({place})" for each in damage)
        shown = ", ".join(f"{what} × {n}" for what, n in found.most_common(12)) or "–"
        print(f"| {name} | {total:,} | {tried:,} | {bad} | {shown} |", flush=True)
        print(f"{name}: {time.time() - began:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
