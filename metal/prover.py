"""Runs proofs in child processes, one at a time, so that a stalled one harms nothing."""

import atexit
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

from .shape_class import ShapeClass
from .verdicts import Verdict

TIME_LIMIT = 90.0
COMMAND = (sys.executable, "-m", "dflash_mlx.metal.proof")


class Prover:
    """Proves shape classes, at once with `prove` or in the background with `request`.

    Attributes:
        command: what to run, with the class's key and a number of seconds appended.
        time_limit: seconds after which the child is killed and the kernel counts as stalled.
    """

    def __init__(self, command: Sequence[str] = COMMAND, time_limit: float = TIME_LIMIT) -> None:
        self.command = tuple(command)
        self.time_limit = time_limit
        self._waiting: queue.SimpleQueue[tuple[ShapeClass, Callable]] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None
        self._child: subprocess.Popen | None = None
        self._closing = False
        self._open = 0  # requests without a verdict
        self._settled = threading.Condition()

    def request(self, shape: ShapeClass, done: Callable[[ShapeClass, Verdict], None]) -> None:
        """Prove the class in the background and call done with the verdict, on a thread."""
        with self._settled:
            self._open += 1
        self._waiting.put((shape, done))
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="kernel proofs", daemon=True)
            self._worker.start()
            atexit.register(self.close)

    @property
    def busy(self) -> bool:
        """Whether a proof is running or waiting."""
        return self._open > 0

    def settle(self, seconds: float) -> bool:
        """Wait so long at most until no proof runs or waits; returns whether none does."""
        with self._settled:
            return self._settled.wait_for(lambda: not self.busy, seconds)

    def close(self) -> None:
        """End a proof that is running; its class is left without a verdict."""
        self._closing = True
        child = self._child
        if child is not None and child.poll() is None:
            child.kill()

    def _work(self) -> None:
        while not self._closing:
            shape, done = self._waiting.get()
            verdict = self.prove(shape)
            if not self._closing:
                done(shape, verdict)
            with self._settled:
                self._open -= 1
                self._settled.notify_all()

    def prove(self, shape: ShapeClass) -> Verdict:
        """The verdict of a child process, waiting for it at most the time limit."""
        # A child must find the package where this process did, installed or not.
        paths = os.pathsep.join(path for path in sys.path if path)
        command = [*self.command, shape.key, str(int(self.time_limit) + 5)]
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": paths},
            )
        except OSError as error:
            return Verdict("failed", detail=f"the proof could not be started: {error.strerror}")
        self._child = child
        try:
            output, errors = child.communicate(timeout=self.time_limit)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            return Verdict("stalled", detail=f"no result within {self.time_limit:g} s")
        except BaseException:  # an interrupt must not leave it running
            child.kill()
            raise
        finally:
            self._child = None
        try:
            return Verdict.read(json.loads((output.strip().splitlines() or [""])[-1]))
        except ValueError:
            last = (errors.strip().splitlines() or ["no message"])[-1]
            return Verdict("failed", detail=f"the proof ended with {child.returncode}: {last:.200}")
