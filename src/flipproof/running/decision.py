"""How a model's outputs become classes: what the user says, or what the outputs and the network itself tell."""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from flipproof.errors import FlipproofWarning
from flipproof.running.data import Batches, Output, call, pick
from flipproof.running.outcomes import Decision, DecisionChoice, Sources


def decide(
    model: nn.Module, batches: Batches, output: Output, golden: Tensor, choice: DecisionChoice = None
) -> Decision:
    """The decision rule, with a warning where it had to be assumed.

    Outputs in [0, 1] may be probabilities (class 1 above 0.5) or logits that happen to lie there (class 1 above 0).
    If nobody says, one batch is run again: what a sigmoid or softmax gave are probabilities, and that is all. What a
    linear layer gave is taken for logits, anything else for probabilities; both are warned about, but for logits of
    several classes, whose largest wins in either case.

    Args:
        model: fault-free, in eval mode.
        batches: what it was run on.
        output: picks the tensor to judge.
        golden: fault-free outputs.
        choice: what the user says.

    Raises:
        DataError: if the outputs have no shape that can be judged, or contradict `choice`.
    """
    decision = Decision.from_golden(golden, choice)
    if not decision.assumed:
        return decision
    with Sources() as sources:
        judged = pick(call(model, batches.inputs[0]), output)
    decision = decision.settled(sources.of(judged))
    if decision.assumed:
        low, high = float(golden.min()), float(golden.max())
        other = "logits" if decision.outputs == "probabilities" else "probabilities"
        warnings.warn(
            f"all fault-free outputs lie in [{low:.4g}, {high:.4g}] and could be probabilities or logits; they are "
            f"read as {decision.describe()}. Say which: decision={decision.outputs!r} for this reading, "
            f"decision={other!r} for the other"
            + (", or a number as the threshold" if decision.threshold is not None else ""),
            FlipproofWarning,
            stacklevel=3,
        )
    return decision
