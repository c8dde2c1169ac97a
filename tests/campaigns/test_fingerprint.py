"""Rule 6: resuming anything else refuses, field by field."""

from __future__ import annotations

import importlib
import subprocess
import sys
from argparse import Namespace
from functools import lru_cache, partial, partialmethod

import pytest
import torch
from torch import Tensor, nn

import flipproof as fp
from flipproof.campaigns.fingerprint import attributes_digest, code_digest, digest_of
from flipproof.errors import ConfigError, JournalMismatch

DATA = [(torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3)]


class Net(nn.Module):
    def __init__(self, high: float = 50.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.high = nn.Linear(4, 3), high

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).clamp(max=self.high)


def changed_forward(self: Net, x: Tensor) -> Tensor:
    return self.a(x).clamp(min=-50, max=self.high)


def run(tmp_path, model=None, **options):
    setup = {"data": DATA, "faults": fp.RandomBits(1), "trials": 4, "journal": tmp_path / "j.jsonl", "audit": 0}
    return fp.assess(model or Net(), **{**setup, **options})


def test_the_same_campaign_resumes(tmp_path):
    run(tmp_path)
    assert len(run(tmp_path, trials=7).trials) == 7


def test_a_changed_forward(tmp_path, monkeypatch):
    run(tmp_path)
    monkeypatch.setattr(Net, "forward", changed_forward)  # same name, same repr, same golden outputs
    with pytest.raises(JournalMismatch, match=r"fingerprint|code: "):
        run(tmp_path)


def test_an_attribute_that_no_repr_shows(tmp_path):
    run(tmp_path)
    with pytest.raises(JournalMismatch, match="attributes: "):
        run(tmp_path, Net(high=60.0))


def test_a_changed_metric_body(tmp_path):
    def share(outputs, targets):
        return float((outputs > 0).float().mean())

    run(tmp_path, metrics=share)

    def share(outputs, targets):
        return float((outputs > 0).float().mean() * 1.0)

    with pytest.raises(JournalMismatch, match="metrics_code: "):
        run(tmp_path, metrics=share)


def test_another_output(tmp_path):
    class Two(Net):
        def forward(self, x):
            return super().forward(x), 2 * super().forward(x)

    run(tmp_path, Two(), output=lambda r: r[0])
    with pytest.raises(JournalMismatch, match=r"output_code: "):
        run(tmp_path, Two(), output=lambda r: r[1])


def test_a_constant_that_a_forward_reads_from_its_module(tmp_path, monkeypatch):
    global LIMIT

    class Reading(Net):
        def forward(self, x):
            return self.a(x).clamp(max=LIMIT)

    LIMIT = 50.0
    run(tmp_path, Reading())
    LIMIT = 51.0
    with pytest.raises(JournalMismatch, match=r"code: "):
        run(tmp_path, Reading())


def test_golden_outputs(tmp_path):
    class Scaled(Net):
        def forward(self, x):
            return super().forward(x) * self.a.scale

    def build(scale):
        model = Scaled()
        nn.Module.register_buffer(model.a, "scale", torch.tensor(scale), persistent=False)
        return model

    run(tmp_path, build(1.0))
    with pytest.raises(JournalMismatch, match="golden_outputs: "):
        run(tmp_path, build(2.0))


def test_digests_are_the_same_in_another_process():
    code = (
        "import torch, sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_fingerprint import Net, digest_of, attributes_digest, code_digest, closed\n"
        "[torch.nn.Linear(1, 1).register_forward_hook(print) for _ in range(5)]\n"
        "m = Net(); m.a.register_forward_hook(closed(2))\n"
        "print(digest_of(closed(3)), attributes_digest(m), code_digest(m))"
    )
    here = __file__.rpartition("/")[0]
    done = subprocess.run([sys.executable, "-c", code, here], capture_output=True, text=True, check=True)
    model = Net()
    model.a.register_forward_hook(closed(2))
    assert done.stdout.split() == [digest_of(closed(3)), attributes_digest(model), code_digest(model)]


def closed(factor):
    def hook(module, args, result):
        return result * factor

    return hook


def test_what_makes_a_difference():
    values = [
        1, 1.0, True, "1", None, [1], (1,), {1: 2}, {"1": 2}, {1, 2}, torch.ones(2), torch.zeros(2), closed(2),
        closed(3), partial(closed, 2), partial(closed, 3), Net, Net.forward, nn.Linear, nn.ReLU(), {"a": {"b": [1, 2]}},
        {"a": {"b": [1, 3]}},
    ]  # fmt: skip
    digests = [digest_of(value) for value in values]
    assert len(set(digests)) == len(values)
    assert digests == [digest_of(value) for value in values]
    cyclic: list = []
    cyclic.append(cyclic)
    assert digest_of(cyclic)


def in_module(tmp_path, monkeypatch, body):
    (tmp_path / "helpers_of_a_user.py").write_text(f"def act(x):\n    return {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("helpers_of_a_user", None)
    return importlib.import_module("helpers_of_a_user")


def variants(tmp_path, monkeypatch):
    """Pairs that answer the same without faults, and otherwise under them."""

    class Config:
        __slots__ = ("high",)

        def __init__(self, high):
            self.high = high

    def with_config(config):
        model = Net()
        model.config = config
        return model

    def cached(high):
        @lru_cache
        def limit():
            return high + 0.0

        return limit

    yield lambda: with_config(Namespace(high=1.0)), lambda: with_config(Namespace(high=2.0))
    yield lambda: with_config(Config(1.0)), lambda: with_config(Config(2.0))
    yield lambda: with_config(cached(1.0)), lambda: with_config(cached(2.0))
    yield lambda: with_config(partialmethod(closed, 1)), lambda: with_config(partialmethod(closed, 2))


def test_what_hides_in_records_slots_caches_and_partial_methods(tmp_path, monkeypatch):
    for one, other in variants(tmp_path, monkeypatch):
        assert attributes_digest(one()) == attributes_digest(one())
        assert attributes_digest(one()) != attributes_digest(other())


CYCLE = """
class Part:
    def act(self, x):
        return x * FACTOR if type(self) in KINDS else x

class Other(Part):
    def act(self, x):
        return Part.act(self, x) if self in PARTS else x

KINDS = {Part, Other}
PARTS = {Part(), Other(), "name", 3}
"""


def test_sets_whose_parts_lead_back_to_them():
    """As where classes are registered: the digest comes to an end, and sees what the parts do."""
    digests = []
    for factor in ("1", "1", "2"):
        scope = {"__name__": "users_own"}
        exec(CYCLE.replace("FACTOR", factor), scope)
        digests.append(digest_of(scope["KINDS"], scope["PARTS"]))
    assert digests[0] == digests[1] != digests[2]
    assert digest_of({1, 2, "a"}) == digest_of({"a", 2, 1}) != digest_of({1, 2, "b"})
    twice = {eval("lambda x: x + 1"), eval("lambda x: x + 2")}
    assert digest_of(twice) == digest_of({eval("lambda x: x + 2"), eval("lambda x: x + 1")})
    assert digest_of(twice) != digest_of({eval("lambda x: x + 1"), eval("lambda x: x + 3")})


def test_a_function_of_a_module_of_the_users_own(tmp_path, monkeypatch):
    digests = []
    for body in ("x.relu()", "x.relu().clamp(max=50)"):
        helpers = in_module(tmp_path, monkeypatch, body)
        digests.append(digest_of(eval("lambda x: helpers.act(x)", {"helpers": helpers})))
    assert digests[0] != digests[1]


def test_hooks_of_every_module():
    model = Net()
    before = code_digest(model)
    handle = torch.nn.modules.module.register_module_forward_hook(closed(2))
    try:
        assert code_digest(model) != before
    finally:
        handle.remove()
    assert code_digest(model) == before


def test_what_refers_to_too_much_is_refused_and_asserts_refer_to_nothing(tmp_path):
    def mine(outputs, targets):
        assert len(outputs) == len(targets)  # rewritten by pytest, whose objects hold the whole session
        return 0.0

    assert run(tmp_path, metrics={"mine": mine}).golden == {"mine": 0.0}
    chain = None
    for _ in range(100_000):
        chain = [chain]
    with pytest.raises(ConfigError, match="nests too deep"):
        digest_of(chain)
    while chain:  # freed one by one: the interpreter would recurse
        chain = chain.pop()
