"""Signals of this process, caught; what ends a process is tried on another."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from meteor.command_line import run_command
from meteor.stopping import Stopped, keep_listening, raise_if_stopped, stop_signal, stoppable

pytestmark = pytest.mark.usefixtures("signals_as_in_a_terminal")
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0.01)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_unwinds_the_command_which_says_so_in_one_line(number, capsys):
    cleaned, before = [], {each: signal.getsignal(each) for each in SIGNALS}

    def act():
        try:
            send(number)
        finally:
            cleaned.append(stop_signal())
        return 0

    with stoppable():
        assert run_command(act, when_stopped="stopped; start it again") == SIGNALS[number]
    assert cleaned == [number]
    assert capsys.readouterr().err == "stopped; start it again\n"
    assert {each: signal.getsignal(each) for each in SIGNALS} == before


def test_the_text_of_whoever_knows_more_is_printed(capsys):
    def act():
        raise Stopped("goes on from step 3")

    assert run_command(act) == 130
    assert capsys.readouterr().err == "goes on from step 3\n"


def test_a_signal_that_comes_again_at_once_is_the_same_request():
    with stoppable():
        with pytest.raises(Stopped):
            send(signal.SIGTERM)
        send(signal.SIGTERM)
        with pytest.raises(Stopped):
            raise_if_stopped()


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            send(signal.SIGHUP)
            assert stop_signal() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_of_a_library_are_replaced_and_its_exit_is_a_stop():
    def library(number):
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        if number:
            send(number)

    with stoppable():
        with keep_listening():
            library(None)
        with pytest.raises(Stopped):
            send(signal.SIGTERM)
    with stoppable(), pytest.raises(Stopped), keep_listening():
        library(signal.SIGTERM)


def test_a_library_keeps_its_handlers_where_nothing_is_stoppable():
    def handler(number, frame):
        raise AssertionError

    before = signal.getsignal(signal.SIGTERM)
    try:
        with keep_listening():
            signal.signal(signal.SIGTERM, handler)
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_go_without():
    found = []

    def work():
        with stoppable():
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


HANGING = """
import time
from meteor.stopping import stoppable
with stoppable():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleaning up", flush=True)
        time.sleep(60)
"""


def test_a_second_signal_ends_a_clean_up_that_hangs():
    with subprocess.Popen([sys.executable, "-c", HANGING], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "cleaning up\n"
        time.sleep(1.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
