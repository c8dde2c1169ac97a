"""A hardened model as a file: safetensors, with what has to be rebuilt in its metadata. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flipproof._fields import HINT, Fields, read_json, wrong
from flipproof._files import replacing
from flipproof._tensors import load_state
from flipproof.errors import ConfigError, ModelError
from flipproof.hardening import bounds
from flipproof.hardening._example_inputs import from_plain, inputs_like, to_plain
from flipproof.hardening.bounds import Bounded
from flipproof.hardening.fitting.acceptance import Acceptance
from flipproof.hardening.fitting.work import put_bound
from flipproof.hardening.methods.guard import GuardedLinear, put_guard
from flipproof.hardening.report import REPORT, HardeningReport, hardening_report
from flipproof.hardening.rewriting.layers import Fenced, channel_axis
from flipproof.hardening.rewriting.recurrent import Opened
from flipproof.hardening.rewriting.sites import ActivationSite, Rewritten, Unreachable, rewrite
from flipproof.running.data import call
from flipproof.running.deployment import Deployment
from flipproof.running.device import device_of
from flipproof.running.evaluation import eval_mode
from flipproof.running.ways import DEPLOYMENT

VERSION = 4
"""Of the format: counts up whenever what is written changes. A file of another version is refused."""

KINDS: dict[str, type[Bounded]] = {name: getattr(bounds, name) for name in bounds.__all__ if name != "Bounded"}
"""What can be saved: all kinds that `bounds` exports."""


def save_hardened(hardened: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write a hardened model's weights and bounds to one safetensors file, whole or not at all.

    Args:
        hardened: what `harden` made.
        path: of the file; its folder is made.

    Raises:
        ModelError: if the model was not made by `harden`, holds bounds of a kind of your own, or its inputs are more
            than tensors, so that it could not be rebuilt.

    Example:
        >>> import flipproof as fp, tempfile, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> safe = fp.harden(net, fp.Ranger(), data=[(torch.randn(16, 4), torch.randint(3, (16,)))])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = fp.load_hardened(net, fp.save_hardened(safe, f"{folder}/safe.safetensors"))
        >>> torch.equal(again(torch.ones(1, 4)), safe(torch.ones(1, 4)))
        True
    """
    report = hardening_report(hardened)
    if report.example is None:
        raise ModelError("this model takes inputs that are more than tensors; a file cannot say how to rebuild it")
    sites = []
    for site in report.sites:
        bound = hardened.get_submodule(site.module)
        if type(bound).__name__ not in KINDS or not isinstance(bound, Bounded):
            raise ModelError(f"{site.name} is bounded by a {type(bound).__name__}; only {list(KINDS)} can be saved")
        more = {name: float(getattr(bound, name)) for name in bound.constants}
        sites.append({**vars(site), "kind": type(bound).__name__, "more": more})
    about = {
        "version": VERSION,
        "method": report.method,
        "sites": sites,
        "unreachable": [vars(entry) for entry in report.unreachable],
        "notes": report.notes,
        "parameters": report.parameters,
        "thresholds": report.thresholds,
        "clean_drop": report.clean_drop,
        "judged": None if report.judged is None else vars(report.judged),
        "slack": report.slack,
        "deployment": None if report.deployment is None else report.deployment.to_json(),
        "seconds": report.seconds,
        "forwards": report.forwards,
        "opened": any(isinstance(module, Opened) for module in hardened.modules()),
        "fenced": [name for name, module in hardened.named_modules() if isinstance(module, Fenced)],
        "guarded": [name for name, module in hardened.named_modules() if isinstance(module, GuardedLinear)],
        "example": to_plain(report.example),
    }
    stored = hardened.state_dict()
    if other := [name for name, value in stored.items() if not isinstance(value, Tensor)]:
        raise ModelError(
            f"{other[0]} of this model's state_dict is a {type(stored[other[0]]).__name__}; files hold tensors"
        )
    state = {name: value.detach().cpu().contiguous().clone() for name, value in stored.items()}
    with replacing(path) as temporary:
        save_file(state, temporary, {"flipproof_hardened": json.dumps(about)})
    return Path(path)


def load_hardened(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """The hardened copy that `save_hardened` wrote, rebuilt around a model of the same structure.

    The weights come from the file; `model` gives the code, and stays untouched. The file may come from anybody: it is
    read as numbers and texts, each checked, and nothing that it names is imported or run.

    Args:
        model: the original network, with any weights.
        path: of the file.

    Raises:
        ConfigError: if the file cannot be read or was not written by `save_hardened`.
        ModelError: if the model is another one than was hardened.
    """
    about, state = _read(path)
    inputs = inputs_like(about.example, device_of(model))
    rewritten = rewrite(model, inputs, open_recurrent=about.opened)
    _fence(rewritten, about, inputs, path)
    _rebuild(rewritten, about, state, path)
    _check_state(rewritten.model, state, path)
    load_state(rewritten.model, state)
    _check_bounds(rewritten, inputs, path)
    report = HardeningReport(
        method=about.method,
        sites=tuple(site for site, _, _ in about.sites),
        unreachable=about.unreachable,
        notes=about.notes,
        parameters=about.parameters,
        thresholds=about.thresholds,
        history=pd.DataFrame(),
        clean_drop=about.clean_drop,
        seconds=about.seconds,
        forwards=about.forwards,
        example=about.example,
        judged=about.judged,
        slack=about.slack,
        deployment=about.deployment,
    )
    vars(rewritten.model)[REPORT] = report
    if about.deployment is not None:
        vars(rewritten.model)[DEPLOYMENT] = about.deployment
    return rewritten.model


@dataclass(frozen=True)
class _About:
    """What the file says beside its tensors: the fields of `HardeningReport`, and how to rebuild the bounds.

    A new field is one entry here, one in `save_hardened` and one in `_about`; `VERSION` then counts up.
    """

    method: str
    sites: tuple[tuple[ActivationSite, str, dict[str, float]], ...]
    unreachable: tuple[Unreachable, ...]
    notes: tuple[str, ...]
    parameters: int
    thresholds: int
    clean_drop: float
    seconds: float
    forwards: float
    opened: bool
    fenced: tuple[str, ...]
    guarded: tuple[str, ...]
    example: Any
    judged: Acceptance | None
    slack: float | None
    deployment: Deployment | None


def _read(path: str | os.PathLike[str]) -> tuple[_About, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {})["flipproof_hardened"]
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a hardened model that flipproof wrote ({error})") from error
    fields = Fields(read_json(text, str(path)), str(path))
    if fields.whole("version") != VERSION:
        raise ConfigError(
            f"{path}: expected version {VERSION} of the format, got {fields.whole('version')}; save the model again"
        )
    about = _about(fields)
    fields.end()
    return about, state


def _about(fields: Fields) -> _About:
    return _About(
        method=fields.text("method"),
        sites=fields.each("sites", _site),
        unreachable=fields.each("unreachable", lambda each: Unreachable(each.text("name"), each.text("reason"))),
        notes=fields.texts("notes"),
        parameters=fields.whole("parameters"),
        thresholds=fields.whole("thresholds"),
        clean_drop=fields.number("clean_drop"),
        seconds=fields.number("seconds"),
        forwards=fields.number("forwards"),
        opened=fields.flag("opened"),
        fenced=fields.texts("fenced"),
        guarded=fields.texts("guarded"),
        example=from_plain(fields.take("example"), fields.at("example")),
        judged=None if fields.take("judged") is None else _judged(fields.inside("judged")),
        slack=None if fields.take("slack") is None else fields.number("slack"),
        deployment=None if fields.take("deployment") is None else Deployment.from_json(fields.inside("deployment")),
    )


def _judged(fields: Fields) -> Acceptance:
    counts = {name: fields.whole(name) for name in ("samples", "right", "lost", "won", "changed", "disturbed")}
    found = Acceptance(**counts, drop=fields.number("drop"), low=fields.number("low"), high=fields.number("high"))
    fields.end()
    return found


def _site(fields: Fields) -> tuple[ActivationSite, str, dict[str, float]]:
    """The site, the kind of its bound, and what else that kind takes."""
    site = ActivationSite(fields.text("name"), fields.text("module"), fields.text("function"), fields.whole("calls"))
    kind = fields.text("kind", among=KINDS)
    more = fields.inside("more")
    options = {name: more.number(name) for name in KINDS[kind].constants}
    for name, value in options.items():
        if not 0 < value < float("inf"):
            raise wrong(more.at(name), "a number above 0", value)
    more.end()
    return site, kind, options


def _fence(rewritten: Rewritten, about: _About, inputs: Any, path: object) -> None:
    """Make the outputs of the layers that the file names sites."""
    layers = {name for name, module in rewritten.model.named_modules() if channel_axis(module) is not None}
    if other := [name for name in about.fenced if name not in layers]:
        raise ModelError(
            f"{path} fences the outputs of {other[:5]}, no layers of this {type(rewritten.model).__name__}"
        )
    if about.fenced:
        rewritten.open_layers(inputs, layers.difference(about.fenced))


def _rebuild(rewritten: Rewritten, about: _About, state: dict[str, Tensor], path: object) -> None:
    network = type(rewritten.model).__name__
    device = device_of(rewritten.model)
    sites = {site.name: site for site in rewritten.sites}
    saved = {site.name: (site, kind, more) for site, kind, more in about.sites}
    if len(saved) != len(about.sites):
        raise ConfigError(f"{path}: expected each activation once, got one twice; {HINT}")
    identity = {name: (site.module, site.function) for name, site in sites.items()}
    if absent := [name for name, (site, _, _) in saved.items() if identity.get(name) != (site.module, site.function)]:
        raise ModelError(f"{path} bounds {absent[:5]}, which this {network} does not have")

    def bound_of(name: str) -> Tensor | None:
        found = state.get(name)
        if found is not None and not found.is_floating_point():
            raise wrong(f"{path}, {name}", "floating-point numbers", found.dtype)
        return None if found is None else found.to(device)

    for name, site in sites.items():
        if name not in saved:
            rewritten.dismiss(site, "was not bounded when the model was saved")
            continue
        _, kind, more = saved[name]
        high, low = (bound_of(f"{site.module}.{which}") for which in ("threshold", "low"))
        if high is None:
            raise ModelError(f"{path} holds no threshold for {name}")
        put_bound(rewritten, site, KINDS[kind], high, low, **more)
    modules = dict(rewritten.model.named_modules())
    for name in about.guarded:
        plain = modules.pop(name, None)  # a name that comes twice is not found again
        if type(plain) is not nn.Linear:
            raise ModelError(f"{path} guards the outputs of {name!r}, which is no linear layer of this {network}")
        high, rest = (bound_of(f"{name}.{which}") for which in ("threshold", "rest"))
        if high is None or rest is None or high.shape != (plain.out_features,) or rest.shape != ():
            raise ModelError(f"{path} holds no threshold a class and one resting score for the outputs of {name!r}")
        put_guard(rewritten.model, name, high, rest)


def _check_state(model: nn.Module, state: dict[str, Tensor], path: object) -> None:
    """Refuse tensors of other names, shapes or types than the model's: nothing is converted silently."""
    now = model.state_dict()
    network = type(model).__name__
    missing, unexpected = sorted(now.keys() - state.keys()), sorted(state.keys() - now.keys())
    if missing or unexpected:
        raise ModelError(
            f"{path} holds another network than this {network}: missing {missing[:5]}, unexpected {unexpected[:5]}"
        )
    for name, value in now.items():
        if not isinstance(value, Tensor):
            raise ModelError(f"{name} in this {network}'s state_dict is a {type(value).__name__}; {path} holds tensors")
        if (value.shape, value.dtype) != (state[name].shape, state[name].dtype):
            raise ModelError(
                f"{path} holds another network than this {network}: {name} is {state[name].dtype} "
                f"{tuple(state[name].shape)} in the file and {value.dtype} {tuple(value.shape)} in the model"
            )


def _check_bounds(rewritten: Rewritten, inputs: Any, path: object) -> None:
    """Run the model once: every bound must fit the values it bounds, and not spread them to another shape or type."""
    network = type(rewritten.model).__name__

    def check(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, Bounded)
        for bound in (module.threshold, module.low):
            if bound is not None and not _fits(bound, args[0]):
                raise ModelError(
                    f"{path}: the bound of {names[module]} is {bound.dtype} {tuple(bound.shape)}, which does not fit "
                    f"the {args[0].dtype} {tuple(args[0].shape)} that this {network} computes there"
                )

    names = {rewritten.model.get_submodule(site.module): site.name for site in rewritten.sites}
    handles = [module.register_forward_pre_hook(check) for module in names]
    try:
        with eval_mode(rewritten.model):
            call(rewritten.model, inputs)
    except ModelError:
        raise
    except Exception as error:  # whatever the network raises on weights that were never its own
        raise ModelError(
            f"{path}: this {network} cannot run with what the file holds: {type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def _fits(bound: Tensor, x: Tensor) -> bool:
    try:
        shape = torch.broadcast_shapes(bound.shape, x.shape)  # type: ignore[no-untyped-call]
    except RuntimeError:
        return False
    return shape == x.shape and torch.result_type(bound, x) == x.dtype
