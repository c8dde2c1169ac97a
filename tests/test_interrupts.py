"""Ctrl-C at any function entry leaves the model, and PyTorch, as they were. `make interrupts` tries every entry."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import flipproof as fp
from flipproof import _interrupts as interrupts
from flipproof._interrupts import check, given_back, held, whole

sys.path.insert(0, str(Path(__file__).parent))
import interrupt_points

PRESSED = {"harden": 5, "harden, trained": 3, "corrupted": 40, "stored": 40}
"""How many entries of a call are tried here; 8 of any other."""


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("call", interrupt_points.CALLS)
def test_ctrl_c_leaves_nothing_behind(call):
    total = interrupt_points.points(call)
    for at in range(1, total, max(1, total // PRESSED.get(call, 8))):
        place, damage = interrupt_points.press(call, at)
        assert not damage, f"Ctrl-C at entry {at}, {place}"


@pytest.mark.parametrize(
    ("call", "place"),
    [
        *(("corrupted", place) for place in ("words.py:make_room", "words.py:undo")),
        *(("corrupted", place) for place in ("_interrupts.py:__exit__", "_interrupts.py:__enter__", "words.py:apply")),
        *(
            ("stored", place)
            for place in ("parameters.py:_take_back", "cell.py:_decoded", "cell.py:take_back", "_interrupts.py:_end")
        ),
        *(
            ("assess", place)
            for place in ("parameters.py:_to_the_end", "evaluation.py:eval_mode", "contextlib.py:__exit__")
        ),
        *(("assess", place) for place in ("_symbolic_trace.py:patch", "_symbolic_trace.py:revert")),
        *(("assess, neurons", place) for place in ("hooks.py:remove", "_hooks.py:hooked")),
        *(("pack_", place) for place in ("pack.py:_store",)),
    ],
)
def test_ctrl_c_where_it_used_to_hurt(call, place):
    interrupt_points.points(call)
    pressed, damage = interrupt_points.press(call, place)
    assert pressed == place
    assert not damage


@pytest.fixture
def notes():
    """A handler of the user's that only notes what came."""
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    for number in interrupts.SIGNALS:
        signal.signal(number, lambda number, frame: came.append(number))
    yield came
    for number, handler in before.items():
        signal.signal(number, handler)


def press(number=signal.SIGINT):
    signal.raise_signal(number)


class TestHeld:
    def test_a_signal_waits_until_the_end(self):
        done = []
        with pytest.raises(KeyboardInterrupt), held():
            done += [press(), "done"]
        assert done == [None, "done"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_check_lets_it_through(self):
        reached = []

        def work():
            with held():
                for step in (check, press, check, check):
                    reached.append(step)
                    step()

        with pytest.raises(KeyboardInterrupt):
            work()
        assert reached == [check, press, check]

    def test_a_handler_of_the_users_is_called_once_with_its_signal(self, notes):
        with held():
            press(signal.SIGTERM)
            press(signal.SIGTERM)
            assert notes == []
        assert notes == [signal.SIGTERM]
        press()
        assert notes == [signal.SIGTERM, signal.SIGINT]

    def test_contexts_in_contexts_wait_for_the_outermost(self, notes):
        with held():
            with held(), held():
                press()
            assert notes == []
        assert notes == [signal.SIGINT]

    def test_a_user_who_insists_is_heard_at_once(self, notes, monkeypatch):
        monkeypatch.setattr(interrupts, "PATIENCE", -1.0)
        with held():
            press()
            assert notes == []
            press()
            assert notes == [signal.SIGINT]

    @pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
    def test_what_is_no_python_handler_stays(self, handler):
        before = signal.signal(signal.SIGTERM, handler)
        try:
            with held():
                assert signal.getsignal(signal.SIGTERM) is handler
            assert signal.getsignal(signal.SIGTERM) is handler
        finally:
            signal.signal(signal.SIGTERM, before)

    def test_a_handler_that_is_put_in_meanwhile_stays(self, notes):
        def another(number, frame):
            raise AssertionError

        with held():
            signal.signal(signal.SIGTERM, another)
        assert signal.getsignal(signal.SIGTERM) is another

    def test_other_threads_are_never_interrupted_and_change_nothing(self, notes):
        handler = signal.getsignal(signal.SIGINT)
        found = []

        def work():
            with held():
                found.append(signal.getsignal(signal.SIGINT))
                check()

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert found == [handler]

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_a_child_does_not_inherit_what_waits(self, notes):
        with held():
            press()
            child = os.fork()
            if child == 0:
                check()
                os._exit(len(notes))
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert notes == [signal.SIGINT]

    def test_waiting_for_workers_listens(self, blobs, mlp):
        def slow(outputs, targets):
            time.sleep(0.05)
            return 0.0

        began = time.monotonic()
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            fp.assess(mlp, data=blobs, faults=fp.RandomBits(1), trials=5000, metrics=slow, workers=2, progress=False)
        assert time.monotonic() - began < 100  # 5,000 trials take two minutes


class TestWhole:
    def test_a_signal_in_the_body_goes_through_at_once_and_is_cleaned_up_after(self):
        steps = []

        @whole
        def context():
            steps.append("enter")
            try:
                yield
            finally:
                steps.append("exit")

        with pytest.raises(KeyboardInterrupt), context():
            steps += [press(), "never"]
        assert steps == ["enter", "exit"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    @pytest.mark.parametrize("during", ["enter", "exit"])
    def test_a_signal_on_the_way_in_or_out_waits(self, during):
        steps = []

        @whole
        def context():
            if during == "enter":
                press()
            steps.append("enter")
            try:
                yield
            finally:
                if during == "exit":
                    press()
                steps.append("exit")

        with pytest.raises(KeyboardInterrupt), context():
            steps.append("body")
        assert steps == (["enter", "exit"] if during == "enter" else ["enter", "body", "exit"])
        assert interrupts._signals.waiting == []
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    @pytest.mark.parametrize("make", [contextlib.contextmanager, whole])
    def test_exceptions_go_their_usual_way(self, make):
        @make
        def context(swallow=False, change=False):
            try:
                yield 5
            except ValueError:
                if change:
                    raise KeyError("other") from None
                if not swallow:
                    raise

        with context() as value:
            assert value == 5
        with context(swallow=True):
            raise ValueError
        for options, error in (({}, ValueError("x")), ({}, StopIteration(1)), ({"change": True}, ValueError("x"))):
            expected = KeyError if options else type(error)
            with pytest.raises(expected) as raised, context(**options):
                raise error
            assert options or raised.value is error

        @make
        def broken():
            raise LookupError
            yield

        with pytest.raises(LookupError), broken():
            raise AssertionError
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_given_back_sets_right_whatever_was_forgotten(mlp):
    mlp[0].eval()
    handle = mlp[1].register_forward_hook(lambda *_: None)
    before = interrupt_points.State.of(mlp)
    with contextlib.suppress(LookupError), given_back(mlp):
        mlp.eval().requires_grad_(False)
        mlp[2].register_forward_pre_hook(lambda *_: None, with_kwargs=True)
        torch.set_grad_enabled(False)
        torch.set_num_threads(1)
        raise LookupError
    assert before.damage(interrupt_points.State.of(mlp)) == []
    handle.remove()
