"""Every method keeps the contract of `flipproof.testing`."""

from __future__ import annotations

import flipproof as fp
from flipproof.testing import HardeningContract


class TestRangerLayer(HardeningContract):
    method = fp.Ranger()


class TestRangerNeuronZero(HardeningContract):
    method = fp.Ranger(per="neuron", replace="zero")


class TestFTClipAct(HardeningContract):
    method = fp.FTClipAct(points=2, rounds=1, trials=1, bers=(1e-3,))


class TestFitAct(HardeningContract):
    method = fp.FitAct(epochs=2, held_out=0.5)


class TestProAct(HardeningContract):
    method = fp.ProAct(epochs=1, epochs_last=2, held_out=0.5)


class TestProActSearched(HardeningContract):
    method = fp.ProAct(search="line", held_out=0.5, budget=0.5)


class TestFitActSearchedByChannel(HardeningContract):
    method = fp.FitAct(search="line", per="channel", held_out=0.5, budget=0.5)


class TestGuard(HardeningContract):
    method = fp.Guard()


class TestGuardNeuronSaturating(HardeningContract):
    method = fp.Guard(per="neuron", replace="bound", outputs=False)


class TestFence(HardeningContract):
    method = fp.Fence()


class TestFenceLayerClamping(HardeningContract):
    method = fp.Fence(per="layer", replace="bound", outputs=False)
