"""A line in a log, a line in a notebook; the bar on a terminal is rich's."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from flipproof.engine import progress


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
    return now


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(clock, capsys):
    with progress.progress_bar(100, 20, show=True) as step:
        for _ in range(40):
            clock.seconds += 1.0
            step("ber 0.1")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "ber 0.1: 31/100, 1 a second, 1:09 left"
    assert lines[-1] == "60/100 in 0:40"
    assert len(lines) == 4  # three in forty seconds, and the last


def test_nothing_is_said_where_nobody_asked(capsys):
    for show in (False, None):
        with progress.progress_bar(2, 0, show=show) as step:
            step("a")
    assert capsys.readouterr().err == ""


def test_a_notebook_gets_one_line_that_changes(clock, capsys, monkeypatch):
    shown = []

    class ZMQInteractiveShell:
        pass

    def display(content, *, raw, display_id):
        assert raw
        assert display_id
        return SimpleNamespace(update=lambda content, raw: shown.append(content["text/plain"]))

    for name, attributes in {
        "ipykernel": {},
        "IPython": {},
        "IPython.core": {},
        "IPython.core.getipython": {"get_ipython": ZMQInteractiveShell},
        "IPython.display": {"display": display},
    }.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    with progress.progress_bar(3, 0, show=None) as step:
        for _ in range(3):
            clock.seconds += 30.0
            step("ber 0.1")
    assert shown == [
        "ber 0.1: 1/3, 0.0333 a second, 1:00 left",
        "ber 0.1: 2/3, 0.0333 a second, 0:30 left",
        "ber 0.1: 3/3, 0.0333 a second, 0:00 left",
        "3/3 in 1:30",
    ]
    assert capsys.readouterr().err == ""
