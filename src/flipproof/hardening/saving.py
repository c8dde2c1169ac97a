"""A hardened model as a file: safetensors, with what has to be rebuilt in its metadata. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from flipproof.errors import ConfigError, ModelError
from flipproof.hardening.acceptance import Acceptance
from flipproof.hardening.base import put_bound
from flipproof.hardening.bounded import Bounded, ClampInput, Saturate, Smooth, ZeroAbove
from flipproof.hardening.example import flat, inputs_like
from flipproof.hardening.guard import GuardedLinear, put_guard
from flipproof.hardening.recurrent import Opened
from flipproof.hardening.report import REPORT, HardeningReport, hardening_report
from flipproof.hardening.rewriting import Rewritten, Site, Unreachable, rewrite

KINDS: dict[str, type[Bounded]] = {kind.__name__: kind for kind in (Saturate, ZeroAbove, Smooth, ClampInput)}


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
        more = {"slope": bound.slope} if isinstance(bound, Smooth) else {}
        sites.append({**vars(site), "kind": type(bound).__name__, "more": more})
    about = {
        "method": report.method,
        "sites": sites,
        "unreachable": [vars(entry) for entry in report.unreachable],
        "notes": report.notes,
        "parameters": report.parameters,
        "thresholds": report.thresholds,
        "clean_drop": report.clean_drop,
        "judged": None if report.judged is None else vars(report.judged),
        "slack": report.slack,
        "seconds": report.seconds,
        "forwards": report.forwards,
        "opened": any(isinstance(module, Opened) for module in hardened.modules()),
        "guarded": [name for name, module in hardened.named_modules() if isinstance(module, GuardedLinear)],
        "example": pytree.treespec_dumps(flat(report.example)[1]),
        "leaves": [[list(shape), str(dtype)] for shape, dtype in flat(report.example)[0]],
    }
    state = {name: value.detach().cpu().contiguous().clone() for name, value in hardened.state_dict().items()}
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        save_file(state, temporary, {"flipproof_hardened": json.dumps(about)})
        temporary.replace(target)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
    return target


def load_hardened(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """The hardened copy that `save_hardened` wrote, rebuilt around a model of the same structure.

    The weights come from the file; `model` gives the code, and stays untouched.

    Args:
        model: the original network, with any weights.
        path: of the file.

    Raises:
        ConfigError: if the file cannot be read or was not written by `save_hardened`.
        ModelError: if the model is another one than was hardened.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["flipproof_hardened"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} is not a hardened model that flipproof wrote ({error})") from error
    example = pytree.tree_unflatten(
        [(tuple(shape), getattr(torch, dtype.removeprefix("torch."))) for shape, dtype in about["leaves"]],
        pytree.treespec_loads(about["example"]),
    )
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    rewritten = rewrite(model, inputs_like(example, device), open_recurrent=bool(about.get("opened")))
    _rebuild(rewritten, about, state, path)
    missing, unexpected = rewritten.model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ModelError(
            f"{path} holds another network than this {type(model).__name__}: missing {missing[:5]}, "
            f"unexpected {unexpected[:5]}"
        )
    report = HardeningReport(
        method=about["method"],
        sites=tuple(
            Site(**{key: entry[key] for key in ("name", "module", "function", "calls")}) for entry in about["sites"]
        ),
        unreachable=tuple(Unreachable(**entry) for entry in about["unreachable"]),
        notes=tuple(about["notes"]),
        parameters=about["parameters"],
        thresholds=about["thresholds"],
        history=pd.DataFrame(),
        clean_drop=about["clean_drop"],
        seconds=about["seconds"],
        forwards=about["forwards"],
        example=example,
        judged=Acceptance(**about["judged"]) if about.get("judged") else None,
        slack=about.get("slack"),
    )
    vars(rewritten.model)[REPORT] = report
    return rewritten.model


def _rebuild(rewritten: Rewritten, about: dict[str, Any], state: dict[str, Tensor], path: object) -> None:
    sites = {site.name: site for site in rewritten.sites}
    saved = {entry["name"]: entry for entry in about["sites"]}
    if absent := [name for name in saved if name not in sites or sites[name].module != saved[name]["module"]]:
        raise ModelError(f"{path} bounds {absent[:5]}, which this {type(rewritten.model).__name__} does not have")
    for name, site in sites.items():
        if name not in saved:
            rewritten.dismiss(site, "was not bounded when the model was saved")
            continue
        entry = saved[name]
        high, low = (state.get(f"{site.module}.{which}") for which in ("threshold", "low"))
        if high is None:
            raise ModelError(f"{path} holds no threshold for {name}")
        device = next((p.device for p in rewritten.model.parameters()), high.device)
        low = None if low is None else low.to(device)
        put_bound(rewritten, site, KINDS[entry["kind"]], high.to(device), low, **entry["more"])
    for name in about["guarded"]:
        plain = dict(rewritten.model.named_modules()).get(name)
        if type(plain) is not nn.Linear:
            raise ModelError(f"{path} guards the outputs of {name}, which is no linear layer of this model")
        values = (state[f"{name}.{which}"].to(plain.weight.device) for which in ("threshold", "rest"))
        put_guard(rewritten.model, name, *values)
