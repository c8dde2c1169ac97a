"""A process that has everything imported and forks one campaign for each line it reads: real processes to kill.

Input: one JSON object a line (journal, workers, trials, sleep, limit, every). Output: the process id of each campaign
as it starts, and `<pid> <exit status>` when it ends. A campaign leads a process group of its own.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
import traceback

import torch
from torch import nn

import flipproof as fp
from flipproof.engine import journal

SETUP = {"faults": fp.BitErrorRate([1e-3, 1e-2]), "seed": 7}


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def samples() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(2)
    return [(torch.randn(20, 4), torch.arange(20) % 3)]


class Slow:
    """Accuracy, with a pause so that there is time to kill it.

    How long is no part of the metric: with an attribute it would be another one, and another campaign.
    """

    __name__ = "slow_accuracy"

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> float:
        time.sleep(float(os.environ["SLOW_ACCURACY"]))
        return float((outputs.argmax(dim=1) == targets).double().mean())


def campaign(journal: str | None, workers: int = 1, trials: int = 20, sleep: float = 0.0) -> fp.Assessment:
    os.environ["SLOW_ACCURACY"] = str(sleep)
    return fp.assess(
        network(), data=samples(), metrics=Slow(), journal=journal, workers=workers, trials=trials, **SETUP
    )


def child(limit: int | None, every: float, **wanted: object) -> int:
    os.setpgid(0, 0)
    journal.EVERY = every
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        campaign(**wanted)  # type: ignore[arg-type]
    except KeyboardInterrupt:
        return 130
    except fp.FlipproofError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 3
    except BaseException:
        traceback.print_exc()
        return 4
    return 0


def main() -> None:
    for line in sys.stdin:
        wanted = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(child(**{"limit": None, "every": 0.0, **wanted}))
        os.setpgid(pid, pid)
        print(pid, flush=True)
        threading.Thread(target=reap, args=(pid,), daemon=True).start()


def reap(pid: int) -> None:
    print(pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
