"""Models whose parameters really live as packed words (Nazari et al. 2024), bit by bit as they are simulated."""

from __future__ import annotations

import warnings
from copy import deepcopy

import torch
from torch import nn
from torch.nn.utils import parametrize

from flipproof._interrupts import held
from flipproof.errors import FlipproofWarning, FormatError
from flipproof.formats.base import Format
from flipproof.formats.packing import Packed
from flipproof.running.data import Data, Output
from flipproof.running.tasks.base import Task
from flipproof.running.ways import DEPLOYMENT, OPERATIONS, SAMPLES, Few
from flipproof.spaces.sites import Parameters, check_where
from flipproof.spaces.tensors import FormatChoice, asked_format, check_format, check_hit, inventory


def pack_(
    model: nn.Module,
    format: FormatChoice,
    *,
    where: Parameters | None = None,
    check: Data | None = None,
    output: Output = None,
    task: Task | None = None,
) -> nn.Module:
    """Turn a model, in place, into one whose parameters are bit-packed words in memory, decoded at every use.

    A parameter of n values becomes a uint8 buffer of ⌈n · width / 8⌉ bytes, ``{name}`` →
    ``{module}.parametrizations.{name}.original0``, with the format's constants behind it: 5 bits a weight for
    ``TripleMSB(Affine(bits=3))``, not 8. It moves with ``.to(device)``, copies, and is saved in the `state_dict`, like
    any buffer. `assess` and `FaultSpace` hit the packed bytes themselves then, with the same bits under the same
    numbers as in the simulated path, and the same outputs. ``with torch.nn.utils.parametrize.cached():`` decodes once
    for several forwards. Such a model is for inference: words have no gradient.

    Args:
        model: any module.
        format: as in `assess`: one Format (quantising ones store the weights of layers) or a mapping {pattern: Format}
            of names. A parameter that it does not name stays as it is, in its own type.
        where: which parameters, all by default; buffers are never packed.
        check: batches `(inputs, targets)` to end with `check_deployment` on, beside the model as it was before, of
            which a copy is kept meanwhile. It warns if answers differ by more than rounding;
            ``fp.check_deployment(model)`` gives what was found.
        output: picks the tensor to compare then, as for `assess`.
        task: what the model is for, as for `assess`.

    Returns:
        The model itself.

    Raises:
        FormatError: naming tied parameters (their memory could not stay one), or values that the format cannot hold.
            Nothing is changed then.

    Example:
        >>> import flipproof as fp, torch
        >>> net = torch.nn.Linear(64, 32)
        >>> net = fp.pack_(net, fp.TripleMSB(fp.Affine(bits=3)))
        >>> net.parametrizations.weight.original0.numel(), 64 * 32 * 5 // 8
        (1280, 1280)
        >>> net(torch.zeros(1, 64)).shape
        torch.Size([1, 32])
    """
    where = check_where(where)
    check_format(format)
    parameters = [candidate for candidate in inventory(model) if not candidate.is_buffer]
    for candidate in parameters:
        if candidate.packed is not None:
            raise FormatError(f"{candidate.name} is stored as {candidate.packed.format!r} already")
    selected = [candidate for candidate in parameters if not where.leaves_out(candidate)]
    check_hit(selected)
    chosen: list[tuple[str, Format]] = []
    for candidate in selected:
        found = asked_format(candidate, format)
        if found is None:
            continue
        if candidate.held:
            raise FormatError(
                f"{candidate.name} is part of {candidate.held}, which a library reads by itself and would not decode. "
                f"Leave it out with where=fp.Parameters(exclude={candidate.name!r}), or measure {found!r} around it "
                f"with fp.assess(…, format={{{candidate.name!r}: …}})"
            )
        if len(candidate.names) > 1:
            raise FormatError(
                f"{' and '.join(candidate.names)} are one tied parameter; packed words cannot be shared between "
                f"modules. Leave it out with where=fp.Parameters(exclude={candidate.name!r})"
            )
        try:
            found.encode(candidate.tensor)
        except FormatError as error:
            raise FormatError(f"{candidate.name}: {error}") from None
        chosen.append((candidate.name, found))
    if not chosen:
        raise FormatError(f"pack_: no parameter of this {type(model).__name__} is stored by {format!r}")
    few = None if check is None else Few.of(model, check, SAMPLES, output, task)
    plain = None if check is None else deepcopy(model)
    with held():
        for name, found in chosen:
            owner, _, attribute = name.rpartition(".")
            _store(model.get_submodule(owner), attribute, found)
        vars(model).pop(DEPLOYMENT, None)  # it is another model now
    if few is None:
        return model
    deployment = vars(model)[DEPLOYMENT] = few.compared(model, plain, operations=OPERATIONS)
    if not deployment.agrees:
        warnings.warn(
            f"the packed model answers otherwise where it is deployed. {deployment}", FlipproofWarning, stacklevel=2
        )
    return model


@torch.no_grad()
def unpack_(model: nn.Module) -> nn.Module:
    """Turn a packed model, in place, into one with plain parameters: decoded once, where `pack_` decodes at every use.

    Every parameter holds what its words are read as now, repaired on the way, and is trained or not as it was before
    `pack_`. Names in the `state_dict` and the order of the parameters are those from before `pack_`. So a model is
    kept and loaded as words and computes as a float model: ``fp.unpack_(fp.pack_(model, format))`` with
    ``load_state_dict`` in between. What happens to memory afterwards happens to floats, which nothing repairs.

    Args:
        model: any module; parameters that are not packed stay as they are.

    Returns:
        The model itself.

    Raises:
        FormatError: if no parameter is packed.

    Example:
        >>> import flipproof as fp, torch
        >>> net = fp.pack_(torch.nn.Linear(4, 3), fp.SECDED(fp.Float16()))
        >>> space, before = fp.FaultSpace(net), net.weight
        >>> with space.corrupted(space.faults([("weight", 0, 14)])):
        ...     net = fp.unpack_(net)
        >>> type(net).__name__, torch.equal(net.weight, before), list(net.state_dict())
        ('Linear', True, ['weight', 'bias'])
    """
    found = [
        (module, name, decoder[0])
        for module in model.modules()
        if parametrize.is_parametrized(module)
        for name, decoder in module.parametrizations.items()  # type: ignore[union-attr, operator]
        if len(decoder) == 1 and isinstance(decoder[0], Packed)
    ]
    if not found:
        raise FormatError(f"unpack_: no parameter of this {type(model).__name__} is packed (pack_)")
    decoded = [module.parametrizations[name]() for module, name, _ in found]  # type: ignore[index, operator]
    with held():
        for (module, name, packed), values in zip(found, decoded, strict=True):
            # a looked-up table or a view of the words is no memory for a parameter to keep
            _restore(module, name, nn.Parameter(values.clone(), requires_grad=packed.trained))
        vars(model).pop(DEPLOYMENT, None)
    return model


def packed_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, packed words and their constants included.

    Example:
        >>> import flipproof as fp, torch
        >>> packed_bytes(torch.nn.Linear(64, 32)), packed_bytes(fp.pack_(torch.nn.Linear(64, 32), fp.Affine(bits=4)))
        (8320, 1184)
    """
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _store(module: nn.Module, name: str, format: Format) -> None:
    # fault spaces number bits in the order of the parameters, whichever of them are packed
    module.__dict__.setdefault("_stored_order", tuple(module._parameters))
    values = module._parameters.pop(name)
    assert values is not None
    module.register_buffer(name, values.detach())  # words cannot be parameters: they have no gradient
    parametrize.register_parametrization(module, name, Packed(format, values))
    if isinstance(module, nn.RNNBase) and not any(hook is _decode for hook in module._forward_pre_hooks.values()):
        module.register_forward_pre_hook(_decode)
        module.register_forward_hook(_forget)


def _restore(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """The inverse of `_store`."""
    shared = type(module)  # by deep copies too, which keep the property that torch takes out of the class
    module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
    parametrize.remove_parametrizations(
        module, name
    )  # leaves the decoded values as a buffer, for words have no gradient
    del module._buffers[name]
    module._parameters[name] = parameter
    order = module.__dict__["_stored_order"]
    for attribute in [a for a in order if a in module._parameters] + [a for a in module._parameters if a not in order]:
        module._parameters[attribute] = module._parameters.pop(attribute)
    if parametrize.is_parametrized(module):
        return
    del module.__dict__["_stored_order"]
    if isinstance(module, nn.RNNBase):
        for hooks, own in ((module._forward_pre_hooks, _decode), (module._forward_hooks, _forget)):
            for key in [key for key, hook in hooks.items() if hook is own]:
                del hooks[key]
        module._init_flat_weights()


def _decode(module: nn.Module, args: object) -> None:
    """Decode the weights of a recurrent layer, whose forward reads a list that it keeps."""
    assert isinstance(module, nn.RNNBase)
    module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]


def _forget(module: nn.Module, args: object, result: object) -> None:
    assert isinstance(module, nn.RNNBase)
    module._flat_weights = []
