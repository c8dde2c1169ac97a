"""Models whose parameters really live as packed words (Nazari et al. 2024), bit by bit as they are simulated."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from flipproof._interrupts import held
from flipproof.errors import FormatError
from flipproof.formats.base import Format
from flipproof.formats.packing import Packed
from flipproof.spaces.sites import Parameters, check_where
from flipproof.spaces.tensors import FormatChoice, asked_format, check_format, check_hit, inventory


def pack_(model: nn.Module, format: FormatChoice, *, where: Parameters | None = None) -> nn.Module:
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
    with held():
        for name, found in chosen:
            owner, _, attribute = name.rpartition(".")
            _store(model.get_submodule(owner), attribute, found)
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


def _decode(module: nn.Module, args: object) -> None:
    """Decode the weights of a recurrent layer, whose forward reads a list that it keeps."""
    assert isinstance(module, nn.RNNBase)
    module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]


def _forget(module: nn.Module, args: object, result: object) -> None:
    assert isinstance(module, nn.RNNBase)
    module._flat_weights = []
