"""Under mlx.launch: which rank this is, and that rank 0 alone talks to the terminal."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import mlx.core as mx

from dflash_mlx.cli.screen import fail
from dflash_mlx.distributed import Ranks
from dflash_mlx.errors import said

_COMMANDS = ("generate", "chat", "serve", "bench")
_RANK = "MLX_RANK"  # what mlx.launch sets, whatever the backend
LOST = "Another rank has ended or cannot be reached, so this one ends, too"


def launched() -> bool:
    """Whether mlx.launch has started this process."""
    return _RANK in os.environ


def together() -> Ranks | None:
    """All ranks; None where this process works alone."""
    group = mx.distributed.init() if launched() else None
    return None if group is None or group.size() == 1 else Ranks(group)


def decided(call: Callable[[], Any]) -> Any:
    """What a call gives, of rank 0's files and the like: in several ranks as `Ranks.decided`."""
    ranks = together()
    return call() if ranks is None else ranks.decided(call)


def follows() -> bool:
    """Whether another rank talks to the user and writes what is written."""
    return os.environ.get(_RANK, "0") != "0"


def refusal(arguments: Sequence[str]) -> str | None:
    """Why a command line cannot run under mlx.launch; None where it can."""
    if not launched():
        return None
    command = next((a for a in arguments if not a.startswith("-")), "")
    if command not in ("", *_COMMANDS):
        return (
            f"{command} does not run under mlx.launch, which starts it once a machine; only "
            f"{', '.join(_COMMANDS)} does."
        )
    if "--pipeline" in arguments:
        return (
            "A pipeline over machines cannot be drafted for, as the layers that the draft taps "
            "would lie in other ranks; leave out --pipeline, and the model is sharded."
        )
    return None


class Terminal:
    """The terminal as this rank may use it: rank 0 all of it, the others only to say their end."""

    def __init__(self) -> None:
        self._stderr: TextIO | None = None

    def take(self) -> None:
        """Silence a rank that follows; let rank 0 say why it is ended."""
        if not launched():
            return
        if follows():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides
            self._stderr = sys.stderr
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        else:
            _end_with_a_word()

    def lost(self, error: Exception) -> bool:
        """Whether an error means that another rank is gone; says so then."""
        if not (launched() and _means_loss(error)):
            return False
        if self._stderr is not None:
            sys.stderr = self._stderr
        fail(f"{LOST} ({said(error)}).")
        return True


def end_process(error: Exception) -> None:
    """From any thread: this rank cannot go on, so that no other can."""
    fail(f"{LOST if _means_loss(error) else 'This rank cannot go on'} ({said(error)}).")
    os._exit(1)


def _means_loss(error: Exception) -> bool:
    backends = ("[ring]", "[jaccl]", "[mpi]", "[nccl]", "[distributed]")
    return isinstance(error, RuntimeError) and said(error).startswith(backends)


def _end_with_a_word() -> None:
    """Answer SIGTERM, by which mlx.launch ends all ranks once one has failed.

    From a thread of its own: the main one may be waiting in MLX for a rank that is gone.
    """
    hears, tells = socket.socketpair()
    tells.setblocking(False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(tells.fileno())

    def listen() -> None:
        _ = tells  # kept open
        while number := hears.recv(1):
            if number[0] == signal.SIGTERM:
                fail(f"{LOST}.")
                os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
