"""Ctrl-C while several generations are open, and beside a consumer's own handler."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from dflash_mlx.decode.interrupts import Interrupts


@pytest.fixture(autouse=True)
def handler() -> Iterator[object]:
    before = signal.getsignal(signal.SIGINT)
    yield before
    assert signal.getsignal(signal.SIGINT) is before


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def test_it_is_held_back_until_it_is_checked() -> None:
    with Interrupts() as interrupts:
        interrupt()
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
        interrupts.check()


def test_it_reaches_the_consumer_at_once() -> None:
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt), interrupts.open():
            interrupt()
        interrupt()
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()


def test_one_that_comes_last_is_not_lost() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupts():
        interrupt()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_generations_may_end_in_any_order(order: tuple[int, ...]) -> None:
    open_ones = [Interrupts() for _ in order]
    for one in open_ones:
        one.__enter__()
        one.hold(False)
    for i in order:
        with pytest.raises(KeyboardInterrupt):
            interrupt()
        open_ones[i].__exit__(None, None, None)


def test_one_generation_holds_back_what_another_lets_through() -> None:
    with Interrupts() as first, first.open(), Interrupts() as second, second.open():
        first.hold(True)
        interrupt()
        with pytest.raises(KeyboardInterrupt):
            first.check()


def test_a_handler_that_the_consumer_installs_serves_and_stays(handler: object) -> None:
    got = []

    def own(signum: int, frame: object) -> None:
        got.append(signum)

    with Interrupts() as interrupts, interrupts.open():
        signal.signal(signal.SIGINT, own)
        interrupt()
    interrupt()
    assert got == [signal.SIGINT] * 2 and signal.getsignal(signal.SIGINT) is own
    signal.signal(signal.SIGINT, handler)  # type: ignore[arg-type]


def test_ignored_interrupts_stay_ignored(handler: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interrupts() as interrupts:
        interrupt()
        interrupts.check()
        with interrupts.open():
            interrupt()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, handler)  # type: ignore[arg-type]


def test_where_interrupts_end_the_process_they_still_do() -> None:
    code = """
import signal
from dflash_mlx.decode.interrupts import Interrupts
signal.signal(signal.SIGINT, signal.SIG_DFL)
with Interrupts() as interrupts:
    signal.raise_signal(signal.SIGINT)
    print("held", flush=True)
    interrupts.check()
print("alive", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "held\n"), done.stderr


def test_a_generation_in_another_thread_holds_nothing_back() -> None:
    entered, done = threading.Event(), threading.Event()

    def work() -> None:
        with Interrupts():
            entered.set()
            done.wait()

    thread = threading.Thread(target=work)
    thread.start()
    entered.wait()
    with pytest.raises(KeyboardInterrupt):
        interrupt()
    done.set()
    thread.join()


def test_a_generation_may_end_in_another_thread(handler: object) -> None:
    interrupts = Interrupts()
    interrupts.__enter__()
    thread = threading.Thread(target=interrupts.__exit__, args=(GeneratorExit, None, None))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is handler
    with pytest.raises(KeyboardInterrupt):
        interrupt()
