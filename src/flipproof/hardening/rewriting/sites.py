"""A copy of a model in which every activation call that can be reached is a module of its own, ready to be bounded.

Outputs of layers become such places too, where a method asks for it (`Rewritten.open_layers`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils import _pytree as pytree

from flipproof._hooks import hooked
from flipproof.errors import DataError, ModelError
from flipproof.formats.base import bit_pattern
from flipproof.hardening.bounds.activations import CALLABLES, Activation, function_of, is_foreign
from flipproof.hardening.rewriting._calls import Call, Pattern, Watch
from flipproof.hardening.rewriting._tracing import (
    Replacement,
    Rewriting,
    Untraceable,
    activation_calls,
    restore_forward,
    rewrite_forward,
)
from flipproof.hardening.rewriting.layers import CHILD, Fenced, channel_axis, enclose, fence, unfence, why_not
from flipproof.hardening.rewriting.recurrent import Opened, can_be_opened, open_recurrent_
from flipproof.running.data import call
from flipproof.running.evaluation import eval_mode


@dataclass(frozen=True)
class ActivationSite:
    """One activation call, or the output of one layer, that can be bounded.

    Attributes:
        name: qualified name of the module it belongs to, then the call index: ``"layer1.0.relu:1"``.
        module: qualified name, in the hardened model, of the module that computes and bounds it.
        function: the activation, or the layer's class: ``"Conv2d"``.
        calls: how often it runs in one forward pass; more than once if a module that holds it is called several times.
    """

    name: str
    module: str
    function: str
    calls: int


@dataclass(frozen=True)
class Unreachable:
    """An activation that stays as it was.

    Attributes:
        name: where it is computed, e.g. ``"layer1.0 (relu)"``.
        reason: why it cannot be bounded, and what would help.
    """

    name: str
    reason: str


@dataclass
class Rewritten:
    """A copy of a model, which computes the same bits as the model.

    Attributes:
        model: the copy.
        sites: in the order in which they are executed.
        unreachable: activations that have no module of their own.
        originals: module → the one that it took the place of, for modules found as such.
    """

    model: nn.Module
    sites: list[ActivationSite]
    unreachable: list[Unreachable]
    originals: dict[str, nn.Module] = field(default_factory=dict)

    def swap(self, site: ActivationSite, module: nn.Module) -> None:
        """Put another module in a site's place."""
        parent, _, name = site.module.rpartition(".")
        self.model.get_submodule(parent)._modules[name] = module

    def layer_of(self, site: ActivationSite) -> nn.Module | None:
        """The layer whose output this site is; None for an activation."""
        name = site.module.rpartition(".")[0]
        parent = self.model.get_submodule(name)
        return parent if isinstance(parent, Fenced) and site.module == f"{name}.{CHILD}".lstrip(".") else None

    def open_layers(self, inputs: Any, leave: Collection[str] = ()) -> None:
        """Make the output of every convolution, linear and normalisation layer a site; one a layer, for all its calls.

        Layers that cannot be are listed as unreachable. What the copy computes stays as it is.

        Args:
            inputs: one batch, which shows the order of execution.
            leave: names of layers that are to stay as they are.
        """
        opened: list[ActivationSite] = []
        for name, layer in list(self.model.named_modules()):
            if channel_axis(layer) is None or name in leave:
                continue
            if (reason := why_not(layer)) is not None:
                self.unreachable.append(Unreachable(f"{name} ({type(layer).__name__})", reason))
                continue
            fence(layer)
            opened.append(ActivationSite(f"{name}:0", f"{name}.{CHILD}".lstrip("."), type(layer).__name__, 0))
        order: dict[str, int] = {}
        calls: Counter[str] = Counter()

        def note(name: str, module: nn.Module, result: Any) -> None:
            order.setdefault(name, len(order))
            calls[name] += 1

        sites = [*self.sites, *opened]
        places = {site.module: self.model.get_submodule(site.module) for site in sites}
        with hooked(places, note), eval_mode(self.model):
            call(self.model, inputs)
        opened = [replace(site, calls=calls[site.module]) for site in opened]
        # sites that this batch does not reach come last
        self.sites[:] = sorted([*self.sites, *opened], key=lambda site: order.get(site.module, len(order)))

    def dismiss(self, site: ActivationSite, reason: str) -> None:
        """Give a site up: what it replaced comes back, and it is listed as unreachable."""
        layer = self.layer_of(site)
        if layer is not None:
            unfence(layer)
        elif site.module in self.originals:
            self.swap(site, self.originals[site.module])
        self.sites.remove(site)
        self.unreachable.append(Unreachable(site.name, reason))


@dataclass
class _Edit:
    """Modules put into one owner, and possibly its forward rewritten."""

    owner: nn.Module
    children: dict[str, Activation]
    bases: dict[str, str]
    rewriting: Rewriting | None
    before: dict[str, Any] = field(default_factory=dict)
    graph: fx.Graph | None = None

    def apply(self) -> None:
        if isinstance(self.owner, fx.GraphModule):
            self.graph = deepcopy(self.owner.graph)
        self.before = {name: vars(self.owner)[name] for name in self.children if name in vars(self.owner)}
        for name, child in self.children.items():
            setattr(self.owner, name, child)
        if self.rewriting is not None:
            rewrite_forward(self.owner, self.rewriting)

    def undo(self) -> None:
        restore_forward(self.owner)
        if isinstance(self.owner, fx.GraphModule) and self.graph is not None:
            self.owner.graph = self.graph
        for name in self.children:
            self.owner._modules.pop(name, None)
        vars(self.owner).update(self.before)


def rewrite(model: nn.Module, inputs: Any, *, open_recurrent: bool = False) -> Rewritten:
    """Find every activation of a model and give each call a module of its own, in a copy.

    Activation modules are replaced wherever they are registered; Hugging Face's stay, and let their output through a
    child. Where one is called several times, or a function or
    tensor method is used, `torch.fx` rewrites the forward of the one module that makes these calls. The copy is run on
    `inputs` and must give the same bits as the model; a rewritten forward that does not is taken back.

    Args:
        model: stays untouched.
        inputs: one batch, as `call` takes it.
        open_recurrent: also open LSTM, GRU and RNN modules and their cells (`open_recurrent_`), so that each gate is a
            site. They then compute the same values up to rounding.

    Raises:
        ModelError: if no activation can be reached, or the model cannot be copied.
        DataError: if the model rejects the batch.

    Example:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc, self.act = nn.Linear(4, 4), nn.ReLU()
        ...     def forward(self, x):
        ...         return torch.relu(self.act(self.fc(self.act(x))))
        >>> [site.name for site in rewrite(Net(), torch.zeros(1, 4)).sites]
        ['act:0', 'act:1', 'relu:0']
    """
    copy = _copy(model)
    if open_recurrent:
        _open(copy, inputs)
    names: dict[nn.Module, str] = {}
    for name, module in copy.named_modules():
        names.setdefault(module, name)
    golden, seen = _watched(copy, inputs)
    slots = _slots(copy)
    reasons: dict[nn.Module, str] = {}
    edits = _plan(seen, slots, names, reasons)
    bases: dict[Activation, str] = {}
    originals: dict[Activation, nn.Module] = {}
    for module, places in slots.items():
        for parent, key in places:
            parent._modules[key] = new = Activation.of(module)
            originals[new] = module
            bases[new] = f"{names[parent]}.{key}".lstrip(".")
    for module, name in names.items():
        if is_foreign(module):
            bases[enclose(module)] = name
    _apply(copy, inputs, golden, edits, reasons)
    for edit in edits:
        bases |= {child: edit.bases[name] for name, child in edit.children.items()}
    after, again = _watched(copy, inputs)
    if not _same(golden, after):
        raise ModelError(
            "replacing this model's activation modules changes what it computes: one of them is more than the function "
            "it is named after, or the model looks at its modules' types"
        )
    rewritten = _collect(copy, again, bases, names, reasons)
    present = {module: name for name, module in copy.named_modules()}
    rewritten.originals = {present[new]: old for new, old in originals.items() if new in present}
    return rewritten


def refuse_what_hides_its_values(model: nn.Module) -> None:
    """Refuse, by name, models whose activations nobody can reach or whose values are no floats.

    Raises:
        ModelError: for TorchScript, exported programs, lazy modules, statically quantised modules, and weights that are
            packed in a tensor type of another library.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("the model is TorchScript, which hides its activations; harden the module that it was made of")
    if "eval" in vars(model):
        raise ModelError("the model is an exported program; harden the module that it was exported from")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        home, kind = type(module).__module__, f"{name or 'the model'} ({type(module).__name__})"
        if (
            ".quantized" in home
            and home.startswith(("torch.ao.nn", "torch.nn"))
            and ".dynamic" not in home
            and not type(module).__name__.endswith("PackedParams")
        ):
            raise ModelError(
                f"{kind} is quantised: integers pass there, which have no float bounds; harden the float model, then "
                f"quantise the hardened copy"
            )
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            place = f"{name}.{key}".lstrip(".")
            if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
                raise ModelError(f"{place} has no shape yet; run the model once before hardening it")
            if type(tensor) not in (Tensor, nn.Parameter):
                raise ModelError(
                    f"{place} is a {type(tensor).__module__}.{type(tensor).__qualname__}, whose stored form is its "
                    f"own; harden the model with plain tensors, then convert the hardened copy"
                )


def _copy(model: nn.Module) -> nn.Module:
    if function_of(model) is not None:
        raise ModelError(f"{type(model).__name__} is itself an activation; wrap it: torch.nn.Sequential(activation)")
    if any(isinstance(module, Activation) for module in model.modules()):
        raise ModelError("the model is hardened already; harden the original one")
    if type(model).__name__ == "OptimizedModule":
        raise ModelError("the model is compiled; harden model._orig_mod and compile the result")
    try:
        return deepcopy(model)
    except Exception as error:  # deepcopy runs code of the model's own
        raise ModelError(
            f"the model cannot be deep-copied ({type(error).__name__}: {error}); harden works on a copy of it"
        ) from error


def _open(copy: nn.Module, inputs: Any) -> None:
    closed, _ = _watched(copy, inputs)
    if not open_recurrent_(copy):
        return
    opened, _ = _watched(copy, inputs)
    for a, b in zip(pytree.tree_leaves(closed), pytree.tree_leaves(opened), strict=True):
        if isinstance(a, Tensor) and a.is_floating_point():
            room = 1e3 * torch.finfo(a.dtype).eps * max(1.0, float(a.detach().abs().max()) if a.numel() else 1.0)
            if not torch.allclose(a, b, rtol=0, atol=room, equal_nan=True):
                raise ModelError(
                    "opening this model's recurrent layers changes what it computes by more than rounding; is one of "
                    "them compiled or its forward replaced?"
                )


def _watched(model: nn.Module, inputs: Any) -> tuple[Any, Watch]:
    with eval_mode(model), Watch(model) as watch:
        try:
            return call(model, inputs), watch
        except ModelError:
            raise
        except Exception as error:
            raise DataError(f"the model rejects the calibration data: {type(error).__name__}: {error}") from error


Slots = dict[nn.Module, list[tuple[nn.Module, str]]]
"""Activation module → the places where it is registered, as (parent, name)."""


def _slots(model: nn.Module) -> Slots:
    slots: Slots = defaultdict(list)
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child is not None and function_of(child) is not None:
                slots[child].append((parent, key))
    return slots


def _plan(seen: Watch, slots: Slots, names: dict[nn.Module, str], reasons: dict[nn.Module, str]) -> list[_Edit]:
    """What to do about functions, methods, and modules called more often than they are registered."""
    uses: Counter[nn.Module] = Counter()
    for sequences in seen.calls.values():
        uses.update(c.module for c in sequences[0] if c.module is not None)
    edits: list[_Edit] = []
    claimed: set[nn.Module] = set()
    for owner, sequences in seen.calls.items():
        calls = sequences[0]
        repeated = {c.module for c in calls if c.module is not None and uses[c.module] > len(slots[c.module])}
        if not repeated and all(c.module is not None for c in calls):
            continue
        try:
            if any(other != calls for other in sequences):
                raise Untraceable("computes other activations from one call to the next")
            edits.append(_rewriting(owner, calls, seen.patterns[owner], repeated, claimed, names))
        except Untraceable as problem:
            reasons[owner] = str(problem)
            claimed |= {module for module in repeated if module is not None}
            edits += _attributes(owner, calls, names)
    return edits


def _rewriting(
    owner: nn.Module,
    calls: list[Call],
    patterns: list[Pattern | None],
    repeated: set[nn.Module],
    claimed: set[nn.Module],
    names: dict[nn.Module, str],
) -> _Edit:
    if isinstance(owner, torch.jit.ScriptModule):
        raise Untraceable("is TorchScript; harden the module that it was made of")
    if isinstance(owner, fx.GraphModule):
        pattern: Pattern | None = ()
    elif isinstance(owner, Opened):
        raise Untraceable("runs its gates once a step, under one bound for all steps")
    elif type(owner).__module__.startswith("torch.nn."):
        raise Untraceable(f"is {type(owner).__module__}.{type(owner).__name__}, whose forward belongs to PyTorch")
    elif len(patterns) > 1:
        raise Untraceable("is called in different ways")
    else:
        pattern = patterns[0]
    if pattern is None:
        raise Untraceable("is called with *args, **kwargs or objects")
    children: dict[str, Activation] = {}
    bases: dict[str, str] = {}
    replacements = []
    for found, made in zip(activation_calls(owner, pattern, calls), calls, strict=True):
        child: str | None = None
        if found.target is None:
            if found.inplace is None:
                raise Untraceable(f"decides at run time whether {found.function} works in place")
            child = _fresh(owner, f"bounded_{found.function}", children)
            function = "relu" if found.function == "relu" else "identity"
            children[child] = Activation(function, inplace=found.inplace)
            bases[child] = f"{names[owner]}.{found.function}".lstrip(".")
        elif made.module in repeated:
            if made.module in claimed:
                child = _fresh(owner, f"{found.target.replace('.', '_')}_again", children)
                children[child] = Activation.of(made.module)
                bases[child] = f"{names[owner]}.{found.target}".lstrip(".")
            claimed.add(made.module)
        if child is not None:
            children[child].training = owner.training
        replacements.append(Replacement(found.function, child))
    return _Edit(owner, children, bases, Rewriting(pattern, tuple(replacements)))


def _fresh(owner: nn.Module, wish: str, taken: dict[str, Activation]) -> str:
    name, number = wish, 1
    while hasattr(owner, name) or name in taken:
        number += 1
        name = f"{wish}_{number}"
    return name


def _attributes(owner: nn.Module, calls: list[Call], names: dict[nn.Module, str]) -> list[_Edit]:
    """Functions that a module keeps as attributes (`self.activation = F.relu`) can be replaced without a trace."""
    if isinstance(owner, torch.jit.ScriptModule):
        return []
    wanted = {c.function for c in calls if c.module is None}
    edits = []
    for name, value in list(vars(owner).items()):
        known: tuple[str, bool] | None = CALLABLES.get(value) if callable(value) else None
        if known is not None and known[0] in wanted:
            child = Activation(known[0], inplace=known[1])
            child.training = owner.training
            edits.append(_Edit(owner, {name: child}, {name: f"{names[owner]}.{name}".lstrip(".")}, None))
            if hasattr(owner, "activation_relu_or_gelu"):
                vars(owner)["activation_relu_or_gelu"] = (
                    0  # PyTorch's fused transformer layer would go around the attribute
                )
    return edits


def _apply(copy: nn.Module, inputs: Any, golden: Any, edits: list[_Edit], reasons: dict[nn.Module, str]) -> None:
    """Apply all edits that leave the outputs as they are; `edits` keeps those."""
    for edit in list(edits):
        try:
            edit.apply()
        except Untraceable as problem:
            edit.undo()
            edits.remove(edit)
            reasons[edit.owner] = str(problem)
    if _faithful(copy, inputs, golden):
        return
    for edit in edits:
        edit.undo()
    for edit in list(edits):
        edit.apply()
        if not _faithful(copy, inputs, golden):
            edit.undo()
            edits.remove(edit)
            reasons[edit.owner] = "computes something else once it is rewritten"


def _faithful(copy: nn.Module, inputs: Any, golden: Any) -> bool:
    try:
        return _same(golden, _watched(copy, inputs)[0])
    except (DataError, ModelError):
        return False


def _same(first: Any, second: Any) -> bool:
    left, right = pytree.tree_leaves(first), pytree.tree_leaves(second)
    return len(left) == len(right) and all(map(_equal, left, right))


def _equal(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return isinstance(a, Tensor) == isinstance(b, Tensor)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(bit_pattern(a), bit_pattern(b)) if a.is_floating_point() else torch.equal(a, b)


def _collect(
    copy: nn.Module,
    seen: Watch,
    bases: dict[Activation, str],
    names: dict[nn.Module, str],
    reasons: dict[nn.Module, str],
) -> Rewritten:
    """Sites in order of execution, and every activation that a run still computes outside of them."""
    present = {module: name for name, module in copy.named_modules()}
    executed: Counter[Activation] = Counter()
    unreachable: list[Unreachable] = []
    for owner, sequences in seen.calls.items():
        for sequence in sequences:
            for i, made in enumerate(sequence):
                if isinstance(made.module, Activation):
                    executed[made.module] += 1
                    continue
                follower = sequence[i + 1].module if i + 1 < len(sequence) else None
                if isinstance(follower, Activation) and follower.function == "identity" and made.module is None:
                    continue
                entry = Unreachable(
                    f"{names.get(owner) or type(owner).__name__} ({made.function})",
                    reasons.get(owner, "is called through a reference that is no registered child module"),
                )
                if entry not in unreachable:
                    unreachable.append(entry)
    for module in seen.recurrent:
        kind = type(module).__name__
        way = ""
        if can_be_opened(module):
            way = "; fp.AVC() opens it"
        elif not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            way = "; harden the floating-point model, whose gates fp.AVC() opens"
        unreachable.append(
            Unreachable(f"{names[module]} ({kind})", f"{kind} computes its gates in one kernel, which hides them{way}")
        )
    for name, module in copy.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            unreachable.append(Unreachable(name or "model", "is TorchScript, which hides its activations"))
    numbers: Counter[str] = Counter()
    sites = []
    order: dict[nn.Module, int] = {}
    for called in seen.order:
        order.setdefault(called, len(order))
    for activation in sorted(bases, key=lambda a: order.get(a, len(order))):
        if activation in present:
            base = bases[activation]
            sites.append(
                ActivationSite(
                    f"{base}:{numbers[base]}", present[activation], activation.function, executed[activation]
                )
            )
            numbers[base] += 1
    if not sites:
        if not unreachable:
            raise ModelError(
                "no activation of this model can be bounded: it computes none; protect what it stores: fp.protect"
            )
        listed = "; ".join(f"{entry.name}: {entry.reason}" for entry in unreachable)
        raise ModelError(f"no activation of this model can be bounded: {listed}")
    return Rewritten(copy, sites, unreachable)
